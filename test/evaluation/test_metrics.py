# SPDX-License-Identifier: Apache-2.0
"""Errors, recall, medians and covariance figures against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kfloc_ros.evaluation.metrics import (
    FAILURE,
    PoseError,
    accuracy,
    consistency,
    percentiles,
    pose_error,
    pose_errors,
    recall,
)
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import make_pose, so3_exp


def record(estimate, truth=None, coarse=None, covariance=None) -> FrameRecord:
    return FrameRecord(0, 0, np.eye(4) if truth is None else truth, estimate, coarse, covariance=covariance)


def test_error_is_the_distance_of_the_centres_and_the_angle_between_orientations() -> None:
    truth = make_pose(so3_exp([0.3, -0.2, 0.9]), [1.0, 2.0, 3.0])
    estimate = make_pose(so3_exp([0.0, 0.0, math.radians(4.0)]) @ truth[:3, :3], [1.03, 2.04, 3.0])
    error = pose_error(estimate, truth)
    assert error.translation_m == pytest.approx(0.05)
    assert error.rotation_deg == pytest.approx(4.0)


def test_rotating_about_a_far_origin_does_not_count_as_translation() -> None:
    truth = make_pose(np.eye(3), [100.0, 0.0, 0.0])
    estimate = make_pose(so3_exp([0.0, 0.0, 0.1]), [100.0, 0.0, 0.0])
    assert pose_error(estimate, truth).translation_m == 0.0


@pytest.mark.parametrize("estimate", [None, np.full((4, 4), np.nan)])
def test_missing_or_not_finite_is_a_failure(estimate) -> None:
    assert pose_error(estimate, np.eye(4)) == FAILURE


def test_recall_is_strict_and_needs_both() -> None:
    errors = [PoseError(0.05, 1.0), PoseError(0.0499, 5.0), PoseError(0.0499, 4.99), PoseError(0.01, 6.0)]
    assert recall(errors, 0.05, 5.0) == 0.25


def test_missing_frames_count_as_failures_everywhere() -> None:
    good = np.eye(4)
    result = accuracy(pose_errors([record(good), record(None), record(None)]))
    assert result.localized == 1
    assert result.recall["5cm_5deg"] == pytest.approx(1 / 3)
    assert math.isinf(result.median_translation_m)
    assert result.median_rotation_deg == 180.0


def test_median_of_an_even_number_of_frames_is_the_middle() -> None:
    poses = [make_pose(np.eye(3), [x, 0, 0]) for x in (0.01, 0.02, 0.04, 9.0)]
    result = accuracy(pose_errors([record(pose) for pose in poses]))
    assert result.median_translation_m == pytest.approx(0.03)


def test_half_failed_has_no_median() -> None:
    result = accuracy(pose_errors([record(np.eye(4)), record(None)]))
    assert math.isinf(result.median_translation_m)


def test_frames_without_truth_take_no_part() -> None:
    errors = pose_errors([record(np.eye(4)), FrameRecord(1, 1, None, np.eye(4))])
    assert len(errors) == 1


def test_coarse_pose_is_judged_by_itself() -> None:
    far = make_pose(np.eye(3), [1.0, 0.0, 0.0])
    records = [record(np.eye(4), coarse=far)]
    assert pose_errors(records)[0].translation_m == 0.0
    assert pose_errors(records, coarse=True)[0].translation_m == 1.0


def test_no_frames_give_nan_not_a_crash() -> None:
    result = accuracy([])
    assert result.frames == 0
    assert math.isnan(result.median_translation_m)
    assert math.isnan(result.recall["1cm_1deg"])
    assert math.isnan(percentiles([])["p95"])


def test_tangent_error_undoes_the_documented_perturbation() -> None:
    estimate = make_pose(so3_exp([0.4, 0.1, -0.7]), [1.0, -2.0, 0.5])
    dt, dr = np.array([0.01, -0.02, 0.03]), np.array([0.002, 0.001, -0.004])
    truth = make_pose(so3_exp(dr) @ estimate[:3, :3], estimate[:3, 3] + dt)
    np.testing.assert_allclose(pose_tangent_error(estimate, truth), np.concatenate([dt, dr]), atol=1e-12)


def test_consistency_of_errors_drawn_from_the_covariance() -> None:
    rng = np.random.default_rng(3)
    root = np.tril(rng.normal(size=(6, 6))) * 1e-3 + np.diag([0.01] * 3 + [0.005] * 3)
    covariance = root @ root.T
    records = []
    for _ in range(3000):
        e = root @ rng.normal(size=6)
        records.append(record(np.eye(4), truth=make_pose(so3_exp(e[3:]), e[:3]), covariance=covariance))
    result = consistency(records)
    assert result is not None
    assert result.nees_mean == pytest.approx(6.0, abs=0.3)
    assert result.nees_within_95 == pytest.approx(0.95, abs=0.02)
    assert result.translation_coverage["1sigma"] == pytest.approx(0.683, abs=0.03)
    assert result.rotation_coverage["3sigma"] == pytest.approx(0.997, abs=0.005)


def test_consistency_leaves_out_what_it_cannot_judge() -> None:
    singular = np.zeros((6, 6))
    assert consistency([record(np.eye(4), covariance=singular), record(None), record(np.eye(4))]) is None


def test_percentiles_interpolate() -> None:
    assert percentiles([0.0, 100.0])["p95"] == pytest.approx(95.0)
