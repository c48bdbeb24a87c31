# SPDX-License-Identifier: Apache-2.0
"""How wrong the poses are that an alignment starts from: what a hand or a robot moves meanwhile, or a coarse pose errs.

Learned damping is fitted to these. Axes are the camera's: x to the right, y down, z ahead.
"""

from __future__ import annotations

import numpy as np

from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp
from kfloc_ros.simulation.source import RECORDINGS
from kfloc_ros.simulation.trajectory import Pace, Trajectory

WAIT_S = 0.03, 0.3
"""Time since the pose that is started from."""
ROBOT_SPEED_M_S, ROBOT_TURN_DEG_S = 0.7, 35.0
ROBOT_SHAKE_M, ROBOT_SHAKE_DEG = 0.002, 0.15
COARSE_M, COARSE_DEG = 0.03, 1.2
"""One sigma, an axis, of the errors of coarse poses."""
WIDE_SHARE, WIDE = 0.25, 3.0
"""So many coarse poses err by so many times more."""


class StartErrors:
    """Draws transforms E; an alignment of a camera whose pose is T starts at E T.

    Args:
        seed: of the walk that hand-held motions are taken from.
    """

    def __init__(self, seed: int = 0) -> None:
        self._walk = Trajectory(RECORDINGS["map"].route(seed + 1), Pace(shake_m=0.006, shake_deg=0.6), seed)

    def draw(self, rng: np.random.Generator) -> Matrix:
        """A third each of hand-held motion, a robot's motion, and errors of coarse poses."""
        return (self._hand, self._robot, self._coarse)[int(rng.integers(3))](rng)

    def _hand(self, rng: np.random.Generator) -> Matrix:
        wait_s = float(rng.uniform(*WAIT_S))
        time_s = float(rng.uniform(0, self._walk.duration_s - wait_s))
        return inverse_pose(self._walk.pose(time_s)) @ self._walk.pose(time_s + wait_s)

    def _robot(self, rng: np.random.Generator) -> Matrix:
        """Ahead and about the vertical, on a floor that is nearly even."""
        wait_s = float(rng.uniform(*WAIT_S))
        ahead_m = float(rng.uniform(-0.3, 1.0)) * ROBOT_SPEED_M_S * wait_s
        turn_deg = float(rng.uniform(-1, 1)) * ROBOT_TURN_DEG_S * wait_s
        shake = np.radians(rng.normal(0, ROBOT_SHAKE_DEG, 3))
        turn = shake + np.array([0, np.radians(turn_deg), 0])
        return make_pose(so3_exp(turn), rng.normal(0, ROBOT_SHAKE_M, 3) + np.array([0, 0, ahead_m]))

    def _coarse(self, rng: np.random.Generator) -> Matrix:
        size = WIDE if rng.random() < WIDE_SHARE else 1.0
        turn = np.radians(rng.normal(0, COARSE_DEG * size, 3))
        return make_pose(so3_exp(turn), rng.normal(0, COARSE_M * size, 3))
