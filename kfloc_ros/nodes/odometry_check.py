# SPDX-License-Identifier: Apache-2.0
"""Whether the poses move as the odometry does; imports nothing of ROS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.types import Matrix

RECENT_S = 2.0
"""After a longer time without a pose that agreed, any pose is believed: wheels may have slipped meanwhile."""
DEG_PER_M = 30.0
"""A rotation of so many degrees counts as much as a translation of a metre."""


@dataclass(frozen=True, eq=False)
class _Seen:
    stamp_ns: int
    T_map_odom: Matrix


class OdometryCheck:
    """Doubts a pose that is not where the odometry has carried the last one, until a second pose agrees with it.

    A single wrong pose so never moves the map, and a robot that was really moved waits for one more image.
    """

    def __init__(self) -> None:
        self._last: _Seen | None = None
        self._doubted: _Seen | None = None

    def doubt(self, stamp_ns: int, T_map_base: Matrix, T_odom_base: Matrix, limit_m: float) -> str:
        """Why a pose is not believed yet, or empty.

        Args:
            stamp_ns: of the image.
            T_map_base: the pose found in it.
            T_odom_base: the odometry at its stamp.
            limit_m: how far apart the two may be; 0: any distance.
        """
        seen = _Seen(stamp_ns, T_map_base @ inverse_pose(T_odom_base))
        doubted, self._doubted = self._doubted, None
        if limit_m == 0.0 or not _is_recent(self._last, stamp_ns):
            self._last = seen
            return ""
        assert self._last is not None
        apart_m, apart_deg = _apart(self._last, T_map_base, T_odom_base)
        if _within(apart_m, apart_deg, limit_m):
            self._last = seen
            return ""
        if (
            doubted is not None
            and _is_recent(doubted, stamp_ns)
            and _within(*_apart(doubted, T_map_base, T_odom_base), limit_m)
        ):
            self._last = seen
            return ""
        self._doubted = seen
        return (
            f"The image says that the robot is {apart_m:.2f} m and {apart_deg:.1f} deg from where the odometry has it, "
            f"more than max_odom_jump {limit_m:g} m; one more image has to say so."
        )

    def forget(self) -> None:
        """The next pose is believed."""
        self._last = self._doubted = None


def _is_recent(seen: _Seen | None, stamp_ns: int) -> bool:
    return seen is not None and 0 < stamp_ns - seen.stamp_ns <= RECENT_S * 1e9


def _apart(seen: _Seen, T_map_base: Matrix, T_odom_base: Matrix) -> tuple[float, float]:
    """Metres and degrees between a pose and what the odometry makes of an earlier one."""
    between = inverse_pose(seen.T_map_odom @ T_odom_base) @ T_map_base
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


def _within(apart_m: float, apart_deg: float, limit_m: float) -> bool:
    return apart_m <= limit_m and apart_deg <= limit_m * DEG_PER_M
