# SPDX-License-Identifier: Apache-2.0
"""Covariance of a map's poses, fitted to the errors of views whose pose is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import (
    at_least,
    camera_frame,
    covered,
    median_scale,
    normalised,
    pose_tangent_error,
    sideways_factors,
)
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
DOUBLING_LIMITS_M, SIDEWAYS_LIMITS = (0.03, 30.0), (0.67, 1.5)
STARTING_SCALES = 0.1, 0.5, 2.0, 8.0
VALUE_LIMITS = np.array(
    [
        (1e-3, 1e3),
        (LEAST_OWN_ERROR_M, 0.1),
        (LEAST_OWN_ERROR_RAD, 0.1),
        (LEAST_GROWTH, 0.1),
        DOUBLING_LIMITS_M,
        SIDEWAYS_LIMITS,
    ]
)
SMALLEST_STEP = 0.02
"""Limits of the values of a :class:`PoseCovariance`, and the step of their logarithms that ends the search."""
FACTOR_LIMITS = 1.0, 5.0
"""Limits of the factor on a fitted covariance at which its normalised errors are right; heavy tails make it small."""
PATCH_SCALE_LIMITS = 0.001, 1.5
"""Limits of the factor of patches. The demo's own views want less; seven other walks through its room are right at
0.001 (median NEES 5.4)."""
ABSURD_COVARIANCE_SCALE = 300.0
"""Limit on the calibrated scale of aligned poses' covariances. Measured: 0.1 to 45 in maps of right data, 834 where
depth was read five times too small."""


@dataclass(frozen=True, eq=False)
class AlignedView:
    """Alignment of a view whose pose is known, and what the check of such a pose adds to its covariance."""

    T_true: Matrix
    """(4, 4) T_map_camera."""
    alignment: Alignment
    moments: Matrix = field(default_factory=lambda: np.zeros((6, 6)))
    """(6, 6) second moments of the pose by what is not known of the camera."""
    variances: Matrix = field(default_factory=lambda: np.zeros(6))
    """(6,) variances that cover the displacements of the image's blocks."""


@dataclass(frozen=True, eq=False)
class PoseErrors:
    """Errors of aligned poses of held-out views, in their camera frames."""

    errors: NDArray[np.float64]
    """(N, 6) tangent errors."""
    covariances: NDArray[np.float64]
    """(N, 6, 6) covariances by the points alone, unscaled."""
    distances_m: NDArray[np.float64]
    """(N,) distances from the nearest view that each was aligned with."""
    disagreements: NDArray[np.float64]
    """(N, 6, 6) covariances by which the views disagree that each was aligned with."""
    moments: NDArray[np.float64]
    """(N, 6, 6) as in :class:`AlignedView`."""
    variances: NDArray[np.float64]
    """(N, 6) as in :class:`AlignedView`."""

    @classmethod
    def of(cls, aligned: Sequence[AlignedView], own: RefinerSettings, raw: bool = False) -> PoseErrors:
        """Return the errors of alignments made with settings ``own``; raw: before patches."""
        found = [view for view in aligned if view.alignment.covariance is not None]
        errors, (by_points, apart, moments) = np.zeros((len(found), 6)), np.zeros((3, len(found), 6, 6))
        factors = sideways_factors(own.sideways)
        shape = np.outer(factors, factors)
        for k, view in enumerate(found):
            alignment = view.alignment
            assert alignment.T_map_camera is not None and alignment.covariance is not None
            T = alignment.steps[-1].T_map_camera if raw and alignment.by_patches else alignment.T_map_camera
            turn = camera_frame(T)
            errors[k], apart[k] = turn @ pose_tangent_error(T, view.T_true), turn @ alignment.disagreement @ turn.T
            total = turn @ (alignment.covariance - alignment.patch_noise) @ turn.T / shape
            scaled = total - own.own_covariance_at(alignment.distance_m) - apart[k]
            by_points[k] = scaled / own.scale_at(alignment.distance_m)
            moments[k] = turn @ view.moments @ turn.T
        distances = np.array([view.alignment.distance_m for view in found])
        variances = np.array([view.variances for view in found]).reshape(-1, 6)
        return cls(errors, by_points, distances, apart, moments, variances)

    def checked(self, totals: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return covariances (N, 6, 6) with what the check of a pose adds, as poses are published."""
        pairs = zip(totals + self.moments, self.variances, strict=True)
        return np.array([at_least(total, least) if least.any() else total for total, least in pairs])

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
    sideways: float = 1.0
    """Factor on standard deviations sideways, and divisor of those upwards, see ``stretched``."""

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
        sigma; if fewer are, all but the disagreement is multiplied by the factor at which they are. What the check of a
        pose adds to its covariance counts there, as the errors hold it already.

        How much larger errors are sideways than upwards is a property of the recording, such as of the way its camera
        moved and turned. The points alone do not tell it, so it has a factor.

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
        published = partial(best._published, errors)
        return best._times(right_factor(errors.errors, published, FACTOR_LIMITS))

    def total(self, errors: PoseErrors) -> NDArray[np.float64]:
        """Return the covariances (N, 6, 6) of poses."""
        turned = self.own_error_rad**2 + (self.own_error_growth * errors.distances_m) ** 2
        own = np.stack([np.full_like(turned, self.own_error_m**2)] * 3 + [turned] * 3, axis=1)
        scales = self.scale * (1.0 + np.minimum(errors.distances_m, MEASURED_M) / self.doubling_m)
        total = scales[:, None, None] * errors.covariances + errors.disagreements + own[:, :, None] * np.eye(6)
        factors = sideways_factors(self.sideways)
        return np.outer(factors, factors) * total

    def _published(self, errors: PoseErrors, factor: float) -> NDArray[np.float64]:
        """Return the covariances (N, 6, 6) of poses after the check, with those by the alignment times a factor."""
        return errors.checked(self._times(factor).total(errors))

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
        wider = (factor, *[math.sqrt(factor)] * 3, 1.0, 1.0)
        values = np.clip([k * v for k, v in zip(wider, astuple(self), strict=True)], *VALUE_LIMITS.T)
        return PoseCovariance(*(float(value) for value in values))


def patch_covariance_scale(aligned: Sequence[AlignedView], own: RefinerSettings, covariance: PoseCovariance) -> float:
    """Return the factor on calibrated covariances at which poses improved by patches, made with ``own``, are right."""
    used = [view for view in aligned if view.alignment.by_patches and view.alignment.covariance is not None]
    if len(used) < MIN_ERRORS:
        return 1.0
    found = PoseErrors.of(used, own)
    total = covariance.total(found)
    poses = [view.alignment.T_map_camera for view in used]
    turns = np.array([camera_frame(T) for T in poses if T is not None])
    noise = turns @ np.array([view.alignment.patch_noise for view in used]) @ np.swapaxes(turns, 1, 2)
    return right_factor(found.errors, lambda k: found.checked(k * total + noise), PATCH_SCALE_LIMITS)


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
