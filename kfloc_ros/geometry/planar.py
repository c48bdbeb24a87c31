# SPDX-License-Identifier: Apache-2.0
"""Poses of bodies that stand upright on level ground: projection of a pose, its covariance, and ``map -> odom``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp, so3_log

FLOOR_SIGMA_M, FLOOR_SIGMA_DEG = 0.02, 1.0
"""Standard deviations of a real floor, of a robot's suspension and of the map's vertical axis from the ideal plane."""
CHI2_3_999 = 16.266
"""99.9 % quantile of the chi-square distribution with 3 degrees of freedom."""
_ON_PLANE, _OFF_PLANE = [0, 1, 5], [2, 3, 4]
"""Components of a pose covariance: x, y, yaw; and height, roll, pitch."""


@dataclass(frozen=True, eq=False)
class PlanarPose:
    """Pose of an upright body on the ground plane."""

    T_map_base: Matrix
    """(4, 4); turned about the map's z axis only."""
    covariance: Matrix
    """(6, 6) in the order of PoseWithCovariance; height, roll and pitch have the floor's variances."""
    fault: str = ""
    """Contradiction between the full pose and the ground plane as a sentence; empty if there is none."""


def yaw(T: Matrix) -> float:
    """Return the angle, in radians, of the rotation about z that is nearest to the rotation of a pose (4, 4)."""
    return math.atan2(T[1, 0] - T[0, 1], T[0, 0] + T[1, 1])


def planar_pose(T_map_base: Matrix, covariance: Matrix, height_m: float = 0.0) -> PlanarPose:
    """Return the projection of a pose to the ground plane.

    The position is projected along z, and the rotation to the nearest one about z. The marginal covariance of x, y and
    yaw is kept. The discarded part (height, roll, pitch) must be explained by its own covariance and the floor's
    (chi-square, 99.9 %). If it is not, the kept covariance grows by the same normalized squared error.

    Args:
        T_map_base: (4, 4); the map's z axis points up.
        covariance: (6, 6) in the order of PoseWithCovariance.
        height_m: height of the base frame's origin in the map while the robot stands on the ground.
    """
    turn = so3_exp([0.0, 0.0, yaw(T_map_base)])
    tilt = so3_log(T_map_base[:3, :3] @ turn.T)
    off = np.array([T_map_base[2, 3] - height_m, tilt[0], tilt[1]])
    floor = np.array([FLOOR_SIGMA_M**2] + 2 * [math.radians(FLOOR_SIGMA_DEG) ** 2])
    squared = float(off @ np.linalg.solve(covariance[np.ix_(_OFF_PLANE, _OFF_PLANE)] + np.diag(floor), off))
    kept = covariance[np.ix_(_ON_PLANE, _ON_PLANE)]
    fault = ""
    if not squared <= CHI2_3_999:
        kept = kept * (squared / 3.0)
        fault = (
            f"the pose is {abs(off[0]):.2f} m {'above' if off[0] > 0 else 'below'} the ground plane and tilted by "
            f"{math.degrees(float(np.linalg.norm(tilt))):.1f} deg against it, more than its covariance allows; if this "
            "is always so, correct ground_height, base_frame or the camera's mount, or set planar to false"
        )
    planar = np.diag([0.0, 0.0, *floor, 0.0])
    planar[np.ix_(_ON_PLANE, _ON_PLANE)] = kept
    position = [T_map_base[0, 3], T_map_base[1, 3], height_m]
    return PlanarPose(make_pose(turn, position), planar, fault)


def planar_map_to_odom(T_map_base: Matrix, T_odom_base: Matrix) -> Matrix:
    """Return the transform ``T_map_odom`` (4, 4) that is turned about z only and leads to a planar pose.

    Through it the base has the position and the yaw of ``T_map_base``. Roll and pitch remain the odometry's, whose
    ground plane is thereby parallel to the map's.

    Args:
        T_map_base: (4, 4) planar pose.
        T_odom_base: (4, 4) odometry at the same time.
    """
    turn = so3_exp([0.0, 0.0, yaw(T_map_base) - yaw(T_odom_base)])
    return make_pose(turn, T_map_base[:3, 3] - turn @ T_odom_base[:3, 3])
