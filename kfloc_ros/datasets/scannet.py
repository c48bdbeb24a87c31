# SPDX-License-Identifier: Apache-2.0
"""ScanNet-like folders: ``color/``, ``depth/``, ``pose/`` and ``intrinsic/``, one file a frame in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import FRAME_PERIOD_NS
from kfloc_ros.datasets.posed_images import DepthFiles, PosedImage, PosedImages, image_size, natural_key
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Matrix

DEPTH_UNIT_M = 1e-3


class ScanNetFolder(PosedImages):
    """One scan. ``intrinsic/intrinsic_color.txt`` and ``intrinsic_depth.txt`` hold the cameras, as matrices.

    Colour and depth are taken to share one centre, as the dataset's own tools do. Poses that are not finite mark
    frames without one. Stamps are made from the files' numbers, at 30 Hz.

    Raises:
        SourceError: a folder or an intrinsic file is missing or damaged.
    """

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        colors = sorted(
            (p for p in (root / "color").glob("*") if p.suffix.lower() in (".jpg", ".png")),
            key=lambda path: natural_key(path.stem),
        )
        if not colors:
            raise SourceError(f"'{root}' has no color/*.jpg or .png.")
        camera = _camera(root / "intrinsic" / "intrinsic_color.txt", colors[0])
        images = []
        for place, path in enumerate(colors):
            number = int(path.stem) if path.stem.isdigit() else place
            depth_path = root / "depth" / f"{path.stem}.png"
            pose = _pose(root / "pose" / f"{path.stem}.txt")
            images.append(
                PosedImage(
                    path, path.stem, (number + 1) * FRAME_PERIOD_NS, camera, pose,
                    depth_path if depth_path.is_file() else None,
                )
            )  # fmt: skip
        files = None
        with_depth = [image.depth_path for image in images if image.depth_path is not None]
        if depth and with_depth:
            files = DepthFiles(DEPTH_UNIT_M, _camera(root / "intrinsic" / "intrinsic_depth.txt", with_depth[0]))
        super().__init__(root.resolve().name, images, depth=files)


def _camera(path: Path, image: Path) -> Camera:
    K = _matrix(path)
    if K is None or K.shape not in ((3, 3), (4, 4)):
        raise SourceError(f"'{path}' does not hold a 3x3 or 4x4 matrix of intrinsics.")
    width, height = image_size(image)
    return Camera(width, height, K[0, 0], K[1, 1], K[0, 2], K[1, 2])


def _pose(path: Path) -> Matrix | None:
    if not path.is_file():
        return None
    T = _matrix(path)
    if T is None or T.shape != (4, 4):
        raise SourceError(f"'{path}' does not hold a 4x4 pose.")
    return T if np.isfinite(T).all() else None


def _matrix(path: Path) -> NDArray[np.float64] | None:
    try:
        return np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError):
        return None
