# SPDX-License-Identifier: Apache-2.0
"""Steps of the pose: what a camera that zooms does, and what one that moves does not; and jumps that images deny."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.camera_change import CameraChange, JumpCheck, PoseSteps, Step
from kfloc_ros.localization.judgement import CameraDoubt
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.camera_fit import CameraFit, FittedCamera
from kfloc_ros.pixloc.refiner import query_levels
from kfloc_ros.pixloc.session_points import SessionPoints
from kfloc_ros.types import PoseEstimate, TrackingState

PERIOD_NS = 100_000_000
SENSITIVITY = np.diag([0.0, 0.0, 0.0, 1e-3, 0.1, 0.1])
SENSITIVITY[2, 0] = 2.0  # depth 2 m: a focal length wrong by 10 % moves the pose by 20 cm ahead
SENSITIVITY[1, 2] = SENSITIVITY[0, 3] = 1e-3


def walk(*ahead_m: float) -> list[Matrix]:
    """Poses at a walk of 2 cm an image, and further ahead by some at the last ones."""
    wobble_m = 0.003 * np.random.default_rng(0).normal(size=(40, 3))
    good = [make_pose(np.eye(3), np.array([0.02 * k, 0.0, 0.0]) + wobble_m[k]) for k in range(20)]
    last = [make_pose(np.eye(3), np.array([0.02 * (20 + k), 0.0, z])) for k, z in enumerate(ahead_m)]
    return good + last


def doubts(
    poses: Sequence[Matrix],
    fits: Sequence[FittedCamera | None] = (),
    change: CameraChange | None = None,
    is_claimed: bool = True,
) -> list[CameraDoubt | None]:
    change = change or CameraChange(1.0, 1e-5 * np.eye(6), 640, 0.05)
    found = []
    for k, T in enumerate(poses):
        change.observe(10**9 + k * PERIOD_NS, T)
        found.append(change.doubt(SENSITIVITY, fits[k] if k < len(fits) else None))
        change.is_claimed = is_claimed
    return found


def steps(ahead_m: Sequence[float], period_ns: int = PERIOD_NS) -> list[Step]:
    observed = [PoseSteps()]
    every = [observed[0].observe(10**9 + k * period_ns, T) for k, T in enumerate(walk(*ahead_m))]
    return [step.before for step in every if step.before is not None]


def test_a_pose_that_steps_is_told_from_one_that_moves_on() -> None:
    stepped, faster, turned_back = steps((0.2, 0.2)), steps((0.2, 0.4)), steps((0.2, 0.0))
    assert stepped[-1].moved[2] == pytest.approx(0.2, abs=0.01) and stepped[-1].chi2 > 60.0
    assert abs(faster[-1].moved[2]) < 0.01 and faster[-1].chi2 < 6.0
    assert turned_back[-1].moved[2] > 0.15
    assert max(step.chi2 for step in steps([0.0] * 10)) < 6.0


def test_a_gap_begins_a_new_motion() -> None:
    assert steps((0.2, 0.2), 20 * PERIOD_NS) == []


def test_a_zoom_is_doubted_from_its_first_image_on() -> None:
    *before, first, second, third = doubts(walk(0.2, 0.2, 0.2))
    assert not any(before)
    for doubt in (first, second, third):
        assert doubt is not None and doubt.probability > 0.9
        assert doubt.focal_sigma == pytest.approx(0.1, rel=0.2)
        assert doubt.of_pose(SENSITIVITY)[1] > 0.5


def test_a_step_away_from_a_pose_that_was_not_claimed_says_nothing() -> None:
    assert not any(doubts(walk(0.2, 0.2, 0.2), is_claimed=False))


def test_an_image_as_before_ends_the_doubt() -> None:
    assert doubts(walk(0.2, 0.2, 0.2, 0.0, 0.0))[-1] is None


def test_a_camera_that_moves_on_is_not_doubted() -> None:
    assert doubts(walk(0.2, 0.4, 0.6))[-2:] == [None, None]


def test_a_pose_at_another_place_is_no_zoom() -> None:
    poses = walk()
    elsewhere = poses[-1] @ make_pose(so3_exp(np.array([0.1, 0.3, -0.1])), np.array([0.3, -0.2, 0.1]))
    assert doubts([*poses, elsewhere, elsewhere])[-2:] == [None, None]


def test_fits_of_the_given_camera_end_the_doubt() -> None:
    information = np.diag([1e4, 1e4, 0.1, 0.1, 1e3, 1e4])
    right = CameraFit(np.zeros(6), information, np.eye(4), np.eye(6), 0.1)
    poses = walk(*[0.2] * 20)
    fits = [
        FittedCamera(right, replaced, np.eye(6)) for replaced in (make_pose(np.eye(3), 10 * T[:3, 3]) for T in poses)
    ]
    found = doubts(poses, fits)
    assert found[20] is not None and found[-1] is None


def test_a_new_calibration_needs_less_of_a_step() -> None:
    def probability(is_announced: bool, so_far: float = 0.0) -> float:
        change = CameraChange(1.0, 1e-5 * np.eye(6), 640, 0.05)
        doubts(walk(), change=change)
        if is_announced:
            change.announced(so_far)
        change.observe(10**9 + 20 * PERIOD_NS, walk(0.12)[-1])
        doubt = change.doubt(SENSITIVITY, None)
        return 0.0 if doubt is None else doubt.probability

    assert probability(True) > probability(True, so_far=0.9) and probability(True) > probability(False)


def test_a_camera_that_is_never_wrong_is_not_doubted() -> None:
    never = CameraChange(1.0, 1e-5 * np.eye(6), 640, 0.0)
    assert not any(doubts(walk(0.2, 0.2), change=never))


HERE = make_pose(np.eye(3), np.array([0.0, 0.0, -0.6]))
ASIDE = make_pose(so3_exp(np.array([0.0, 0.3, 0.0])), np.array([0.3, 0.0, -0.6]))
FURTHER = make_pose(so3_exp(np.array([0.0, 0.35, 0.0])), np.array([0.36, 0.0, -0.6]))
LONGEST_S = 2.0


@pytest.fixture(scope="module")
def seen(room) -> dict[str, BackboneFeatures]:
    """Features of images from two places."""
    backbone = Backbone()
    return {name: backbone.extract(room.view(T, 0).image) for name, T in (("here", HERE), ("aside", ASIDE))}


def claimed(T: Matrix, images: int, **other: object) -> PoseEstimate:
    return PoseEstimate(
        10**9 + images * PERIOD_NS, **{"state": TrackingState.TRACKING, "reason": "", **other}, T_map_camera=T
    )


@pytest.fixture
def check_at(room, room_map, seen):
    """Make a check whose session has one image, from HERE, with an estimate."""

    def make(estimate: PoseEstimate) -> JumpCheck:
        points, mapped = SessionPoints(room.camera), SceneMap.load(room_map).references
        points.observe(query_levels(seen["here"]), HERE, mapped.points_near(HERE, room.camera, 3))
        check = JumpCheck(points, room.camera, LONGEST_S)
        check.observe(estimate)
        return check

    return make


def test_an_image_that_stays_denies_a_jump_and_what_goes_on_from_it(seen, check_at) -> None:
    check = check_at(claimed(HERE, 0))
    assert check.judged(seen["here"], claimed(HERE, 1)).state is TrackingState.TRACKING
    denied = check.judged(seen["here"], claimed(ASIDE, 2))
    assert denied.state is TrackingState.DEGRADED and denied.tentative
    assert "not a motion by 0.3 m and 17 deg" in denied.reason
    assert check.judged(seen["aside"], claimed(FURTHER, 3)).tentative  # the camera moves on with the wrong pose
    assert check.judged(seen["here"], claimed(HERE, 4)).state is TrackingState.TRACKING
    assert check.judged(seen["aside"], claimed(ASIDE, 5)).state is TrackingState.TRACKING


def test_a_camera_that_moves_far_sees_it(seen, check_at) -> None:
    check = check_at(claimed(HERE, 0))
    assert check.judged(seen["aside"], claimed(ASIDE, 1)).state is TrackingState.TRACKING


@pytest.mark.parametrize("other", [{"state": TrackingState.DEGRADED, "reason": "little support"}, {"held": True}])
def test_a_pose_that_the_map_has_not_confirmed_denies_nothing(seen, check_at, other) -> None:
    check = check_at(claimed(HERE, 0, **other))
    assert check.judged(seen["here"], claimed(ASIDE, 1)).state is TrackingState.TRACKING


def test_a_confirmed_pose_counts_until_the_session_has_left_it(seen, check_at) -> None:
    check = check_at(claimed(HERE, 0))
    check.observe(claimed(HERE, 1, state=TrackingState.DEGRADED, reason="little support"))
    assert check.judged(seen["here"], claimed(ASIDE, 2)).tentative
    away = make_pose(np.eye(3), np.array([0.0, 0.0, 0.6]))
    check.observe(claimed(away, 3, state=TrackingState.DEGRADED, reason="little support"))
    assert not check.judged(seen["here"], claimed(ASIDE, 4)).tentative


def test_an_old_pose_or_one_that_an_operator_corrects_denies_nothing(seen, check_at) -> None:
    check = check_at(claimed(HERE, 0))
    assert check.judged(seen["here"], claimed(ASIDE, 21)).state is TrackingState.TRACKING
    assert check.judged(seen["here"], claimed(ASIDE, 1)).tentative
    check.forget()
    assert check.judged(seen["here"], claimed(ASIDE, 2)).state is TrackingState.TRACKING


def test_a_session_without_points_denies_nothing(room, seen) -> None:
    check = JumpCheck(SessionPoints(room.camera), room.camera, LONGEST_S)
    check.observe(claimed(HERE, 0))
    assert check.judged(seen["here"], claimed(ASIDE, 1)).state is TrackingState.TRACKING
