# SPDX-License-Identifier: Apache-2.0
"""TUM RGB-D and OpenLORIS sequences: lists of images, depth images and poses, tied together by their time stamps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.bags.truth import other_times
from kfloc_ros.datasets.posed_images import (
    CALIBRATION_FILE,
    DepthFiles,
    PosedImage,
    PosedImages,
    pose_of_row,
    read_calibration,
    usable_pose,
)
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import check_count, inside, number, read_text, read_yaml
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.transforms import PoseTrack, nearest_stamp
from kfloc_ros.types import Matrix

DEPTH_UNIT_M = 1 / 5000
LORIS_DEPTH_UNIT_M = 1 / 1000
LORIS_CAMERA, LORIS_BASE = "d400_color_optical_frame", "base_link"
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
        images = _images(root, "rgb.txt", "depth.txt" if depth else "", _camera(root))
        super().__init__(root.resolve().name, images, depth=DepthFiles(DEPTH_UNIT_M) if depth else None)


class OpenLorisSequence(PosedImages):
    """One OpenLORIS-Scene sequence: ``color.txt``, ``aligned_depth.txt``, ``groundtruth.txt``.

    The camera is ``d400_color_optical_frame`` of ``sensors.yaml``. The poses are those of ``base_link``, moved to the
    camera by ``trans_matrix.yaml``.

    Raises:
        SourceError: a file is missing or damaged.
    """

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        camera = _loris_camera(root / "sensors.yaml")
        T_base_camera = _loris_mount(root / "trans_matrix.yaml")
        images = _images(root, "color.txt", "aligned_depth.txt" if depth else "", camera, T_base_camera)
        super().__init__(root.resolve().name, images, depth=DepthFiles(LORIS_DEPTH_UNIT_M) if depth else None)


def _images(
    root: Path, colors: str, depth_list: str, camera: Camera, T_body_camera: Matrix | None = None
) -> list[PosedImage]:
    """Return the images of a list, with the nearest depth image and the pose at each stamp."""
    depths = sorted(_read_files(root, depth_list)) if depth_list and (root / depth_list).is_file() else []
    depth_stamps = [stamp for stamp, _ in depths]
    path = root / "groundtruth.txt"
    track = _read_track(path, T_body_camera) if path.is_file() else PoseTrack([], [])
    files = sorted(_read_files(root, colors))
    stamps = [stamp for stamp, _ in files]
    for what, times in ((f"The poses in '{path}'", track.span_ns if len(track) else ()),
                        (f"The depth images in '{root / depth_list}'", depth_stamps)):  # fmt: skip
        if sentence := other_times(what, times, stamps):
            raise SourceError(sentence)
    images = []
    for stamp, path in files:
        match = nearest_stamp(depth_stamps, stamp, DEPTH_TOLERANCE_NS)
        depth_path = None if match is None else depths[match][1]
        images.append(PosedImage(path, path.stem, stamp, camera, track.at(stamp), depth_path))
    return images


def _loris_yaml(path: Path) -> Mapping[str, Any]:
    try:
        found = read_yaml(path)
        if not isinstance(found, dict):
            raise ValueError("it holds no names")
        return found
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' is no YAML of OpenLORIS: {' '.join(str(error).split())[:200]}.") from error


def _loris_camera(path: Path) -> Camera:
    node = _loris_yaml(path).get(LORIS_CAMERA)
    if node is None:
        raise SourceError(f"'{path}' does not describe the camera '{LORIS_CAMERA}'.")
    try:
        fx, cx, fy, cy = (float(value) for value in node["intrinsics"]["data"])  # in this order
        return Camera(int(node["width"]), int(node["height"]), fx, fy, cx, cy)
    except (KeyError, TypeError, ArithmeticError, ValueError, FrameError) as error:
        raise SourceError(f"The camera '{LORIS_CAMERA}' in '{path}' cannot be used: {error}.") from error


def _loris_mount(path: Path) -> Matrix:
    """Return ``T_base_camera`` along the chain of transforms from ``base_link`` to the camera."""
    edges: dict[str, tuple[str, Matrix]] = {}
    try:
        for item in _loris_yaml(path)["trans_matrix"]:
            T = usable_pose(np.array([float(value) for value in item["matrix"]["data"]]).reshape(4, 4))
            if T is None:
                raise ValueError("a matrix is no pose")
            edges[str(item["child_frame"])] = (str(item["parent_frame"]), T)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"'{path}' does not hold a list trans_matrix of transforms: {error}.") from error
    T_found, frame = np.eye(4), LORIS_CAMERA
    for _ in range(len(edges) + 1):
        if frame == LORIS_BASE:
            return np.asarray(T_found)
        if frame not in edges:
            break
        frame, T = edges[frame]
        T_found = T @ T_found
    raise SourceError(f"'{path}' does not connect '{LORIS_BASE}' with '{LORIS_CAMERA}'.")


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


def _read_track(path: Path, T_body_camera: Matrix | None = None) -> PoseTrack:
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
            poses.append(pose if T_body_camera is None else pose @ T_body_camera)
    return PoseTrack(stamps, poses)
