# SPDX-License-Identifier: Apache-2.0
"""Scale of a reconstruction, which images alone do not determine.

It is computed from depth images, from approximate poses (odometry, another tracker), or from one measured length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.mapping.views import map_camera
from kfloc_ros.relocalization.retrieval import QueryCells, Vocabulary, reliable_cells
from kfloc_ros.types import Frame

DEPTH_VIEWS = 30
MIN_DEPTH_PAIRS = 200
MIN_BASELINE_M = 0.05
Array = NDArray[np.float64]


@dataclass(frozen=True)
class KnownLength:
    """Measured distance between the camera positions of two frames."""

    first: int
    second: int
    metres: float


def known_length(words: Sequence[str] | None) -> KnownLength | None:
    """Parse ``FRAME FRAME METRES`` from a command line.

    Raises:
        SourceError: the words are not two frame numbers and a length.
    """
    if words is None:
        return None
    try:
        return KnownLength(int(words[0]), int(words[1]), float(words[2]))
    except (ValueError, IndexError) as error:
        raise SourceError(f"--sfm-length takes two frame numbers and metres, not '{' '.join(words)}'.") from error


def metres_per_unit(
    source: FrameSource, poses: Mapping[int, Matrix], points: Mapping[int, Array], length: KnownLength | None
) -> float:
    """Return the metres per unit of the model.

    Args:
        source: source whose depth or poses give the scale if no length is given.
        poses: ``T_model_camera`` by position.
        points: (N, 3) points of the model observed by each image, by position.
        length: measured length.

    Raises:
        SourceError: the scale is unknown, or a frame of the length has no pose.
    """
    if length is not None:
        return _scale_from_length(poses, length, len(source))
    scale = _scale_from_depth(source, poses, points)
    if scale is None:
        scale = scale_from_poses(poses, {k: T for k in poses if (T := source.pose(k)) is not None})
    if scale is None:
        raise SourceError(
            f"Images alone do not give the scale: '{source.name}' has neither depth nor poses. Measure the distance "
            "between the camera positions of two frames and pass --sfm-length FRAME FRAME METRES."
        )
    return scale


def _scale_from_length(poses: Mapping[int, Matrix], length: KnownLength, count: int) -> float:
    for frame in (length.first, length.second):
        if frame not in poses:
            raise SourceError(f"Frame {frame} of the measured length has no pose among the {count} images.")
    apart = float(np.linalg.norm(poses[length.first][:3, 3] - poses[length.second][:3, 3]))
    if not (length.metres > 0 and apart > 1e-9):
        raise SourceError("The measured length must be positive, and between two different positions.")
    return length.metres / apart


def _scale_from_depth(source: FrameSource, poses: Mapping[int, Matrix], points: Mapping[int, Array]) -> float | None:
    """Return the median ratio of measured depth to the model's depth at its points."""
    camera = source.camera.pinhole()
    adapter = ImageAdapter(source.camera, camera)
    ratios: list[Array] = []
    known = list(poses)
    for position in known[:: max(1, len(known) // DEPTH_VIEWS)]:
        frame = source.read(position)
        depth_m = None if frame is None else frame.depth_m
        if depth_m is None:
            continue
        T = inverse_pose(poses[position])
        local = points[position] @ T[:3, :3].T + T[:3, 3]
        local = local[local[:, 2] > 1e-6]
        u = np.round(camera.fx * local[:, 0] / local[:, 2] + camera.cx).astype(np.int64)
        v = np.round(camera.fy * local[:, 1] / local[:, 2] + camera.cy).astype(np.int64)
        inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
        measured = adapter.nearest(depth_m)[v[inside], u[inside]]
        ratios.append((measured / local[inside, 2])[measured > 0].astype(np.float64))
    pairs = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(np.median(pairs)) if len(pairs) >= MIN_DEPTH_PAIRS else None


def scale_from_poses(model: Mapping[int, Matrix], known: Mapping[int, Matrix]) -> float | None:
    """Return the median ratio of distances between the same two distant frames in two sets of poses.

    Distances are used rather than positions, since odometry drifts and the frames differ.
    """
    frames = [k for k, T in known.items() if np.isfinite(T).all() and k in model]
    if len(frames) < 2:
        return None
    a, b = (np.stack([poses[k][:3, 3] for k in frames]) for poses in (model, known))
    apart_model, apart_m = (np.linalg.norm(c[:, None] - c[None], axis=2)[np.triu_indices(len(c), 1)] for c in (a, b))
    far = (apart_m > max(MIN_BASELINE_M, float(np.median(apart_m)))) & (apart_model > 1e-9)
    return float(np.median(apart_m[far] / apart_model[far])) if far.any() else None


class ReconstructedSource(DerivedSource):
    """Images, and depth if there is any, of one source with the poses of a reconstruction.

    Args:
        source: source of the images; its own poses are ignored.
        poses: ``T_map_camera`` by position; images that were not registered have none.
        points: (N, 3) points in the map frame observed by each image, by position.
        camera: estimated camera, if the source's camera was a guess.
    """

    passes_images_on = True

    def __init__(
        self,
        source: FrameSource,
        poses: Mapping[int, Matrix],
        points: Mapping[int, NDArray[np.float64]],
        camera: Camera | None = None,
    ) -> None:
        super().__init__(source)
        self._poses, self._points = poses, points
        self._camera = camera or source.camera

    @property
    def camera(self) -> Camera:
        return self._camera

    @property
    def camera_is_guess(self) -> bool:
        return False

    def changed(self, frame: Frame, position: int) -> Frame:
        return replace(frame, camera=self._camera, T_map_camera=self._poses.get(position))

    def pose(self, position: int) -> Matrix | None:
        return self._poses.get(position)

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        return self._points.get(position)


BLOCK_ROWS = 512


def similar_pairs(
    images: Iterable[NDArray[np.uint8]], camera: Camera, backbone: Backbone, *, partners: int, min_apart: int
) -> list[tuple[int, int]]:
    """Return pairs of the most similar images that are at least ``min_apart`` apart in the sequence.

    Args:
        images: RGB (H, W, 3), in order, of a pinhole camera; read once.
        camera: camera of the images.
        backbone: network whose features describe the images.
        partners: largest number of partners per image.
        min_apart: smallest distance in the sequence; nearer images are matched elsewhere.

    Returns:
        Sorted pairs (i, j), i < j, each once.
    """
    adapter = ImageAdapter(camera, map_camera(camera))
    cells = [_described(reliable_cells(backbone.extract(adapter(image)))) for image in images]
    if len(cells) <= min_apart:
        return []
    vocabulary = Vocabulary.learn(torch.cat([c.features for c in cells]).float())
    rows = torch.stack([vocabulary.describe(c.features.float(), c.weight.float()) for c in cells])
    rows = F.normalize(rows - rows.mean(dim=0), dim=1)
    place = torch.arange(len(rows), device=rows.device)
    found: set[tuple[int, int]] = set()
    for start in range(0, len(rows), BLOCK_ROWS):
        block = place[start : start + BLOCK_ROWS]
        similarity = rows[block] @ rows.t()
        similarity[(place[None] - block[:, None]).abs() < min_apart] = -torch.inf
        best = similarity.topk(min(partners, len(rows)), dim=1)
        for i, values, others in zip(block.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            found.update((min(i, j), max(i, j)) for v, j in zip(values, others, strict=True) if v > 0)
    return sorted(found)


def _described(cells: QueryCells) -> QueryCells:
    """Return descriptors in half precision, since thousands of images are in memory at once."""
    return QueryCells(cells.features.half(), cells.weight.half())
