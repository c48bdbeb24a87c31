# SPDX-License-Identifier: Apache-2.0
"""ScanNet-like folders and Indoor-6: images with their poses, or poses and intrinsics, in text files of their own."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kfloc_ros.datasets.derived import FRAME_PERIOD_NS
from kfloc_ros.datasets.images import usual_size
from kfloc_ros.datasets.posed_images import (
    DepthFiles,
    PosedImage,
    PosedImages,
    check_centre,
    natural_key,
    usable_pose,
)
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import number_rows, read_bytes, read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_parameters
from kfloc_ros.geometry.lie import inverse_pose
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
    try:
        camera = Camera(width, height, rows[0][0], rows[1][1], rows[0][2], rows[1][2])
    except FrameError as error:
        raise SourceError(f"'{path}' does not hold a camera's intrinsics: {error}") from error
    check_centre(camera, str(path))
    return camera


def _pose(path: Path) -> Matrix | None:
    try:
        return read_pose(path) if path.exists() else None
    except FrameError:  # told by the source's fault()
        return None


INDOOR6_PERIOD_NS = 10_000_000_000
"""Its images are single ones of several days; so far apart, none is taken for the next of another."""
INDOOR6_PARTS = ("train", "val", "test")
INDOOR6_SPLIT = "train_test_val.pkl"


class Indoor6Scene(PosedImages):
    """One scene: ``images/*.color.jpg`` with ``.pose.txt`` (3x4, world to camera) and ``.intrinsics.txt`` beside them.

    The intrinsics are ``width height f cx cy`` and more words, which are not needed; their pixels are COLMAP's. The
    split is in ``train_test_val.pkl``, of which only the names are read; nothing in it is executed.

    Args:
        root: folder of the scene, such as ``scene1``.
        part: ``train``, ``val`` or ``test``; None for all images.

    Raises:
        SourceError: there are no images, a file beside one is missing or damaged, or the split is.
    """

    def __init__(self, root: Path, part: str | None = None) -> None:
        folder = root / "images"
        paths = sorted(folder.glob("*.color.jpg"))
        if part is not None:
            names = set(indoor6_split(root / INDOOR6_SPLIT)[part])
            paths = [path for path in paths if path.name in names]
        if not paths:
            raise SourceError(f"'{folder}' has no *.color.jpg{f' of its {part} split' if part else ''}.")
        images = [
            PosedImage(
                path,
                path.name.removesuffix(".color.jpg"),
                (1 + place) * INDOOR6_PERIOD_NS,
                _indoor6_camera(path.with_name(path.name.replace(".color.jpg", ".intrinsics.txt"))),
                _indoor6_pose(path.with_name(path.name.replace(".color.jpg", ".pose.txt"))),
            )
            for place, path in enumerate(paths)
        ]
        super().__init__(root.resolve().name, images)

    def sequences(self) -> Sequence[int]:
        return range(len(self))


def indoor6_part(path: str) -> tuple[Path, str | None]:
    """Return folder and part of ``DIR`` or ``DIR@test``."""
    folder, mark, part = path.rpartition("@")
    return (Path(folder), part) if mark and part in INDOOR6_PARTS else (Path(path), None)


def indoor6_split(path: Path) -> dict[str, list[str]]:
    """Return the names of the images of each part, from a pickle that is walked through and not loaded.

    Raises:
        SourceError: it cannot be read, or does not name images of all three parts.
    """
    found: dict[str, list[str]] = {part: [] for part in INDOOR6_PARTS}
    current: list[str] | None = None
    try:
        for code, text, _ in pickletools.genops(read_bytes(path)):
            if "STRING" not in code.name and "UNICODE" not in code.name:
                continue
            word = text.decode() if isinstance(text, bytes) else str(text)
            if word.endswith(".color.jpg"):
                if current is not None:
                    current.append(word)
            else:
                current = found.get(word)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"The split '{path}' cannot be read: {error}.") from error
    if missing := [part for part, names in found.items() if not names]:
        raise SourceError(f"The split '{path}' names no images of '{missing[0]}'.")
    return found


def _indoor6_camera(path: Path) -> Camera:
    try:
        words = read_text(path).split()[:5]
        width, height, f, cx, cy = (float(word) for word in words)
        return camera_from_parameters("SIMPLE_PINHOLE", int(width), int(height), [f, cx, cy])
    except (OSError, ArithmeticError, ValueError, FrameError) as error:
        raise SourceError(f"'{path}' does not begin with 'width height f cx cy': {error}") from error


def _indoor6_pose(path: Path) -> Matrix | None:
    try:
        rows = number_rows(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' does not hold a 3x4 pose: {error}") from error
    if [len(row) for row in rows[:3]] != [4, 4, 4]:
        raise SourceError(f"'{path}' does not hold a 3x4 pose.")
    T_camera_map = np.vstack([np.array(rows[:3], dtype=np.float64), [0.0, 0.0, 0.0, 1.0]])
    return usable_pose(inverse_pose(T_camera_map))
