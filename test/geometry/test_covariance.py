# SPDX-License-Identifier: Apache-2.0
"""Probabilities that a covariance claims agree with drawn errors."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.covariance import UncertainPose, at_least, pose_tangent_error, probability_within
from kfloc_ros.geometry.lie import make_pose, so3_exp


@pytest.mark.parametrize(
    "sigmas_m", [(0.05, 0.05, 0.05), (0.12, 0.02, 0.01), (0.08, 0.08, 0.001), (0.3, 0.2, 0.1), (0.02, 0.01, 0.03)]
)
def test_the_claimed_probability_is_that_of_drawn_errors(sigmas_m: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    covariance = np.diag([0.0] * 3 + [1e-8] * 3)
    covariance[:3, :3] = turn @ np.diag(np.square(sigmas_m)) @ turn.T
    drawn = rng.normal(size=(200_000, 3)) * sigmas_m
    share = float((np.linalg.norm(drawn, axis=1) < 0.10).mean())
    assert probability_within(covariance, 0.10, 0.1) == pytest.approx(share, abs=0.05)
    swapped = np.roll(covariance, 3, axis=(0, 1))  # the same of the rotation
    assert probability_within(swapped, 0.10, 0.10) == pytest.approx(share, abs=0.05)


def test_exact_poses_are_within_and_wild_ones_are_not() -> None:
    assert probability_within(np.zeros((6, 6)), 0.10, 0.1) == pytest.approx(1.0)
    assert probability_within(1e4 * np.eye(6), 0.10, 0.1) < 0.01


def test_the_larger_of_two_covariances_counts_in_every_direction() -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    covariance = turn @ np.diag([1e-8, 1e-6, 1e-4, 1e-2, 1.0, 4.0]) @ turn.T
    wider = at_least(covariance, np.full(6, 1e-3))
    np.testing.assert_allclose(np.linalg.eigvalsh(wider), [1e-3, 1e-3, 1e-3, 1e-2, 1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(at_least(covariance, np.zeros(6)), covariance, atol=1e-12)
    uneven = at_least(1e-6 * np.eye(6), np.array([1e-4] * 3 + [1e-8] * 3))
    np.testing.assert_allclose(uneven, np.diag([1e-4] * 3 + [1e-6] * 3), atol=1e-12)


def moved(T: np.ndarray, error: np.ndarray) -> np.ndarray:
    return make_pose(so3_exp(error[3:]) @ T[:3, :3], T[:3, 3] + error[:3])


@pytest.mark.parametrize("correlation", [0.0, 0.7, 1.0])
def test_an_intersection_claims_no_more_than_it_knows_however_errors_are_correlated(correlation: float) -> None:
    rng = np.random.default_rng(1)
    truth = make_pose(so3_exp(np.array([0.2, -0.4, 0.1])), [0.3, -0.2, 1.0])
    sigmas = np.array([0.08, 0.01, 0.02, 0.01, 0.03, 0.01]), np.array([0.02, 0.03, 0.04, 0.02, 0.01, 0.01])
    errors = []
    for _ in range(2000):
        drawn = rng.normal(size=6)
        other = correlation * drawn + np.sqrt(1.0 - correlation**2) * rng.normal(size=6)
        first, second = (
            UncertainPose(moved(truth, s * e), np.diag(s**2)) for s, e in zip(sigmas, (drawn, other), strict=True)
        )
        both = first.intersected(second)
        errors.append(pose_tangent_error(both.T_map_camera, truth))
    found = np.mean([np.outer(e, e) for e in errors], axis=0)
    assert np.linalg.eigvalsh(both.covariance - 0.93 * found).min() > 0
    least = min(np.linalg.slogdet(np.diag(s**2))[1] for s in sigmas)
    assert np.linalg.slogdet(both.covariance)[1] < least  # each knows some axes better


def test_an_intersection_follows_the_estimate_that_is_known_and_keeps_two_that_are_alike() -> None:
    known = UncertainPose(make_pose(np.eye(3), [1.0, 2.0, 3.0]), 1e-4 * np.eye(6))
    vague = UncertainPose(make_pose(so3_exp(np.array([0.0, 0.3, 0.0])), [1.5, 2.0, 3.0]), 1.0 * np.eye(6))
    for both in (known.intersected(vague), vague.intersected(known)):
        np.testing.assert_allclose(both.T_map_camera, known.T_map_camera, atol=1e-9)
        np.testing.assert_allclose(both.covariance, known.covariance, rtol=1e-9)
    beside = UncertainPose(make_pose(np.eye(3), [1.02, 2.0, 3.0]), 1e-4 * np.eye(6))
    np.testing.assert_allclose(known.intersected(beside).covariance, known.covariance)
    assert known.chi2(beside) == pytest.approx(2.0)
