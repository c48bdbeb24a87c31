# SPDX-License-Identifier: Apache-2.0
"""Probabilities that a covariance claims agree with drawn errors."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.covariance import at_least, probability_within


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
