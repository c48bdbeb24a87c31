# SPDX-License-Identifier: Apache-2.0
"""State and pose from what was measured, case by case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.tracking import RepeatGuard
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, PoseEstimate, TrackingState

HERE = make_pose(so3_exp([0.1, 0.2, 0.3]), [1.0, 2.0, 3.0])
COARSE = CoarsePose(True, "", HERE, np.eye(6) * 0.02**2, 900, 0.6)
ALIGNED = Alignment(True, "", HERE, np.eye(6) * 0.005**2, 0.2, 0.1, 0.9, 9, (1, 2, 3))
FAILED = replace(ALIGNED, success=False, reason="the image does not look like the map there")
NO_COARSE = CoarsePose(False, "PnP found 3 inliers of 900 cells", None, None, 3, 0.003)


def judged(coarse: CoarsePose, alignment: Alignment | None, had_pose: bool = True) -> PoseEstimate:
    report = FilterReport("", 1.0, 3.0, 0.1)
    return judge(7, coarse, report, alignment, had_pose=had_pose, settings=JudgementSettings(min_inlier_ratio=0.3))


def moved(metres: float, degrees: float = 0.0) -> np.ndarray:
    return make_pose(HERE[:3, :3] @ so3_exp([0.0, np.radians(degrees), 0.0]), HERE[:3, 3] + [metres, 0.0, 0.0])


@pytest.mark.parametrize(
    ("coarse", "alignment", "state", "has_pose"),
    [
        (COARSE, ALIGNED, TrackingState.TRACKING, True),
        (COARSE, FAILED, TrackingState.DEGRADED, True),
        (COARSE, None, TrackingState.TRACKING, True),
        (NO_COARSE, ALIGNED, TrackingState.TRACKING, True),
        (NO_COARSE, FAILED, TrackingState.LOST, False),
        (NO_COARSE, None, TrackingState.LOST, False),
        (replace(COARSE, inlier_ratio=0.29), FAILED, TrackingState.LOST, False),
        (replace(COARSE, inlier_ratio=0.29), None, TrackingState.LOST, False),
        (replace(COARSE, inlier_ratio=0.29), ALIGNED, TrackingState.TRACKING, True),
    ],
)
def test_states(coarse: CoarsePose, alignment: Alignment | None, state: TrackingState, has_pose: bool) -> None:
    estimate = judged(coarse, alignment)
    assert estimate.state is state
    assert (estimate.T_map_camera is not None, estimate.covariance is not None) == (has_pose, has_pose)
    assert bool(estimate.reason) == (state is not TrackingState.TRACKING)
    assert estimate.stamp_ns == 7 and estimate.coarse is coarse and estimate.alignment is alignment


def test_a_pose_that_could_not_be_refined_claims_less_than_one_that_need_not_be() -> None:
    assert COARSE.covariance is not None
    assert np.allclose(judged(COARSE, None).covariance, COARSE.covariance)
    assert np.allclose(judged(COARSE, FAILED).covariance, 4.0 * COARSE.covariance)


def test_before_the_first_pose_nothing_is_lost() -> None:
    assert judged(NO_COARSE, FAILED, had_pose=False).state is TrackingState.INITIALIZING


def test_a_weak_coarse_pose_is_named_with_both_shares() -> None:
    reason = judged(replace(COARSE, inlier_ratio=0.12), FAILED).reason
    assert "only 12 % of the cells" in reason and "30 % are needed" in reason and FAILED.reason in reason


@pytest.mark.parametrize(("metres", "degrees"), [(0.8, 0.0), (0.0, 25.0), (3.0, 90.0)])
def test_two_poses_that_contradict_each_other_are_degraded_and_the_covariance_holds_both(
    metres: float, degrees: float
) -> None:
    estimate = judged(replace(COARSE, T_map_camera=moved(metres, degrees)), ALIGNED)
    assert estimate.state is TrackingState.DEGRADED and "both look right" in estimate.reason
    assert np.array_equal(estimate.T_map_camera, HERE)
    assert estimate.covariance is not None
    error = np.array([metres, 0.0, 0.0])
    assert error @ np.linalg.pinv(estimate.covariance[:3, :3]) @ error <= 1.0001
    assert np.linalg.eigvalsh(estimate.covariance).min() > 0


def test_what_covariances_or_limits_allow_is_no_contradiction() -> None:
    assert judged(replace(COARSE, T_map_camera=moved(0.2, 8.0)), ALIGNED).state is TrackingState.TRACKING
    unsure = replace(COARSE, T_map_camera=moved(0.8), covariance=np.eye(6))
    assert judged(unsure, ALIGNED).state is TrackingState.TRACKING
    weak = replace(COARSE, T_map_camera=moved(3.0), inlier_ratio=0.15)
    assert judged(weak, ALIGNED).state is TrackingState.TRACKING


def test_an_image_that_is_repeated_for_longer_than_the_limit_is_no_new_image() -> None:
    guard, image = RepeatGuard(1.0), np.zeros((4, 4, 3), np.uint8)
    other = image + 1
    said = [guard.fault(image, round(0.5e9 * k)) for k in range(4)]
    assert said[:3] == ["", "", ""] and "repeats one image" in said[3]
    assert guard.fault(image, round(1.5e9)) == said[3]  # asked again for the same frame
    assert guard.fault(other, round(2.0e9)) == "" and guard.fault(image, round(2.5e9)) == ""
    assert guard.fault(image, 0) == ""  # a recording begins again
    nearly = np.zeros((130, 4, 3), np.uint8)
    nearly[77, 1, 2] = 1
    assert guard.fault(np.zeros_like(nearly), round(3.0e9)) == "" and guard.fault(nearly, round(4.5e9)) == ""
    never = RepeatGuard(0.0)
    assert not any(never.fault(image, round(1e9 * k)) for k in range(5))
