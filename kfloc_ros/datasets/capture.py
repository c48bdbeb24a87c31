# SPDX-License-Identifier: Apache-2.0
"""Recordings listed in comma-separated files: Capture sessions of LaMAR and CroCoDL, and EuRoC MAV sequences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.bags.truth import other_times
from kfloc_ros.datasets.posed_images import DepthFiles, PosedImage, PosedImages, pose_of_row, usable_pose
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import check_count, inside, number, read_text, read_yaml
from kfloc_ros.geometry.camera import Camera, known_coefficients
from kfloc_ros.geometry.colmap import camera_from_parameters
from kfloc_ros.messages.transforms import PoseTrack
from kfloc_ros.types import Matrix

DATA, ALIGNED = "raw_data", "proc/alignment_trajectories.txt"
DEPTH_UNIT_M = 0.001
STAMP_NS = 1000
"""Stamps are whole microseconds."""


class CaptureSession(PosedImages):
    """Images of one camera of a session, ``LOCATION/sessions/NAME``, named ``stamp/camera`` as in results.

    Poses are those of ``proc/alignment_trajectories.txt`` (in the location's frame), else of ``trajectories.txt``: of
    the camera itself, or of a rig that ``rigs.txt`` says it belongs to. ``queries.txt``, if there, has the images that
    the benchmark asks for; ``@queries`` after the path selects them. ``depths.txt`` is read for depth of the same
    stamp and camera.

    Args:
        root: folder of the session.
        sensor: identifier of the camera; needed if there are several with images.
        queries: only the images that ``queries.txt`` lists.
        depth: read depth images.

    Raises:
        SourceError: a list is missing or damaged, there are no images, or there are several cameras and none is named.
    """

    def __init__(self, root: Path, sensor: str = "", *, queries: bool = False, depth: bool = True) -> None:
        cameras = _cameras(root / "sensors.txt")
        records = [
            (_stamp(row[0], root / "images.txt"), row[1], row[2]) for row in rows_of(root / "images.txt", 3)
            if row[1] in cameras
        ]  # fmt: skip
        seen = sorted({camera for _, camera, _ in records})
        if not seen:
            raise SourceError(f"'{root}' has no images of a camera that sensors.txt lists.")
        if sensor not in seen:
            if sensor or len(seen) > 1:
                raise SourceError(
                    f"'{root}' has images of the cameras {', '.join(seen)}; name one: capture:{root}?sensor={seen[0]}."
                )
            sensor = seen[0]
        wanted = None
        if queries:
            path = root / "queries.txt"
            wanted = {(_stamp(row[0], path), row[1]) for row in rows_of(path, 2)}
        poses = _poses(root, sensor)
        depths = {}
        if depth and (root / "depths.txt").is_file():
            path = root / "depths.txt"
            depths = {_stamp(row[0], path): row[2] for row in rows_of(path, 3) if row[1] == sensor}
        images = [
            PosedImage(
                inside(root / DATA, name),
                f"{stamp}/{sensor}",
                stamp * STAMP_NS,
                cameras[sensor],
                poses.get(stamp),
                inside(root / DATA, depths[stamp]) if stamp in depths else None,
            )
            for stamp, camera, name in sorted(records)
            if camera == sensor and (wanted is None or (stamp, camera) in wanted)
        ]
        super().__init__(f"{root.resolve().name}/{sensor}", images, depth=DepthFiles(DEPTH_UNIT_M) if depth else None)


def rows_of(path: Path, at_least: int) -> list[list[str]]:
    """Return the fields of a comma-separated list; lines that begin with ``#`` are passed over.

    Raises:
        SourceError: it cannot be read, or a line has fewer fields.
    """
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    if short := next((row for row in rows if len(row) < at_least), None):
        raise SourceError(f"'{path}' has a line with fewer than {at_least} fields: {', '.join(short)!r}.")
    return rows


def pose_of_words(words: list[str], path: Path) -> Matrix | None:
    """Return the pose of ``qw qx qy qz tx ty tz``; None where a number is not finite.

    Raises:
        SourceError: they are no pose.
    """
    try:
        w, x, y, z, *translation = (number(word) for word in words[:7])
        return pose_of_row(translation, (x, y, z, w))
    except ValueError as error:
        raise SourceError(f"'{path}' has a pose that is not 'qw, qx, qy, qz, tx, ty, tz': {words[:7]}.") from error


def stamp_of_word(word: str, most: int, fault: str) -> int:
    """Return a whole number of at most so much; Python reads other alphabets' digits, and superscripts as digits."""
    if not re.fullmatch("[0-9]{1,19}", word) or int(word) > most:
        raise SourceError(f"{fault}: {word[:40]!r}.")
    return int(word)


def _stamp(word: str, path: Path) -> int:
    return stamp_of_word(word, 9 * 10**15, f"'{path}' has a stamp that is no whole number of microseconds")


def _cameras(path: Path) -> dict[str, Camera]:
    found = {}
    for row in rows_of(path, 3):
        if row[2] != "camera":
            continue
        try:
            width, height = int(float(row[4])), int(float(row[5]))
            found[row[0]] = camera_from_parameters(row[3], width, height, [float(word) for word in row[6:]])
        except (IndexError, ArithmeticError, ValueError, FrameError) as error:
            raise SourceError(f"The camera '{row[0]}' in '{path}' cannot be used: {error}") from error
    return found


def _poses(root: Path, sensor: str) -> dict[int, Matrix]:
    """Return the poses of a camera by stamp; empty if the session has none."""
    path = next((path for path in (root / ALIGNED, root / "trajectories.txt") if path.is_file()), None)
    if path is None:
        return {}
    mounts: dict[str, Matrix] = {sensor: np.eye(4)}
    if (root / "rigs.txt").is_file():
        for row in rows_of(root / "rigs.txt", 9):
            if row[1] == sensor and (T_rig_camera := pose_of_words(row[2:], root / "rigs.txt")) is not None:
                mounts[row[0]] = T_rig_camera
    rows = rows_of(path, 9)
    check_count(len(rows) // 20, path)
    found: dict[int, Matrix] = {}
    for row in rows:
        mount = mounts.get(row[1])
        pose = None if mount is None else pose_of_words(row[2:], path)
        if mount is not None and pose is not None:
            found[_stamp(row[0], path)] = pose @ mount
    return found


MODELS = {"radial-tangential": "plumb_bob", "radtan": "plumb_bob", "equidistant": "equidistant"}
TRUTH = "state_groundtruth_estimate0"
ROWS_PER_FRAME = 20


class EurocSequence(PosedImages):
    """Images of one camera of a sequence.

    Poses are those of the body in ``state_groundtruth_estimate0/data.csv``, interpolated at the images' stamps, moved
    to the camera by ``T_BS`` of its ``sensor.yaml``.

    Args:
        root: folder with ``mav0``, or ``mav0`` itself.
        camera: name of the camera's folder.

    Raises:
        SourceError: a file is missing or damaged.
    """

    def __init__(self, root: Path, camera: str = "cam0") -> None:
        base = root / "mav0" if (root / "mav0").is_dir() else root
        folder = base / camera
        calibration, T_body_camera = _sensor(folder / "sensor.yaml")
        rows = rows_of(folder / "data.csv", 2)
        check_count(len(rows), folder / "data.csv")
        track = _track(base / TRUTH / "data.csv", T_body_camera)
        files = sorted((_stamp_ns(row[0], folder / "data.csv"), row[1]) for row in rows)
        truth = f"The poses in '{base / TRUTH / 'data.csv'}'"
        if sentence := other_times(truth, track.span_ns if len(track) else (), [stamp_ns for stamp_ns, _ in files]):
            raise SourceError(sentence)
        images = []
        for stamp_ns, name in files:
            path = inside(folder / "data", name)
            images.append(PosedImage(path, path.stem, stamp_ns, calibration, track.at(stamp_ns)))
        super().__init__(f"{base.resolve().parent.name}/{camera}", images)


def _stamp_ns(word: str, path: Path) -> int:
    return stamp_of_word(word, 9 * 10**18, f"'{path}' has a stamp that is no whole number of nanoseconds")


def _sensor(path: Path) -> tuple[Camera, Matrix]:
    """Return camera and ``T_body_camera`` of a ``sensor.yaml``."""
    try:
        found: Any = read_yaml(path)
        width, height = (int(value) for value in found["resolution"])
        fx, fy, cx, cy = (float(value) for value in found["intrinsics"])
        model = str(found["distortion_model"])
        if model not in MODELS:
            raise ValueError(f"the distortion model '{model}' is not one of {', '.join(MODELS)}")
        values = [float(value) for value in found["distortion_coefficients"]]
        T = usable_pose(np.array([float(value) for value in found["T_BS"]["data"]]).reshape(4, 4))
        if T is None or not np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-3):
            raise ValueError("T_BS is no pose")
        return Camera(width, height, fx, fy, cx, cy, MODELS[model], known_coefficients(MODELS[model], values)), T
    except (OSError, KeyError, TypeError, ArithmeticError, ValueError, FrameError) as error:
        detail = " ".join(str(error).split())[:200]
        raise SourceError(f"'{path}' is no description of a EuRoC camera: {detail}") from error


def _track(path: Path, T_body_camera: Matrix) -> PoseTrack:
    if not path.is_file():
        return PoseTrack()
    rows = rows_of(path, 8)
    check_count(len(rows) // ROWS_PER_FRAME, path)
    stamps, poses = [], []
    for row in rows:
        pose = pose_of_words([*row[4:8], *row[1:4]], path)
        if pose is not None:
            stamps.append(_stamp_ns(row[0], path))
            poses.append(pose @ T_body_camera)
    return PoseTrack(stamps, poses)
