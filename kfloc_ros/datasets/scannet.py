# SPDX-License-Identifier: Apache-2.0
"""ScanNet-like folders: ``color/``, ``depth/``, ``pose/`` and ``intrinsic/``, one file a frame in each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kfloc_ros.datasets.derived import FRAME_PERIOD_NS
from kfloc_ros.datasets.images import usual_size
from kfloc_ros.datasets.posed_images import DepthFiles, PosedImage, PosedImages, check_centre, natural_key
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import number_rows
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.reference.files import pose_fault, read_pose
from kfloc_ros.types import Matrix

DEPTH_UNIT_M = 1e-3


class ScanNetFolder(PosedImages):
    """One scan. ``intrinsic/intrinsic_color.txt`` and ``intrinsic_depth.txt`` hold the cameras, as matrices.

    Colour and depth are taken to share one centre, as the dataset's own tools do. Poses that are not finite mark
    frames without one. Intrinsics of images of another size are refused. Stamps are made from the files' numbers, at
    30 Hz.

    Raises:
        SourceError: a folder or an intrinsic file is missing or damaged.
    """

    def fault(self, position: int) -> str:
        return super().fault(position) or pose_fault(self._pose_files[position])

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        colors = sorted(
            (p for p in (root / "color").glob("*") if p.suffix.lower() in (".jpg", ".png")),
            key=lambda path: natural_key(path.stem),
        )
        if not colors:
            raise SourceError(f"'{root}' has no color/*.jpg or .png.")
        camera = _camera(root / "intrinsic" / "intrinsic_color.txt", colors)
        images = []
        for place, path in enumerate(colors):
            number = int(path.stem) if re.fullmatch(r"\d{1,9}", path.stem) else place
            depth_path = root / "depth" / f"{path.stem}.png"
            pose = root / "pose" / f"{path.stem}.txt"
            images.append(
                PosedImage(
                    path, path.stem, (number + 1) * FRAME_PERIOD_NS, camera, _pose(pose),
                    depth_path if depth_path.is_file() else None,
                )
            )  # fmt: skip
        self._pose_files = [root / "pose" / f"{path.stem}.txt" for path in colors]
        files = None
        with_depth = [image.depth_path for image in images if image.depth_path is not None]
        if depth and with_depth:
            files = DepthFiles(DEPTH_UNIT_M, _camera(root / "intrinsic" / "intrinsic_depth.txt", with_depth))
        super().__init__(root.resolve().name, images, depth=files)


def _camera(path: Path, images: Sequence[Path]) -> Camera:
    try:
        rows = number_rows(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' does not hold a 3x3 or 4x4 matrix of intrinsics: {error}") from error
    if [len(row) for row in rows] not in ([3, 3, 3], [4, 4, 4, 4]):
        raise SourceError(f"'{path}' does not hold a 3x3 or 4x4 matrix of intrinsics.")
    width, height = usual_size(images)
    camera = Camera(width, height, rows[0][0], rows[1][1], rows[0][2], rows[1][2])
    check_centre(camera, str(path))
    return camera


def _pose(path: Path) -> Matrix | None:
    try:
        return read_pose(path) if path.exists() else None
    except FrameError:  # told by the source's fault()
        return None
