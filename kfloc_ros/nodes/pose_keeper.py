# SPDX-License-Identifier: Apache-2.0
"""Saves the last pose now and then, and offers the one of the last time at the start."""

from __future__ import annotations

import time
from pathlib import Path

from rclpy.node import Node

from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.initial_pose import spread
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_file import PoseFileError, SavedPose, load_pose, map_id, save_pose
from kfloc_ros.nodes.worker import LatestWorker
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState

_MAX_TRIES = 10
"""Images that try the saved pose."""


class PoseKeeper:
    """Does nothing where ``pose_file`` is empty; what goes wrong with the file is said and never ends anything."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: MapOutline, health: Health) -> None:
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
            health.warn(f"The last pose is not saved: there is no user as in pose_file '{parameters.node.pose_file}'.")
            return
        self._map_id = map_id(scene_map)
        # A disk can take its time: neither a frame nor a callback waits for it.
        self._writer = LatestWorker("pose file", self._write, lambda error: health.warn(str(error)))
        try:
            saved = load_pose(self._path, self._map_id)
        except PoseFileError as error:
            health.warn(str(error))
            return
        if saved is not None:
            node.get_logger().info(f"The search begins at the last pose, from '{self._path}'.")
            self._starts = spread(saved.T_map_camera, saved.covariance)

    def take(self) -> list[Matrix]:
        """Poses ``T_map_camera`` that a frame may start from, for the first few frames or until one has a pose."""
        self._tries_left -= 1
        return self._starts if self._tries_left >= 0 else []

    def offer(self, estimate: PoseEstimate) -> None:
        """Save a good pose, unless one was saved a moment ago."""
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

    def forget(self) -> None:
        """Remove the file, too: the next start shall know nothing."""
        self._last, self._starts = None, []
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                self._health.warn(f"The last pose in '{self._path}' cannot be removed: {error.strerror}.")

    def stop(self) -> None:
        """Save the very last pose."""
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
