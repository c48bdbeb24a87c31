# SPDX-License-Identifier: Apache-2.0
"""What a user means by an initial pose: checked, completed where it is flat, and spread over its uncertainty.

Imports nothing of ROS.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfloc_ros.errors import KflocError
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.nodes.pose_messages import pose_from_message, stamp_to_ns
from kfloc_ros.types import Matrix

OPTICAL_TO_BODY = make_pose([[0, -1, 0], [0, 0, -1], [1, 0, 0]], np.zeros(3))
"""``T_camera_body`` of a body (x forward, y left, z up, after REP-103) at the camera's place."""

_UNIT_TOLERANCE = 1e-2
_MAX_SIGMA_M, _MAX_SIGMA_RAD = 1.0, math.radians(30)
"""Alignment reaches about half a metre and fifteen degrees: three starts an axis cover no more than this."""


class InitialPoseError(KflocError):
    """An initial pose cannot be used."""


@dataclass(frozen=True, eq=False)
class InitialPose:
    """A pose of the base frame as a user gave it, in ``frame_id``."""

    frame_id: str
    stamp_ns: int
    T_frame_base: Matrix
    covariance: Matrix
    """6x6, in the order of ``PoseWithCovariance``; zeros where nothing was said."""

    @property
    def is_flat(self) -> bool:
        """As drawn with a mouse: on the ground plane, turned about the vertical axis alone."""
        return bool(abs(self.T_frame_base[2, 3]) < 1e-9 and abs(self.T_frame_base[2, 2] - 1.0) < 1e-9)


def read_initial_pose(message: Any) -> InitialPose:
    """Check a ``geometry_msgs/PoseWithCovarianceStamped``.

    Raises:
        InitialPoseError: it has no frame, or its pose or covariance is no pose or covariance.
    """
    frame_id = message.header.frame_id.lstrip("/")
    if not frame_id:
        raise InitialPoseError("An initial pose was refused: its header names no frame.")
    q = message.pose.pose.orientation
    length = math.hypot(q.x, q.y, q.z, q.w)
    if not abs(length - 1.0) < _UNIT_TOLERANCE:
        raise InitialPoseError(f"An initial pose was refused: its quaternion has the length {length:.3g}, not 1.")
    covariance = np.array(message.pose.covariance, dtype=np.float64).reshape(6, 6)
    if not np.isfinite(covariance).all() or (np.diagonal(covariance) < 0).any():
        raise InitialPoseError("An initial pose was refused: its covariance has values that no covariance has.")
    try:
        T = pose_from_message(message.pose.pose)
    except ValueError as error:
        raise InitialPoseError(f"An initial pose was refused: {error}") from error
    return InitialPose(frame_id, stamp_to_ns(message.header.stamp), T, covariance)


def completed(T_map_flat: Matrix, known: Matrix) -> Matrix:
    """A flat pose (4, 4) with height, roll and pitch of a known one (4, 4)."""
    turn = so3_exp([0.0, 0.0, _yaw(T_map_flat) - _yaw(known)])
    return make_pose(turn @ known[:3, :3], [T_map_flat[0, 3], T_map_flat[1, 3], known[2, 3]])


def nearest(T_map_flat: Matrix, candidates: Matrix) -> Matrix:
    """The candidate (N, 4, 4) that is nearest on the ground, half a turn counting as three metres."""
    away_m = np.linalg.norm(candidates[:, :2, 3] - T_map_flat[:2, 3], axis=1)
    turns = np.array([_yaw(candidate) - _yaw(T_map_flat) for candidate in candidates])
    away_rad = np.abs(np.arctan2(np.sin(turns), np.cos(turns)))
    return np.asarray(candidates[int(np.argmin(away_m + away_rad * 3.0 / np.pi))])


def spread(T_map_base: Matrix, covariance: Matrix) -> list[Matrix]:
    """Poses to start from: the given one first, then one sigma to either side of it along x, y and yaw."""
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
