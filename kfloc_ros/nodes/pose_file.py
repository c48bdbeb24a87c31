# SPDX-License-Identifier: Apache-2.0
"""Pose persistence: saves the last pose to a file and returns it as a start pose after a restart."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rclpy.node import Node

from kfloc_ros.errors import KflocError
from kfloc_ros.maps.format import DESCRIPTION
from kfloc_ros.maps.place import MapInfo
from kfloc_ros.messages.poses import MAX_COORDINATE_M
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.initial_pose import spread
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import LatestWorker
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState

_MAX_TRIES = 10
"""Number of images that try the saved pose."""


class PosePersistence:
    """Saved pose of a node; inactive if ``pose_file`` is empty. File errors are logged and never end the node."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: MapInfo, health: Health) -> None:
        self._parameters, self._health = parameters, health
        self._saved_s = 0.0
        self._last: SavedPose | None = None
        self._path: Path | None = None
        self._starts: list[Matrix] = []
        self._tries_left = _MAX_TRIES
        if not parameters.node.pose_file:
            return
        try:
            self._path = pose_path(parameters.node.pose_file)
        except PoseFileError as error:
            health.warn(f"The last pose is not saved. {error}")
            return
        self._map_id = map_id(scene_map)
        # Disk writes can be slow: neither a frame nor a callback waits for them.
        self._writer = LatestWorker("pose file", self._write, lambda error: health.warn(str(error)))
        try:
            saved = load_pose(self._path, self._map_id)
        except PoseFileError as error:
            health.warn(str(error))
            return
        if saved is not None:
            node.get_logger().info(f"The search starts at the saved pose from '{self._path}'.")
            self._starts = spread(saved.T_map_camera, saved.covariance)

    def take(self) -> list[Matrix]:
        """Return start poses ``T_map_camera``, for the first few frames or until one is localized."""
        self._tries_left -= 1
        return self._starts if self._tries_left >= 0 else []

    def offer(self, estimate: PoseEstimate) -> None:
        """Save a TRACKING pose, at most once per ``pose_file_period_s``."""
        if estimate.T_map_camera is not None:
            self._starts = []
        if self._path is None or estimate.state is not TrackingState.TRACKING:
            return
        if estimate.T_map_camera is None or estimate.covariance is None:
            return
        self._last = SavedPose(self._map_id, estimate.stamp_ns, estimate.T_map_camera, estimate.covariance)
        now_s = time.monotonic()
        if now_s - self._saved_s >= self._parameters.node.pose_file_period_s:
            self._saved_s = now_s
            self._writer.submit(self._last)

    def delete(self) -> None:
        """Discard the last pose and remove the file, so that the next start does not use it."""
        self._last, self._starts = None, []
        if self._path is not None:
            try:
                delete_pose(self._path)
            except PoseFileError as error:
                self._health.warn(str(error))

    def stop(self) -> None:
        """Save the last pose and end the writer's thread."""
        if self._path is None:
            return
        self._writer.stop()
        if self._last is not None:
            try:
                self._write(self._last)
            except PoseFileError as error:
                self._health.warn(str(error))

    def _write(self, pose: SavedPose) -> None:
        if self._path is not None:
            save_pose(self._path, pose)


FORMAT = "kfloc_pose"
VERSION = 1
_FIRST_BYTES = f'{{"format": "{FORMAT}"'.encode()
_MAX_BYTES = 100_000
_MAX_ROTATION_ERROR = 1e-4
_MAX_SIGMA_M = MAX_COORDINATE_M
_LAST_STAMP_NS = 2**63 - 1


class PoseFileError(KflocError):
    """Error: a pose file cannot be written or its content cannot be used."""


@dataclass(frozen=True, eq=False)
class SavedPose:
    """Pose of the camera in a map."""

    map_id: str
    """See :func:`map_id`."""
    stamp_ns: int
    T_map_camera: Matrix
    covariance: Matrix


def pose_path(pose_file: str) -> Path:
    """Return the path that the parameter ``pose_file`` names.

    Raises:
        PoseFileError: it begins with an unknown ``~user``.
    """
    try:
        return Path(pose_file).expanduser()
    except (RuntimeError, ValueError) as error:
        raise PoseFileError(f"pose_file '{pose_file}' names an unknown user.") from error


def map_id(scene_map: MapInfo) -> str:
    """Return the name and checksum of a map: a saved pose is valid only in the same build of the same map."""
    description = scene_map.path / DESCRIPTION if scene_map.path is not None else None
    content = description.read_bytes() if description is not None and description.is_file() else b""
    return f"{scene_map.name} {hashlib.sha256(content).hexdigest()[:16]}"


def save_pose(path: Path, pose: SavedPose) -> None:
    """Replace the file atomically.

    Raises:
        PoseFileError: the file cannot be written, or it exists and is not a pose file; it stays intact.
    """
    values = {
        "format": FORMAT,
        "version": VERSION,
        "map": pose.map_id,
        "stamp_ns": pose.stamp_ns,
        "T_map_camera": pose.T_map_camera.tolist(),
        "covariance": pose.covariance.tolist(),
    }
    temporary: str | None = None
    try:
        check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(values, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        why = getattr(error, "strerror", None) or error
        raise PoseFileError(f"The last pose cannot be saved in '{path}': {why}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def delete_pose(path: Path) -> None:
    """Remove a pose file, if there is one.

    Raises:
        PoseFileError: the file cannot be removed, or it is not a pose file; it stays intact.
    """
    check_replaceable(path)
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PoseFileError(f"The last pose in '{path}' cannot be removed: {why}.") from error


def check_replaceable(path: Path) -> None:
    """Check that saving a pose destroys nothing else: there is no file, an empty one, or a pose file.

    Anyone in the ROS domain may set ``pose_file``, and the node writes with its user's rights.

    Raises:
        PoseFileError: the path names anything else, or cannot be read.
    """
    try:
        if not path.exists():
            return
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(_MAX_BYTES + 1)
            if not start or _is_pose_file(start):
                return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PoseFileError(f"The pose file '{path}' cannot be read: {why}.") from error
    raise PoseFileError(f"'{path}' is not a pose file and is not replaced or removed; name another pose_file.")


def _is_pose_file(start: bytes) -> bool:
    """Return True for a pose file of any version, also a damaged one."""
    if start.startswith(_FIRST_BYTES):
        return True
    try:
        values = json.loads(start) if len(start) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def load_pose(path: Path, expected_map_id: str) -> SavedPose | None:
    """Return the pose in a file; None if there is no file.

    Raises:
        PoseFileError: the file is damaged or belongs to another map.
    """
    try:
        if not path.is_file() and path.exists():
            raise PoseFileError(f"'{path}' is not a regular file; no pose is read from it.")
        if path.stat().st_size > _MAX_BYTES:
            raise PoseFileError(f"'{path}' is larger than any pose file; it is not used.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise PoseFileError(
            f"The last pose in '{path}' cannot be read: {error}. The search starts without it."
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise PoseFileError(f"'{path}' is not a pose file of this version; it is not used.")
    if values.get("map") != expected_map_id:
        raise PoseFileError(f"The last pose in '{path}' belongs to another map, or to an earlier build of this one.")
    try:
        T = np.array(values["T_map_camera"], dtype=np.float64)
        covariance = np.array(values["covariance"], dtype=np.float64)
        stamp_ns = values["stamp_ns"]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PoseFileError(f"The last pose in '{path}' is damaged: {error}.") from error
    fault = _pose_fault(T) or _covariance_fault(covariance)
    if type(stamp_ns) is not int or not 0 < stamp_ns <= _LAST_STAMP_NS:
        fault = "its stamp is not a time in nanoseconds"
    if fault:
        raise PoseFileError(f"The last pose in '{path}' is damaged: {fault}. The search starts without it.")
    return SavedPose(expected_map_id, stamp_ns, T, covariance)


def _pose_fault(T: Matrix) -> str:
    """Return the reason why a matrix is not a rigid pose on Earth; empty if it is."""
    if T.shape != (4, 4) or not np.isfinite(T).all() or not np.array_equal(T[3], [0, 0, 0, 1]):
        return "it is not a finite 4x4 pose"
    if np.abs(T[:3, 3]).max() > MAX_COORDINATE_M:
        return f"its position is more than {MAX_COORDINATE_M:g} m from the map's origin"
    R = T[:3, :3]
    if not (np.abs(R).max() < 2.0 and np.abs(R @ R.T - np.eye(3)).max() < _MAX_ROTATION_ERROR and np.linalg.det(R) > 0):
        return "its rotation is not rigid"
    return ""


def _covariance_fault(covariance: Matrix) -> str:
    """Return the reason why a matrix is not a covariance of a pose; empty if it is."""
    if covariance.shape != (6, 6) or not np.isfinite(covariance).all():
        return "its covariance is not a finite 6x6 matrix"
    largest = np.abs(covariance).max()
    if largest > _MAX_SIGMA_M**2:
        return f"its covariance has a standard deviation above {_MAX_SIGMA_M:g}"
    rounding = 1e-6 * largest
    if np.abs(covariance - covariance.T).max() > rounding or np.linalg.eigvalsh(covariance)[0] < -rounding:
        return "its covariance is not symmetric and positive"
    return ""
