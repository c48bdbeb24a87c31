# SPDX-License-Identifier: Apache-2.0
"""What the reference family knows of a place: sparse points and the images that observe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_colmap
from kfloc_ros.geometry.lie import Matrix, make_pose


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """One image of the map."""

    name: str
    camera: Camera
    T_camera_map: Matrix
    point_rows: NDArray[np.int64]
    """(N,) rows of the scene's points that this image observes."""
    ident: int = -1
    """Number of the image in the COLMAP model that it comes from."""


@dataclass(frozen=True, eq=False)
class ReferenceScene:
    """Points and images; an image is referred to by its position in ``images``."""

    points: NDArray[np.float64]
    """(P, 3) metres, map frame."""
    point_ids: NDArray[np.int64]
    """(P,) as in the model that they come from."""
    track_lengths: NDArray[np.int64]
    """(P,) how many images observe each point."""
    images: tuple[ReferenceImage, ...]

    def position_of(self, name: str) -> int:
        """Position of an image by its name.

        Raises:
            MapError: there is none.
        """
        for position, image in enumerate(self.images):
            if image.name == name:
                return position
        raise MapError(f"The map has no image '{name}'.")

    def covisibility(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """(K, K) number of points that images observe in common."""
        seen = np.zeros((len(positions), len(self.points)), dtype=np.float32)
        for row, position in enumerate(positions):
            seen[row, self.images[position].point_rows] = 1
        return np.asarray(np.rint(seen @ seen.T), dtype=np.int64)


def read_scene(folder: Path) -> ReferenceScene:
    """Read a COLMAP model (.bin or .txt).

    Raises:
        MapError: there is none, it is damaged, or it has no registered image.
        FrameError: a camera model is not supported.
    """
    import pycolmap

    try:
        model = pycolmap.Reconstruction(str(folder))
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise MapError(f"'{folder}' does not hold a COLMAP model that can be read: {error}") from error
    ids = np.array(sorted(model.points3D), dtype=np.int64)
    row_of = {int(ident): row for row, ident in enumerate(ids)}
    images = []
    for image in sorted((i for i in model.images.values() if i.has_pose), key=lambda i: str(i.name)):
        rows = sorted({row_of[p.point3D_id] for p in image.points2D if p.has_point3D()})
        matrix = np.asarray(image.cam_from_world().matrix(), dtype=np.float64)
        images.append(
            ReferenceImage(
                str(image.name),
                camera_from_colmap(model.cameras[image.camera_id]),
                make_pose(matrix[:3, :3], matrix[:3, 3]),
                np.array(rows, dtype=np.int64),
                int(image.image_id),
            )
        )
    if not images:
        raise MapError(f"The COLMAP model '{folder}' has no image with a pose.")
    points = [model.points3D[int(ident)] for ident in ids]
    return ReferenceScene(
        points=np.array([p.xyz for p in points], dtype=np.float64).reshape(-1, 3),
        point_ids=ids,
        track_lengths=np.array([p.track.length() for p in points], dtype=np.int64),
        images=tuple(images),
    )
