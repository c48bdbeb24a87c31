# SPDX-License-Identifier: Apache-2.0
"""TUM RGB-D sequences: ``rgb.txt``, ``depth.txt`` and ``groundtruth.txt``, tied together by their time stamps."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from kfloc_ros.datasets.posed_images import (
    CALIBRATION_FILE,
    DepthFiles,
    PosedImage,
    PosedImages,
    pose_of_row,
    read_calibration,
)
from kfloc_ros.errors import SourceError
from kfloc_ros.files import check_count, inside, number, read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.transforms import PoseTrack, nearest_stamp

DEPTH_UNIT_M = 1 / 5000
DEPTH_TOLERANCE_NS = 20_000_000
LINES_PER_FRAME = 10
"""At most: a motion capture system tells poses more often than a camera images."""
MAX_STAMP_S = 9_000_000_000
"""About what 64 bits of nanoseconds hold."""

CAMERAS = {
    "1": Camera(640, 480, 517.3, 516.5, 318.6, 255.3, "plumb_bob", (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "2": Camera(640, 480, 520.9, 521.0, 325.1, 249.7, "plumb_bob", (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    "3": Camera(640, 480, 535.4, 539.2, 320.1, 247.6),
}
"""The three cameras of the benchmark as its authors published them; a folder's name says which one it is."""


class TumSequence(PosedImages):
    """One sequence. The poses are the colour camera's; they are interpolated at the images' stamps.

    The camera is that of ``camera.txt`` (:func:`~kfloc_ros.datasets.posed_images.read_calibration`) or, without that
    file, the benchmark's own by ``freiburg1``, ``freiburg2`` or ``freiburg3`` in the folder's name.

    Raises:
        SourceError: a list is missing or damaged, or the camera is not known.
    """

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        camera = _camera(root)
        depths = sorted(_read_files(root, "depth.txt")) if depth and (root / "depth.txt").is_file() else []
        depth_stamps = [stamp for stamp, _ in depths]
        track = _read_track(root / "groundtruth.txt") if (root / "groundtruth.txt").is_file() else PoseTrack([], [])
        images = []
        for stamp, path in sorted(_read_files(root, "rgb.txt")):
            match = nearest_stamp(depth_stamps, stamp, DEPTH_TOLERANCE_NS)
            depth_path = None if match is None else depths[match][1]
            images.append(PosedImage(path, path.stem, stamp, camera, track.at(stamp), depth_path))
        super().__init__(root.resolve().name, images, depth=DepthFiles(DEPTH_UNIT_M) if depth else None)


def _camera(root: Path) -> Camera:
    path = root / CALIBRATION_FILE
    if path.is_file():
        return read_calibration(path)
    match = re.search(r"(?:freiburg|fr)([123])", root.resolve().name)
    if match is None:
        raise SourceError(
            f"The camera of '{root}' is not known: its name has no freiburg1, freiburg2 or freiburg3. "
            f"Put a file {CALIBRATION_FILE} with 'width height fx fy cx cy' and the distortion there."
        )
    return CAMERAS[match[1]]


def _rows(path: Path) -> list[list[str]]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
    check_count(len(lines) // LINES_PER_FRAME, path)
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def _stamp_ns(text: str, path: Path) -> int:
    try:
        seconds = Decimal(text)
        if not seconds.is_finite() or abs(seconds) > MAX_STAMP_S:
            raise ValueError("no time")
        return int(seconds * 1_000_000_000)  # a double would round stamps of today to a quarter microsecond
    except (ArithmeticError, ValueError) as error:
        raise SourceError(f"'{path}' has a line that does not begin with a time: {text[:60]!r}.") from error


def _read_files(root: Path, name: str) -> list[tuple[int, Path]]:
    path = root / name
    rows = _rows(path)
    check_count(len(rows), path)
    if any(len(row) < 2 for row in rows):
        raise SourceError(f"'{path}' has a line that is not 'timestamp filename'.")
    return [(_stamp_ns(row[0], path), inside(root, row[1])) for row in rows]


def _read_track(path: Path) -> PoseTrack:
    stamps, poses = [], []
    for row in _rows(path):
        try:
            x, y, z, *xyzw = (number(word) for word in row[1:8])
            pose = pose_of_row((x, y, z), xyzw)
        except ValueError as error:
            raise SourceError(f"'{path}' has a line that is not 'timestamp tx ty tz qx qy qz qw': {row}.") from error
        stamp = _stamp_ns(row[0], path)
        if pose is not None:  # between its neighbours the track says nothing if they are too far apart
            stamps.append(stamp)
            poses.append(pose)
    return PoseTrack(stamps, poses)
