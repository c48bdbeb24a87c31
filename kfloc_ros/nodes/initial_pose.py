# SPDX-License-Identifier: Apache-2.0
"""Initial pose from a user: validated, completed if it is flat, and sampled over its uncertainty."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.node import Node

from kfloc_ros.errors import KflocError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.messages.poses import pose_from_message, stamp_to_ns
from kfloc_ros.messages.transforms import NEWEST, TransformUnknownError
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_publisher import LastPose, travelled
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.types import Matrix

OPTICAL_TO_BODY = make_pose([[0, -1, 0], [0, 0, -1], [1, 0, 0]], np.zeros(3))
"""``T_camera_body`` of a body frame (x forward, y left, z up, REP-103) at the camera's position."""

_UNIT_TOLERANCE = 1e-2
_MAX_SIGMA_M, _MAX_SIGMA_RAD = 1.0, math.radians(30)
"""Limits of the sampled sigma: alignment converges from about 0.5 m and 15 deg, so three starts per axis cover no more
than this.
"""


class InitialPoseError(KflocError):
    """Error: an initial pose cannot be used."""


@dataclass(frozen=True, eq=False)
class InitialPose:
    """Pose of the base frame in ``frame_id``, as given by a user."""

    frame_id: str
    stamp_ns: int
    T_frame_base: Matrix
    covariance: Matrix
    """6x6, in the order of ``PoseWithCovariance``; zeros if not given."""

    @property
    def is_flat(self) -> bool:
        """True if the pose is on the ground plane and turned about the vertical axis only, as one drawn with a
        mouse.
        """
        return bool(abs(self.T_frame_base[2, 3]) < 1e-9 and abs(self.T_frame_base[2, 2] - 1.0) < 1e-9)


def read_initial_pose(message: Any) -> InitialPose:
    """Validate a ``geometry_msgs/PoseWithCovarianceStamped``.

    Raises:
        InitialPoseError: the frame is empty, or the pose or covariance is invalid.
    """
    frame_id = message.header.frame_id.lstrip("/")
    if not frame_id:
        raise InitialPoseError("An initial pose was refused: its header has no frame_id.")
    q = message.pose.pose.orientation
    length = math.hypot(q.x, q.y, q.z, q.w)
    if not abs(length - 1.0) < _UNIT_TOLERANCE:
        raise InitialPoseError(f"An initial pose was refused: its quaternion has the norm {length:.3g}, not 1.")
    covariance = np.array(message.pose.covariance, dtype=np.float64).reshape(6, 6)
    if not np.isfinite(covariance).all() or (np.diagonal(covariance) < 0).any():
        raise InitialPoseError(
            "An initial pose was refused: its covariance has values that are not finite, or negative variances."
        )
    try:
        T = pose_from_message(message.pose.pose)
    except ValueError as error:
        raise InitialPoseError(f"An initial pose was refused: {error}") from error
    return InitialPose(frame_id, stamp_to_ns(message.header.stamp), T, covariance)


def completed(T_map_flat: Matrix, known: Matrix) -> Matrix:
    """Return a flat pose (4, 4) with height, roll and pitch of a known pose (4, 4)."""
    turn = so3_exp([0.0, 0.0, _yaw(T_map_flat) - _yaw(known)])
    return make_pose(turn @ known[:3, :3], [T_map_flat[0, 3], T_map_flat[1, 3], known[2, 3]])


def nearest(T_map_flat: Matrix, candidates: Matrix) -> Matrix:
    """Return the candidate (N, 4, 4) that is nearest on the ground; a rotation of 180 deg counts as 3 m."""
    away_m = np.linalg.norm(candidates[:, :2, 3] - T_map_flat[:2, 3], axis=1)
    turns = np.array([_yaw(candidate) - _yaw(T_map_flat) for candidate in candidates])
    away_rad = np.abs(np.arctan2(np.sin(turns), np.cos(turns)))
    return np.asarray(candidates[int(np.argmin(away_m + away_rad * 3.0 / np.pi))])


def spread(T_map_base: Matrix, covariance: Matrix) -> list[Matrix]:
    """Return start poses: the given pose first, then one sigma to either side along x, y and yaw."""
    sigma = np.sqrt(np.diagonal(covariance))
    x, y = (min(float(s), _MAX_SIGMA_M) for s in sigma[:2])
    yaw = min(float(sigma[5]), _MAX_SIGMA_RAD)
    axes = [sorted({0.0, s, -s}, key=abs) for s in (x, y, yaw)]
    poses = []
    for dx, dy, turn in itertools.product(*axes):
        moved = T_map_base.copy()
        moved[:3, :3] = so3_exp([0.0, 0.0, turn]) @ T_map_base[:3, :3]
        moved[:2, 3] += dx, dy
        poses.append(moved)
    return poses


def _yaw(T: Matrix) -> float:
    return math.atan2(T[1, 0], T[0, 0])


_MAX_TRIES = 10
"""Number of images that try an initial pose before it is discarded."""


@dataclass(frozen=True, eq=False)
class _Body:
    """Frame of an initial pose: the base frame, or the camera if no base frame is set."""

    frame: str
    T_camera_body: Matrix


class InitialPoseInput:
    """Subscriber of ``initialpose`` that holds the last pose until a frame can use it, in every lifecycle state.

    Args:
        reference_poses: ``T_map_camera`` (N, 4, 4) of the map's views, for the height of a first flat pose.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        reference_poses: Matrix,
        listener: TransformListener,
        health: Health,
    ) -> None:
        self._parameters, self._map_frame, self._references = parameters, map_frame.lstrip("/"), reference_poses
        self._listener, self._health, self._logger = listener, health, node.get_logger()
        self.waiting: InitialPose | None = None
        self.tried: InitialPose | None = None
        self._tries = 0
        profile = qos.results(1, parameters.node.initialpose_reliability)
        events = qos.on_mismatch(node.resolve_topic_name("initialpose"), "initialpose_reliability", health.warn)
        node.create_subscription(
            PoseWithCovarianceStamped, "initialpose", self._on_pose, profile, event_callbacks=events
        )

    def take(self, camera_frame: str, stamp_ns: int, last: LastPose | None) -> list[Matrix]:
        """Return start poses ``T_map_camera`` for a frame; empty if there are none. Worker thread only.

        Args:
            camera_frame: TF frame of the camera.
            stamp_ns: stamp of the frame; odometry, if known, moves the base there from the stamp of the pose.
            last: the last known pose, which completes a flat one.
        """
        given, self.waiting = self.waiting, None
        if given is None:
            return []
        self._tries = self._tries + 1 if given is self.tried else 1
        self.tried = given
        base_frame = self._parameters.node.base_frame
        try:
            body = self._body(given, camera_frame, base_frame)
        except TransformUnknownError as error:
            self.waiting = given  # for the next frame
            self._health.warn(f"The initial pose has to wait. {error}")
            return []
        T_map_body = given.T_frame_base
        if given.is_flat:
            same = last is not None and last.base_frame == body.frame and bool(base_frame)
            known = last.body.T_map_body if same and last is not None else self._nearest_view(T_map_body, body)
            T_map_body = completed(T_map_body, known)
        starts = spread(T_map_body, given.covariance)
        moved = self._moved_since(given, body.frame, stamp_ns)
        T_body_camera = inverse_pose(body.T_camera_body)
        return [start @ moved @ T_body_camera for start in starts]

    def judge(self, found: bool) -> None:
        """Record whether the frame localized from the last taken pose; if not, the next frame tries it again."""
        if self.tried is None:
            return
        if found or self._tries >= _MAX_TRIES:
            if not found:
                self._health.warn(f"The initial pose did not help: {self._tries} images do not match the map there.")
            self.tried = None
        elif self.waiting is None:
            self.waiting = self.tried

    def _on_pose(self, message: Any) -> None:
        try:
            self.waiting = self._in_map(read_initial_pose(message))
        except (InitialPoseError, TransformUnknownError) as error:
            self._health.warn(str(error))
            return
        x, y, z = self.waiting.T_frame_base[:3, 3]
        self._logger.info(
            f"Initial pose at ({x:.2f}, {y:.2f}, {z:.2f}) in '{self._map_frame}': the next image tries it."
        )

    def _in_map(self, given: InitialPose) -> InitialPose:
        if given.frame_id == self._map_frame:
            return given
        try:
            T = self._listener.lookup(self._map_frame, given.frame_id, NEWEST)
        except TransformUnknownError as error:
            raise InitialPoseError(
                f"An initial pose was refused: it is in the frame '{given.frame_id}', the map is '{self._map_frame}', "
                f"and TF does not connect the two. {error}"
            ) from error
        return InitialPose(self._map_frame, given.stamp_ns, T @ given.T_frame_base, given.covariance)

    def _body(self, given: InitialPose, camera_frame: str, base_frame: str) -> _Body:
        if base_frame and base_frame != camera_frame:
            return _Body(base_frame, self._listener.lookup(camera_frame, base_frame, NEWEST))
        # A flat pose (an arrow in RViz) points along the viewing direction; a full pose is an optical frame, as
        # published.
        return _Body(camera_frame, OPTICAL_TO_BODY if given.is_flat else np.eye(4))

    def _nearest_view(self, T_map_flat: Matrix, body: _Body) -> Matrix:
        return nearest(T_map_flat, self._references @ body.T_camera_body)

    def _moved_since(self, given: InitialPose, body_frame: str, stamp_ns: int) -> Matrix:
        if given.stamp_ns == 0 or self._parameters.node.tf_mode != "map_to_odom":
            return np.eye(4)
        T = travelled(self._listener, self._parameters.node.odom_frame, body_frame, given.stamp_ns, stamp_ns)
        return np.eye(4) if T is None else T
