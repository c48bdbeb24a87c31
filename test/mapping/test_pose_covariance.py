# SPDX-License-Identifier: Apache-2.0
"""Covariance of a map's poses: from errors of held-out views, and from what passes through the place disagree by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.geometry.covariance import sideways_factors
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.pose_covariance import (
    ABSURD_COVARIANCE_SCALE,
    LEAST_OWN_ERROR_M,
    LEAST_OWN_ERROR_RAD,
    AlignedView,
    PoseCovariance,
    PoseErrors,
    patch_covariance_scale,
    right_factor,
)
from kfloc_ros.pixloc.optimizer import MEASURED_M, RefinerSettings
from kfloc_ros.types import Alignment, Matrix

BY_POINTS = np.diag([0.001**2] * 3 + [0.0005**2] * 3)


def errors(
    count: int,
    scale: float,
    own_m: float,
    own_rad: float,
    seed: int = 0,
    distance_m: float = 0.0,
    apart_m: float = 0.0,
    by_points: Matrix = BY_POINTS,
) -> PoseErrors:
    """Errors of poses whose covariance by the points is too small by a scale, in a map with an error of its own.

    They are aligned ``distance_m`` away, with views of which those of every second one disagree by ``apart_m``.
    """
    apart = np.zeros((count, 6, 6))
    apart[::2, :3, :3] = apart_m**2 * np.eye(3)
    own = np.diag([own_m**2] * 3 + [own_rad**2] * 3)
    rng = np.random.default_rng(seed)
    drawn = np.array([rng.multivariate_normal(np.zeros(6), scale * by_points + own + more) for more in apart])
    covariances = np.repeat(by_points[None], count, axis=0)
    none = np.zeros((count, 6, 6)), np.zeros((count, 6))
    return PoseErrors(drawn.reshape(-1, 6), covariances, np.full(count, distance_m), apart, *none)


NONE = errors(0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(("scale", "own_m", "own_rad"), [(4.0, 0.0, 0.0), (1.0, 0.005, 0.004), (50.0, 0.0, 0.01)])
def test_the_covariance_covers_as_many_errors_as_it_says(scale: float, own_m: float, own_rad: float) -> None:
    found = PoseCovariance.of(errors(60, scale, own_m, own_rad), NONE, NONE)
    fresh = errors(2000, scale, own_m, own_rad, seed=1)
    for axes in (slice(0, 3), slice(3, 6)):
        assert found.covered(fresh, axes) == pytest.approx(0.68, abs=0.07)


def test_other_passes_show_the_error_that_neighbours_share() -> None:
    near, far = errors(60, 2.0, 0.0, 0.0), errors(60, 2.0, 0.01, 0.015, seed=2, distance_m=0.3)
    found = PoseCovariance.of(near, far, errors(20, 2.0, 0.01, 0.015))
    fresh = errors(2000, 2.0, 0.01, 0.015, seed=1)
    for axes in (slice(0, 3), slice(3, 6)):
        assert found.covered(fresh, axes) == pytest.approx(0.68, abs=0.1)
    alike = PoseCovariance.of(
        near, errors(60, 2.0, 0.0, 0.0, seed=2, distance_m=0.3), errors(20, 2.0, 0.0, 0.0, seed=3)
    )
    assert alike.own_error_m <= 0.0015 and alike.own_error_rad < 0.001


def test_a_common_rotation_of_all_points_grows_away_from_the_mapped_views() -> None:
    """Many points fix rotation and position together far better than either; what they share is not averaged out."""
    valley = np.zeros((6, 6))
    valley[0, 0], valley[4, 4], valley[0, 4] = 1e-4, 1e-4, -0.999e-4
    valley = valley + valley.T - np.diag(np.diag(valley)) + 1e-9 * np.eye(6)
    near = errors(60, 2.0, 0.0, 0.0, distance_m=0.1, by_points=valley)
    far = errors(60, 2.0, 0.0, 0.004, seed=1, distance_m=0.8, by_points=valley)
    found = PoseCovariance.of(near, far, NONE)
    assert found.own_error_growth * 0.8 == pytest.approx(0.004, rel=0.4) and found.scale < 4.0
    even = PoseCovariance.of(near, errors(60, 2.0, 0.0, 0.0, seed=1, distance_m=0.8, by_points=valley), NONE)
    assert even.own_error_growth * 0.8 < 0.001


def test_errors_of_depths_grow_in_the_directions_that_the_points_fix_badly() -> None:
    near = errors(60, 2.0, 0.0, 0.0, distance_m=0.05)
    grown = PoseCovariance.of(near, errors(90, 18.0, 0.0, 0.0, seed=1, distance_m=0.8), NONE)
    assert 5.0 < (grown.doubling_m + MEASURED_M) / (grown.doubling_m + 0.05) < 14.0
    assert grown.covered(errors(2000, 18.0, 0.0, 0.0, seed=3, distance_m=0.8)) == pytest.approx(0.68, abs=0.08)
    even = PoseCovariance.of(near, errors(90, 2.0, 0.0, 0.0, seed=1, distance_m=0.8), NONE)
    assert even.doubling_m > 2.0


def test_what_views_disagree_by_is_no_error_of_the_whole_map() -> None:
    known = PoseCovariance.of(errors(80, 2.0, 0.0, 0.0, apart_m=0.01), NONE, NONE)
    assert known.scale < 4.0 and known.own_error_m < 0.002, "half of the poses hold to a millimetre"


def test_errors_may_be_larger_sideways_than_upwards() -> None:
    factors = sideways_factors(1.25)
    wide = np.outer(factors, factors) * BY_POINTS
    shaped = replace(errors(120, 3.0, 0.0, 0.0, by_points=wide), covariances=np.repeat(BY_POINTS[None], 120, axis=0))
    found = PoseCovariance.of(shaped, NONE, NONE)
    assert found.sideways == pytest.approx(1.25, rel=0.08)
    even = PoseCovariance.of(errors(120, 3.0, 0.0, 0.0), NONE, NONE)
    assert even.sideways == pytest.approx(1.0, rel=0.08)


def test_what_the_check_of_a_pose_adds_is_not_counted_twice() -> None:
    """Errors of poses hold those by the camera, which the check adds to every pose."""
    drawn, by_camera = errors(400, 3.0, 0.0, 0.0), 1.5 * BY_POINTS
    alone = right_factor(drawn.errors, lambda k: drawn.checked(k * drawn.covariances), (0.1, 30.0))
    assert alone == pytest.approx(3.0, rel=0.15)
    known = replace(drawn, moments=np.repeat(by_camera[None], 400, axis=0))
    assert right_factor(drawn.errors, lambda k: known.checked(k * known.covariances), (0.1, 30.0)) == pytest.approx(
        1.5, rel=0.2
    )
    displaced = replace(drawn, variances=np.tile(np.diag(9.0 * BY_POINTS), (400, 1)))
    np.testing.assert_allclose(displaced.checked(drawn.covariances), 9.0 * drawn.covariances, rtol=1e-9)


def test_few_errors_and_absurd_ones_are_no_error_of_the_map() -> None:
    assert PoseCovariance.of(errors(3, 9.0, 0.0, 0.0), NONE, NONE) == PoseCovariance(
        1.0, LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD
    )
    absurd = PoseCovariance.of(errors(60, 5000.0, 0.0, 0.0), NONE, NONE)
    assert absurd.scale > ABSURD_COVARIANCE_SCALE and absurd.own_error_m == LEAST_OWN_ERROR_M


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.25), (2.0, 1.5), (0.01, 0.001)])
def test_poses_improved_by_patches_have_the_covariance_of_their_errors(share: float, expected: float) -> None:
    own, noise = RefinerSettings(), 1e-6 * BY_POINTS
    drawn = share * errors(80, 4.0, 0.0, 0.0).errors

    def improved(error: np.ndarray) -> AlignedView:
        T = make_pose(so3_exp(error[3:]), error[:3])
        covariance = own.scale_at(0.0) * BY_POINTS + own.own_covariance_at(0.0) + noise
        by_patches = Alignment(True, "", T, covariance, 0.2, 0.1, 1.0, 3, (1,), by_patches=True, patch_noise=noise)
        return AlignedView(np.eye(4), by_patches)

    by_features = PoseCovariance(4.0, 1e-5, 1e-5)
    aligned = [improved(error) for error in drawn]
    assert patch_covariance_scale(aligned, own, by_features) == pytest.approx(expected, rel=0.25)
    assert patch_covariance_scale(aligned[:3], own, by_features) == 1.0, "too few to tell"


def test_a_factor_is_right_for_errors_of_any_tails() -> None:
    drawn = errors(400, 3.0, 0.0, 0.0).errors
    assert right_factor(drawn, lambda k: k * np.repeat(BY_POINTS[None], 400, axis=0), (0.1, 30.0)) == pytest.approx(
        3.0, rel=0.15
    )
    tails = drawn * np.sqrt(4.0 / np.random.default_rng(5).chisquare(4, (400, 1)))
    found = right_factor(tails, lambda k: k * np.repeat(BY_POINTS[None], 400, axis=0), (0.1, 30.0))
    assert found > 3.3, "as many errors are inside one sigma as it says, heavy tails or not"
