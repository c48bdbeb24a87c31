# SPDX-License-Identifier: Apache-2.0
"""Covariance of a map's poses, fitted to the errors of views whose pose is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import covered, median_scale, normalised, pose_tangent_error
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc.optimizer import MEASURED_M, RefinerSettings
from kfloc_ros.types import Alignment

ONE_SIGMA = 0.6827
FREEDOM = 4.0
"""Degrees of freedom of the t distribution of normalised errors; outliers then count little."""
MIN_ERRORS = 8
"""Fewest errors that a covariance is fitted to."""
LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD, LEAST_GROWTH = 3e-4, 2e-4, 8e-4
"""Smallest own error of a map, and its growth. Views held out of a recording lie between its references, and share
their drift; those of another walk, even in a rendered room without noise, have errors that are larger by this."""
DOUBLING_LIMITS_M = 0.03, 30.0
STARTING_SCALES = 0.1, 0.5, 2.0, 8.0
VALUE_LIMITS = np.array(
    [(1e-3, 1e3), (LEAST_OWN_ERROR_M, 0.1), (LEAST_OWN_ERROR_RAD, 0.1), (LEAST_GROWTH, 0.1), DOUBLING_LIMITS_M]
)
SMALLEST_STEP = 0.02
"""Limits of the values of a :class:`PoseCovariance`, and the step of their logarithms that ends the search."""
FACTOR_LIMITS = 1.0, 5.0
"""Limits of the factor on a fitted covariance at which its normalised errors are right; heavy tails make it small."""
PATCH_SCALE_LIMITS = 0.008, 1.5  # in the light of the demo's second walk, 0.006 as by its own views is too small
ABSURD_COVARIANCE_SCALE = 300.0
"""Limit on the calibrated scale of aligned poses' covariances. Measured: 0.1 to 45 in maps of right data, 834 where
depth was read five times too small."""


@dataclass(frozen=True, eq=False)
class PoseErrors:
    """Errors of aligned poses of held-out views."""

    errors: NDArray[np.float64]
    """(N, 6) tangent errors."""
    covariances: NDArray[np.float64]
    """(N, 6, 6) covariances by the points alone, unscaled."""
    distances_m: NDArray[np.float64]
    """(N,) distances from the nearest view that each was aligned with."""
    disagreements: NDArray[np.float64]
    """(N, 6, 6) covariances by which the views disagree that each was aligned with."""

    @classmethod
    def of(cls, aligned: Sequence[tuple[Matrix, Alignment]], own: RefinerSettings, raw: bool = False) -> PoseErrors:
        """Return the errors of alignments after their true poses, made with settings ``own``; raw: before patches."""
        found = [item for item in aligned if item[1].T_map_camera is not None and item[1].covariance is not None]
        errors, by_points = np.zeros((len(found), 6)), np.zeros((len(found), 6, 6))
        for k, (T_true, alignment) in enumerate(found):
            assert alignment.T_map_camera is not None and alignment.covariance is not None
            T = alignment.steps[-1].T_map_camera if raw and alignment.by_patches else alignment.T_map_camera
            errors[k] = pose_tangent_error(T, T_true)
            of_map = own.own_covariance_at(alignment.distance_m)
            scaled = alignment.covariance - of_map - alignment.disagreement - alignment.patch_noise
            by_points[k] = scaled / own.scale_at(alignment.distance_m)
        distances = np.array([alignment.distance_m for _, alignment in found])
        apart = np.array([alignment.disagreement for _, alignment in found]).reshape(-1, 6, 6)
        return cls(errors, by_points, distances, apart)

    def joined(self, other: PoseErrors) -> PoseErrors:
        """Return the errors of both."""
        both = ((getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return PoseErrors(*(np.concatenate(pair) for pair in both))


@dataclass(frozen=True)
class PoseCovariance:
    """Scale of the covariance by the points, the map's own error on each axis, and how both grow with the distance."""

    scale: float
    own_error_m: float
    own_error_rad: float
    own_error_growth: float = LEAST_GROWTH
    """Rotation, rad per metre from the nearest view."""
    doubling_m: float = DOUBLING_LIMITS_M[1]
    """Distance from the nearest view at which the scale is twice as large; it grows evenly, up to ``MEASURED_M``."""

    @classmethod
    def of(cls, near: PoseErrors, far: PoseErrors, other_passes: PoseErrors) -> PoseCovariance:
        """Return the covariance with the largest likelihood of the errors.

        Features change with the viewpoint, for all points of a view alike, so errors grow with the distance from the
        mapped views, and most in the directions that many points fix: as a common rotation. Errors of the points'
        depths move their images by the more, the further the camera is from the view: in the directions that the points
        fix badly. Views that were held out lie close to the mapped ones, and others are aligned without the nearest.
        The poses of a map's views are not exact either. Views that are aligned with their neighbours in time share the
        errors of these; where the recording passes a place again, those of another pass show them, and count instead.

        A likelihood with heavy tails finds the shape, but not the size at which 68 % of the errors are inside one
        sigma; if fewer are, all but the disagreement is multiplied by the factor at which they are.

        Args:
            near: errors of views aligned with all others.
            far: errors of views aligned without those nearer than some distances, and without their images' evidence.
            other_passes: errors of views aligned with views of other parts of the recording.
        """
        least = LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD
        if len(near.errors) < MIN_ERRORS:
            return cls(1.0, *least)
        if (usual := median_scale(normalised(near.errors, near.covariances))) > ABSURD_COVARIANCE_SCALE:
            return cls(usual, *least)
        errors = far.joined(other_passes if len(other_passes.errors) >= MIN_ERRORS else near)
        starts = [cls(k * usual, 1e-3, 1e-3, 1e-3, 1.0)._most_likely(errors) for k in STARTING_SCALES]
        best = max(starts, key=lambda found: found.likelihood(errors))
        return best._times(right_factor(errors.errors, lambda k: best._times(k).total(errors), FACTOR_LIMITS))

    def total(self, errors: PoseErrors) -> NDArray[np.float64]:
        """Return the covariances (N, 6, 6) of poses."""
        turned = self.own_error_rad**2 + (self.own_error_growth * errors.distances_m) ** 2
        own = np.stack([np.full_like(turned, self.own_error_m**2)] * 3 + [turned] * 3, axis=1)
        scales = self.scale * (1.0 + np.minimum(errors.distances_m, MEASURED_M) / self.doubling_m)
        return scales[:, None, None] * errors.covariances + errors.disagreements + own[:, :, None] * np.eye(6)

    def covered(self, errors: PoseErrors, axes: slice = slice(0, 6)) -> float:
        """Return the share of axis errors inside one sigma."""
        return covered(errors.errors, self.total(errors), axes)

    def likelihood(self, errors: PoseErrors) -> float:
        """Return the mean log-likelihood under a multivariate t distribution, up to a constant."""
        total = self.total(errors)
        tails = 0.5 * (FREEDOM + 6) * np.log1p(normalised(errors.errors, total) / FREEDOM)
        return float((-0.5 * np.linalg.slogdet(total)[1] - tails).mean())

    def _most_likely(self, errors: PoseErrors) -> PoseCovariance:
        """Return the nearest maximum of the likelihood, by a search along the logarithms of the values in turns."""
        low, high = np.log(VALUE_LIMITS).T
        values = np.clip(np.log([getattr(self, item.name) for item in fields(self)]), low, high)
        step = np.full(len(values), 0.7)
        best = self.likelihood(errors)
        while step.max() > SMALLEST_STEP:
            for k in range(len(values)):
                for sign in (1.0, -1.0):
                    tried = values.copy()
                    tried[k] = np.clip(tried[k] + sign * step[k], low[k], high[k])
                    found = PoseCovariance(*np.exp(tried)).likelihood(errors)
                    if found > best + 1e-6:
                        values, best = tried, found
                        break
                else:
                    step[k] *= 0.6
        return PoseCovariance(*(float(value) for value in np.exp(values)))

    def _times(self, factor: float) -> PoseCovariance:
        """Return the covariance with all but the disagreement multiplied by a factor."""
        wider = (factor, *[math.sqrt(factor)] * 3, 1.0)
        values = np.clip([k * v for k, v in zip(wider, astuple(self), strict=True)], *VALUE_LIMITS.T)
        return PoseCovariance(*(float(value) for value in values))


def patch_covariance_scale(
    aligned: Sequence[tuple[Matrix, Alignment]], own: RefinerSettings, covariance: PoseCovariance
) -> float:
    """Return the factor on calibrated covariances at which poses improved by patches, made with ``own``, are right."""
    used = [item for item in aligned if item[1].by_patches and item[1].covariance is not None]
    if len(used) < MIN_ERRORS:
        return 1.0
    found = PoseErrors.of(used, own)
    total, noise = covariance.total(found), np.array([item[1].patch_noise for item in used])
    return right_factor(found.errors, lambda k: k * total + noise, PATCH_SCALE_LIMITS)


def right_factor(
    errors: NDArray[np.float64], covariances: Callable[[float], NDArray[np.float64]], limits: tuple[float, float]
) -> float:
    """Return the factor at which covariances (N, 6, 6) are right for errors (N, 6).

    It is the mean, of the logarithms, of those at which the median of normalised errors is right, and at which 68 % of
    the axes are inside one sigma: heavy tails make them differ.
    """
    factors = np.geomspace(*limits, 100)
    tried = [covariances(k) for k in factors]
    by_median = [abs(math.log(median_scale(normalised(errors, total)))) for total in tried]
    by_coverage = [abs(covered(errors, total, slice(0, 6)) - ONE_SIGMA) for total in tried]
    return math.sqrt(float(factors[np.argmin(by_median)] * factors[np.argmin(by_coverage)]))
