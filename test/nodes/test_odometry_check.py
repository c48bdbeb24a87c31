# SPDX-License-Identifier: Apache-2.0
"""Poses that move with the odometry, and such that do not."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.nodes.tf_publisher import OdometryCheck
from kfloc_ros.types import Matrix

T_MAP_ODOM = make_pose(so3_exp([0.0, 0.0, 1.0]), [40.0, -7.0, 0.0])
STEP_NS = 100_000_000


def odometry(number: int) -> Matrix:
    return make_pose(so3_exp([0.0, 0.0, 0.05 * number]), [0.1 * number, 0.0, 0.0])


def moved(T: Matrix, x_m: float, turn_deg: float = 0.0) -> Matrix:
    return T @ make_pose(so3_exp([0.0, 0.0, np.radians(turn_deg)]), [x_m, 0.0, 0.0])


def doubt(check: OdometryCheck, number: int, x_m: float = 0.0, turn_deg: float = 0.0, limit_m: float = 0.5) -> str:
    T_map_base = moved(T_MAP_ODOM @ odometry(number), x_m, turn_deg)
    return check.check(number * STEP_NS, T_map_base, odometry(number), limit_m)


def test_poses_that_move_as_the_odometry_are_believed() -> None:
    check = OdometryCheck()
    assert not any(doubt(check, number, x_m=0.1 * (number % 2), turn_deg=3.0 * (number % 3)) for number in range(1, 20))


@pytest.mark.parametrize(("x_m", "turn_deg"), [(3.0, 0.0), (0.0, 40.0)])
def test_one_that_does_not_is_doubted_and_forgotten(x_m: float, turn_deg: float) -> None:
    check = OdometryCheck()
    assert not doubt(check, 1)
    said = doubt(check, 2, x_m, turn_deg)
    assert f"{x_m:.2f} m and {turn_deg:.1f} deg from its prediction by odometry" in said
    assert not doubt(check, 3)
    assert doubt(check, 4, x_m, turn_deg), "the doubt before does not count any more"


def test_a_second_that_agrees_with_it_is_believed_and_from_then_on_is_the_truth() -> None:
    check = OdometryCheck()
    assert not doubt(check, 1)
    assert doubt(check, 2, 3.0)
    assert doubt(check, 3, 9.0), "two that differ do not confirm each other"
    assert not doubt(check, 4, 9.1)
    assert not doubt(check, 5, 9.0) and doubt(check, 6, 0.0)


def test_after_a_while_or_a_jump_back_or_without_a_limit_anything_is_believed() -> None:
    check = OdometryCheck()
    assert not doubt(check, 1) and not doubt(check, 40, 3.0)
    assert not doubt(check, 2, 9.0)
    assert not doubt(check, 3, -9.0, limit_m=0.0)
    check.reset()
    assert not doubt(check, 4, 20.0)
