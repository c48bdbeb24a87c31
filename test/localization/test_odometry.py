# SPDX-License-Identifier: Apache-2.0
"""Poses and odometry together: consistency, steady corrections, poses between images, a simulated drive."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from simulated_drive import SimulatedDrive

from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.localization.odometry import CorrectionLimits, DeadReckoning, OdometryCheck, SteadyCorrection
from kfloc_ros.messages.poses import BodyPose
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


def test_small_steps_add_up_and_no_second_pose_confirms_them() -> None:
    check, shown = OdometryCheck(), T_MAP_ODOM @ odometry(1)  # a camera that shows one image while the robot drives on
    said = [check.check(n * STEP_NS, shown, odometry(n), 0.5) for n in range(1, 101)]
    first = next(n for n, sentence in enumerate(said) if sentence)
    assert 3 < first < 12 and all(said[first:])
    assert "away from the odometry" in said[first] and "small steps" in said[first]


def test_poses_that_go_on_contradicting_the_odometry_are_believed_after_ten_seconds() -> None:
    check, shown = OdometryCheck(), T_MAP_ODOM @ odometry(1)
    said = [check.check(n * STEP_NS, shown, odometry(min(n, 20)), 0.5) for n in range(1, 140)]
    assert said[60] and not said[-1]


def test_slow_drift_of_the_odometry_over_a_long_way_is_no_contradiction() -> None:
    check = OdometryCheck()
    assert not any(doubt(check, number, x_m=0.002 * number) for number in range(1, 200))


LIMITS = CorrectionLimits(0.2, 10.0)
PERIOD_NS = 50_000_000


def flat(x: float, y: float, turn_deg: float) -> Matrix:
    return make_pose(so3_exp([0.0, 0.0, np.radians(turn_deg)]), [x, y, 0.0])


def apart(a: Matrix, b: Matrix) -> tuple[float, float]:
    between = inverse_pose(a) @ b
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


@pytest.mark.parametrize(("x", "turn_deg"), [(0.5, 0.0), (0.0, 8.0), (0.3, -5.0)])
def test_a_correction_moves_the_base_at_the_set_speed_and_arrives(x: float, turn_deg: float) -> None:
    far = flat(400.0, -300.0, 70.0)  # where a small turn about the odometry's origin would be a long way
    steady, first = SteadyCorrection(), flat(0, 0, 0)
    target = far @ flat(x, 0.0, turn_deg) @ inverse_pose(far)
    stamp_ns, before = 0, steady.step(first, far, 0, LIMITS)
    for _ in range(60):
        stamp_ns += PERIOD_NS
        now = steady.step(target, far, stamp_ns, LIMITS)
        moved_m, turned_deg = apart(before @ far, now @ far)
        assert moved_m <= 0.2 * 0.05 + 1e-9 and turned_deg <= 10.0 * 0.05 + 1e-6
        before = now
    assert np.allclose(before, target)


def test_without_limits_it_jumps_and_with_one_the_other_is_free() -> None:
    target = flat(5.0, 0.0, 90.0)
    for limits in (CorrectionLimits(), CorrectionLimits(0.0, 1000.0)):
        steady = SteadyCorrection()
        steady.step(np.eye(4), np.eye(4), 0, limits)
        assert np.allclose(steady.step(target, np.eye(4), 10**9, limits), target)


def test_a_jump_is_for_the_next_pose_and_not_for_the_present_target() -> None:
    steady, near, new = SteadyCorrection(), flat(1.0, 0, 0), flat(2.0, 0, 0)
    steady.step(np.eye(4), np.eye(4), 0, LIMITS)
    steady.step(near, np.eye(4), PERIOD_NS, LIMITS)
    steady.allow_jump()
    assert steady.step(near, np.eye(4), 2 * PERIOD_NS, LIMITS)[0, 3] == pytest.approx(0.02)
    assert np.allclose(steady.step(new, np.eye(4), 3 * PERIOD_NS, LIMITS), new)
    assert steady.step(near, np.eye(4), 4 * PERIOD_NS, LIMITS)[0, 3] == pytest.approx(1.99)


def test_odometry_that_is_set_to_another_place_is_followed_at_once() -> None:
    steady = SteadyCorrection()
    steady.step(np.eye(4), np.eye(4), 0, LIMITS)
    assert not steady.observe(0, np.eye(4))
    assert not steady.observe(100 * 10**6, flat(0.5, 0, 20.0)), "a fast robot"
    assert steady.observe(200 * 10**6, flat(100.0, 0, 0))
    target = flat(-99.0, 0, 0)
    assert np.allclose(steady.step(target, np.eye(4), PERIOD_NS, LIMITS), target)


def test_a_pose_goes_on_with_odometry_and_becomes_less_certain() -> None:
    reckoning = DeadReckoning()
    reckoning.observe(0, flat(0, 0, 0))
    assert reckoning.newest() is None, "no pose yet"
    body = BodyPose(flat(5.0, 6.0, 90.0), np.diag([1e-4] * 6))
    reckoning.fix(0, body, flat(0, 0, 0))
    sigmas = []
    for number in range(1, 101):
        reckoning.observe(number * 20_000_000, flat(0.02 * number, 0, 0))
        carried = reckoning.newest()
        assert carried is not None
        sigmas.append(float(np.sqrt(carried.body.covariance[0, 0])))
    assert np.allclose(carried.body.T_map_body[:3, 3], [5.0, 8.0, 0.0])
    assert carried.velocity_m_s == pytest.approx([1.0, 0, 0]) and carried.stamp_ns == 2_000_000_000
    assert all(a < b for a, b in pairwise(sigmas)) and 0.04 < sigmas[-1] < 0.15
    reckoning.fix(1_990_000_000, body, flat(1.99, 0, 0))
    again = reckoning.newest()
    assert again is not None and again.body.covariance[0, 0] < 1.2e-4
    assert np.allclose(again.body.T_map_body[:3, 3], [5.0, 6.01, 0.0])


def test_a_gyroscope_turns_the_pose_where_odometry_is_late() -> None:
    reckoning = DeadReckoning()
    for number in range(11):
        reckoning.observe(number * 20_000_000, flat(0.01 * number, 0, 0))
    reckoning.fix(0, BodyPose(np.eye(4), np.diag([1e-4] * 6)), flat(0, 0, 0))
    for number in range(1, 21):
        reckoning.turn(200_000_000 + number * 5_000_000, np.array([0.0, 0.0, 1.0]))
    carried = reckoning.newest()
    assert carried is not None and carried.stamp_ns == 300_000_000
    assert rotation_angle_deg(carried.body.T_map_body[:3, :3]) == pytest.approx(np.degrees(0.1), abs=0.01)
    assert carried.body.T_map_body[0, 3] == pytest.approx(0.15, abs=1e-6)
    reckoning.turn(5_000_000_000, np.array([0.0, 0.0, 1.0]))
    late = reckoning.newest()
    assert late is not None and late.stamp_ns == 200_000_000, "nothing is bridged for seconds"


def test_a_clock_that_is_set_back_starts_anew() -> None:
    reckoning = DeadReckoning()
    reckoning.observe(10**10, flat(0, 0, 0))
    reckoning.fix(10**10, BodyPose(np.eye(4), np.eye(6)), flat(0, 0, 0))
    reckoning.observe(10**9, flat(0, 0, 0))
    assert reckoning.newest() is None


@pytest.mark.parametrize("latency_s", [0.1, 0.7])
def test_a_drive_of_20_m_with_odometry_that_drifts_by_2_percent(latency_s: float) -> None:
    """``map -> base`` as TF gives it at any time between images, with poses of 7 mm and 0.25 deg."""
    drive = SimulatedDrive(np.random.default_rng(5), drift=0.02, latency_s=latency_s)
    errors = drive.run(CorrectionLimits(0.1, 5.0))
    assert drive.driven_m >= 20.0
    inside = (errors.away_m <= 0.03) & (errors.turned_deg <= 1.0)
    assert inside.mean() >= 0.99, (np.quantile(errors.away_m, 0.99), np.quantile(errors.turned_deg, 0.99))
    assert errors.speed_m_s.max() <= 0.1 + 1e-6 and errors.speed_deg_s.max() <= 5.0 + 1e-4
    assert drive.odometry_error_m > 0.15, "or there was nothing to correct"
