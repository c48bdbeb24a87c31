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
            self._path = Path(parameters.node.pose_file).expanduser()
        except (RuntimeError, ValueError):
            health.warn(f"The last pose is not saved: pose_file '{parameters.node.pose_file}' names an unknown user.")
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
                self._path.unlink(missing_ok=True)
            except OSError as error:
                self._health.warn(f"The last pose in '{self._path}' cannot be removed: {error.strerror}.")

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
_MAX_BYTES = 100_000
_MAX_ROTATION_ERROR = 1e-4


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


def map_id(scene_map: MapInfo) -> str:
    """Return the name and checksum of a map: a saved pose is valid only in the same build of the same map."""
    description = scene_map.path / DESCRIPTION if scene_map.path is not None else None
    content = description.read_bytes() if description is not None and description.is_file() else b""
    return f"{scene_map.name} {hashlib.sha256(content).hexdigest()[:16]}"


def save_pose(path: Path, pose: SavedPose) -> None:
    """Replace the file atomically.

    Raises:
        PoseFileError: the file cannot be written; an older file stays intact.
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
        if path.exists() and not path.is_file():
            raise PoseFileError(f"The last pose cannot be saved in '{path}': it is not a regular file.")
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
        saved = SavedPose(expected_map_id, int(values["stamp_ns"]), T, covariance)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PoseFileError(f"The last pose in '{path}' is damaged: {error}.") from error
    if not _is_sound(T, covariance):
        raise PoseFileError(f"The last pose in '{path}' is damaged: it is not a rigid pose with a covariance.")
    return saved


def _is_sound(T: Matrix, covariance: Matrix) -> bool:
    if T.shape != (4, 4) or covariance.shape != (6, 6):
        return False
    if not (np.isfinite(T).all() and np.isfinite(covariance).all()) or not np.array_equal(T[3], [0, 0, 0, 1]):
        return False
    R = T[:3, :3]
    rigid = np.abs(R @ R.T - np.eye(3)).max() < _MAX_ROTATION_ERROR and np.linalg.det(R) > 0
    return bool(rigid and (np.diagonal(covariance) >= 0).all())
