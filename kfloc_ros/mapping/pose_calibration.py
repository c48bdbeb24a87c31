# SPDX-License-Identifier: Apache-2.0
"""Calibration of a map's poses on held-out views: covariances, acceptance thresholds, confidence, the map's own error.

The covariance of poses is chosen such that 68 % of the errors are inside one sigma on every axis, and the acceptance
threshold such that good alignments pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.covariance import mahalanobis, pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import GOOD_DEG, GOOD_M
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.cost import RobustLoss
from kfloc_ros.pixloc.optimizer import MEASURED_M, RefinerSettings
from kfloc_ros.pixloc.patches import PatchAligner
from kfloc_ros.pixloc.references import view_distances
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment, Frame

CHI2_6_MEDIAN, CHI2_6_90 = 5.348, 10.645
"""Median and 90 % quantile of the chi-square distribution with 6 degrees of freedom."""
ONE_SIGMA = 0.6827
MOST_COVERED = 0.72
"""Largest share of axis errors inside one sigma of a covariance that is not too careful."""
FREEDOM = 4.0
"""Degrees of freedom of the t distribution of normalised errors; outliers then count little."""
LEAST_SHARE = 0.2
"""Smallest scale of the covariance by the points, relative to the one that explains the errors alone."""
MIN_ERRORS = 8
"""Fewest errors that a covariance is fitted to."""
SIGMA_LIMITS = 1e-5, 0.3
LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD = 3e-4, 2e-4
"""Smallest own error of a map. Views held out of a recording lie between its references; those of another walk, even
in a rendered room without noise, have errors that are larger by this."""
FIT_SCALE_LIMITS = 0.5, 100.0
LEFT_OUT_M = 0.15, 0.45
"""Distances within which reference views are left out, to measure how errors grow away from the mapped views (a radian
counts as half a metre). Patches gain most near a view, so their factor is fitted to poses without it, too."""
DOUBLING_M = tuple(0.06 * 2.0**k for k in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0))
"""Distances that are tried for :attr:`PoseCovariance.doubling_m`, besides none."""
PATCH_SCALE_LIMITS = 0.02, 1.0  # in the light of the demo's second walk, 0.008 as by its held-out views is too small
OTHER_PASS_FRAMES, OTHER_PASS_M = 60, 0.25
"""A view of another part of the recording is more frames away than the first, and nearer than the second (a radian
counts as half a metre)."""
_POSITION, _ROTATION = slice(0, 3), slice(3, 6)
ABSURD_COVARIANCE_SCALE = 300.0
"""Limit on the calibrated scale of aligned poses' covariances. Measured: 0.5 to 44 in maps of right data, 834 where
depth was read five times too small."""
MIN_WRONG, MAX_MIRRORED = 5, 20  # fewest wrong poses of a threshold; most mirrored views that are localized
RATIO_LIMITS = 0.1, 0.5
NEAR_M, NEAR_DEG = 0.05, 5.0
"""Errors below which a held-out view counts as localized in the description of the map."""
WRONG_START = make_pose(so3_exp(np.array([0.0, 0.5, 0.0])), np.array([0.5, 0.0, 0.0]))
"""Pose relative to a view from which the alignment cannot converge: its result is wrong."""


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
            scaled = alignment.covariance - own.own_covariance - alignment.disagreement - alignment.patch_noise
            by_points[k] = scaled / own.scale_at(alignment.distance_m)
        distances = np.array([alignment.distance_m for _, alignment in found])
        apart = np.array([alignment.disagreement for _, alignment in found]).reshape(-1, 6, 6)
        return cls(errors, by_points, distances, apart)

    def grown(self, doubling_m: float) -> PoseErrors:
        """Return the errors with covariances that grow with the distance."""
        growth = 1.0 + np.minimum(self.distances_m, MEASURED_M) / doubling_m
        return replace(self, covariances=growth[:, None, None] * self.covariances)

    def joined(self, other: PoseErrors) -> PoseErrors:
        """Return the errors of both."""
        both = ((getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return PoseErrors(*(np.concatenate(pair) for pair in both))

    def covered(self, scale: float, sigma: float, axes: slice) -> float:
        """Return the share of axis errors inside one sigma, with ``sigma`` in addition on the chosen axes."""
        total = scale * self.covariances + self.disagreements
        variances = np.diagonal(total, axis1=1, axis2=2)[:, axes] + sigma**2
        return float((self.errors[:, axes] ** 2 < variances).mean())

    def needed_sigma(self, scale: float, axes: slice) -> float:
        """Return the sigma with which 68 % of the axis errors are inside one sigma; 0 if they are without."""
        if self.covered(scale, 0.0, axes) >= ONE_SIGMA:
            return 0.0
        low, high = SIGMA_LIMITS
        for _ in range(30):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.covered(scale, middle, axes) >= ONE_SIGMA else (middle, high)
        return high

    @property
    def median_scale(self) -> float:
        """Scale of the covariances at which the median of the normalised squared errors is right."""
        return median_scale(
            [float(e @ np.linalg.solve(C, e)) for e, C in zip(self.errors, self.covariances, strict=True)]
        )

    def likelihood(self, scale: float, sigma_m: float, sigma_rad: float) -> float:
        """Return the mean log-likelihood under a multivariate t distribution, up to a constant."""
        own = np.diag(np.repeat([sigma_m**2, sigma_rad**2], 3))
        total = scale * self.covariances + self.disagreements + own
        nees = np.einsum("ni,ni->n", self.errors, np.linalg.solve(total, self.errors[:, :, None])[:, :, 0])
        tails = 0.5 * (FREEDOM + 6) * np.log1p(nees / FREEDOM)
        return float((-0.5 * np.linalg.slogdet(total)[1] - tails).mean())


@dataclass(frozen=True)
class PoseCovariance:
    """Scale of the covariance by the points, its growth with distance, and the map's own error on each axis."""

    scale: float
    own_error_m: float
    own_error_rad: float
    doubling_m: float = Calibration().covariance_doubling_m
    """Distance from the nearest view at which the scale is twice as large."""

    @classmethod
    def of(cls, near: PoseErrors, far: PoseErrors, other_passes: PoseErrors) -> PoseCovariance:
        """Return the covariance that covers 68 % of the errors on every axis and is the most likely of these.

        Features change with the viewpoint, so errors grow with the distance from the mapped views: views that were
        held out lie close to them, and are also aligned without the nearest. The poses of a map's views are not exact
        either. Views that are aligned with their neighbours in time share the errors of these; those of another pass
        through the place show them.

        Args:
            near: errors of views aligned with all others.
            far: errors of views aligned without the nearest.
            other_passes: errors of views aligned with views of other parts of the recording.
        """
        least = LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD
        if len(near.errors) < MIN_ERRORS:
            return cls(1.0, *least)
        if (usual := near.median_scale) > ABSURD_COVARIANCE_SCALE:
            return cls(usual, *least)
        found: list[tuple[bool, float, PoseCovariance]] = []
        for doubling_m in (cls.doubling_m, *DOUBLING_M):
            errors = near.joined(far).grown(doubling_m)
            for scale in errors.median_scale * np.geomspace(LEAST_SHARE, 2.0, 18):
                sigma_m, sigma_rad = (errors.needed_sigma(scale, axes) for axes in (_POSITION, _ROTATION))
                covered = [errors.covered(scale, s, axes) for s, axes in ((sigma_m, _POSITION), (sigma_rad, _ROTATION))]
                candidate = cls(float(scale), sigma_m, sigma_rad, doubling_m)
                found.append((max(covered) <= MOST_COVERED, errors.likelihood(scale, sigma_m, sigma_rad), candidate))
        best = max(found, key=lambda item: item[:2])[2]
        own = [best.own_error_m, best.own_error_rad]
        if len(other_passes.errors) >= MIN_ERRORS:
            others = other_passes.grown(best.doubling_m)
            needed = (others.needed_sigma(best.scale, axes) for axes in (_POSITION, _ROTATION))
            own = [max(pair) for pair in zip(own, needed, strict=True)]
        return replace(best, own_error_m=max(own[0], least[0]), own_error_rad=max(own[1], least[1]))


def calibrate_poses(draft: SceneMap, held_out: Sequence[HeldOut], device: str) -> tuple[Calibration, str]:
    """Run the localizer; fit the covariance, the camera's scale and the thresholds; also return the accuracy as text.

    The threshold is midway between the 95th percentile of the costs of good alignments and the 5th percentile of wrong
    ones. Query views differ more from the references than held-out mapping views do, so the threshold must not be close
    to the good ones.
    """
    views, stamps_ns = [held.view for held in held_out], [held.stamp_ns for held in held_out]
    localizer = Localizer(draft, LocalizerConfig(device=device, camera_check="off", carry_s=0.0))
    coarse, refined, costs, ratios, errors, cameras, apart, far, others = [], [], [], [], [], [], [], [], []
    for view, stamp in zip(views, stamps_ns, strict=True):
        localization = localizer.process(Frame(view.image, view.camera, stamp, view.index))
        estimate, features = localization.estimate, localization.features
        if estimate.coarse is not None and estimate.coarse.success:
            coarse.append(mahalanobis(view.T_map_camera, estimate.coarse.T_map_camera, estimate.coarse.covariance))
            if is_good(view.T_map_camera, estimate.coarse.T_map_camera):
                ratios.append(estimate.coarse.inlier_ratio)
        errors.append(_error(view.T_map_camera, estimate.T_map_camera))
        alignment = estimate.alignment
        if alignment is not None and alignment.success and is_good(view.T_map_camera, alignment.T_map_camera):
            assert alignment.T_map_camera is not None
            refined.append((view.T_map_camera, alignment))
            costs.append(alignment.final_cost)
            fitted = localizer.refiner.fit_camera(features.to(choose_device(device)), alignment.T_map_camera)
            if fitted is not None:
                cameras.append(float(fitted.fit.offsets @ fitted.fit.information @ fitted.fit.offsets))
        references, on_device = localizer.refiner.references, features.to(choose_device(device))
        distances = view_distances(references.T_map_camera, view.T_map_camera)
        less, more = (_aligned_with(distances >= m, localizer.refiner, view, on_device) for m in LEFT_OUT_M)
        apart += less
        far += less + more
        others_in_time = np.abs(np.array(references.ids) - view.index) > OTHER_PASS_FRAMES
        if (distances[others_in_time] <= OTHER_PASS_M).any():
            others += _aligned_with(others_in_time, localizer.refiner, view, on_device)
    draft.head.to("cpu")
    own = localizer.refiner.settings
    covariance = PoseCovariance.of(*(PoseErrors.of(aligned, own, True) for aligned in (refined, far, others)))
    found = replace(
        draft.calibration,
        patch_covariance_scale=patch_covariance_scale([*refined, *apart, *others], own, covariance),
        coarse_covariance_scale=median_scale(coarse),
        refined_covariance_scale=covariance.scale,
        covariance_doubling_m=covariance.doubling_m,
        own_error_m=covariance.own_error_m,
        own_error_rad=covariance.own_error_rad,
        camera_fit_scale=camera_fit_scale(cameras),
        max_alignment_cost=_threshold(costs, _wrong_costs(draft, views, device)),
        min_inlier_ratio=_ratio_threshold(ratios, _mirrored_ratios(draft, views, stamps_ns, device)),
    )
    return found, _accuracy(errors)


def _aligned_with(
    chosen: NDArray[np.bool_], refiner: Refiner, view: View, features: BackboneFeatures
) -> list[tuple[Matrix, Alignment]]:
    """Return the true pose of a view and its alignment with chosen reference views; nothing if it fails."""
    if not chosen.any():
        return []
    others = refiner.references.selected([int(k) for k in np.flatnonzero(chosen)])
    alignment = Refiner(others, refiner.camera, refiner.settings).align(features, [view.T_map_camera])
    alignment = PatchAligner(others, refiner.camera).improved(view.image, alignment)
    is_right = alignment.success and is_good(view.T_map_camera, alignment.T_map_camera)
    return [(view.T_map_camera, alignment)] if is_right else []


def patch_covariance_scale(
    aligned: Sequence[tuple[Matrix, Alignment]], own: RefinerSettings, covariance: PoseCovariance
) -> float:
    """Return the factor on calibrated covariances at which poses improved by patches, made with ``own``, are right."""
    used = [item for item in aligned if item[1].by_patches and item[1].covariance is not None]
    if len(used) < MIN_ERRORS:
        return 1.0
    errors = PoseErrors.of(used, own).grown(covariance.doubling_m)
    own_error = np.diag(np.repeat([covariance.own_error_m**2, covariance.own_error_rad**2], 3))
    total = covariance.scale * errors.covariances + errors.disagreements + own_error
    noise, factors = np.array([item[1].patch_noise for item in used]), np.geomspace(*PATCH_SCALE_LIMITS, 80)
    scaled = [replace(errors, covariances=k * total + noise, disagreements=0.0 * noise) for k in factors]
    by_median = np.argmin([abs(math.log(one.median_scale)) for one in scaled])
    by_coverage = np.argmin([abs(one.covered(1.0, 0.0, slice(0, 6)) - ONE_SIGMA) for one in scaled])
    return float(factors[min(by_median, by_coverage)])  # heavy tails make them differ


def camera_fit_scale(squared: Sequence[float]) -> float:
    """Return the factor on the covariance of fitted cameras at which their squared Mahalanobis lengths are chi-square.

    The larger of those by the median and by the 90 % quantile: a right camera must not be called wrong.
    """
    if len(squared) < MIN_ERRORS:
        return Calibration().camera_fit_scale
    by_median, by_tail = np.quantile(squared, (0.5, 0.9)) / (CHI2_6_MEDIAN, CHI2_6_90)
    return float(np.clip(max(by_median, by_tail), *FIT_SCALE_LIMITS))


def _wrong_costs(draft: SceneMap, views: Sequence[View], device: str) -> list[float]:
    """Return the costs of alignments that converged to a wrong pose."""
    target = choose_device(device)
    backbone = Backbone(device=target, runtime="auto")
    settings = RefinerSettings(max_cost=math.inf)
    refiner = Refiner(draft.references.to(target), draft.camera, settings)
    wrong = []
    for view in views:
        alignment = refiner.align(backbone.extract(view.image), [view.T_map_camera @ WRONG_START])
        if alignment.success and not is_good(view.T_map_camera, alignment.T_map_camera):
            wrong.append(alignment.final_cost)
    return wrong


def _mirrored_ratios(draft: SceneMap, views: Sequence[View], stamps_ns: Sequence[int], device: str) -> list[float]:
    """Return inlier ratios of coarse poses of mirrored views: they look similar to the map, but are not in it."""
    localizer = Localizer(draft, LocalizerConfig(device=device, filter=False))
    ratios = []
    for i in range(0, len(views), max(len(views) // MAX_MIRRORED, 1)):
        image = np.ascontiguousarray(views[i].image[:, ::-1])
        ratios.append(localizer.coarse_half(Frame(image, views[i].camera, stamps_ns[i])).pose.inlier_ratio)
    draft.head.to("cpu")
    return ratios


def _ratio_threshold(good: Sequence[float], wrong: Sequence[float]) -> float:
    """Return the threshold midway between the inlier ratios of good and wrong coarse poses, without 5 % of each set."""
    if len(good) < MIN_WRONG or len(wrong) < MIN_WRONG:
        return Calibration().min_inlier_ratio
    return float(np.clip((np.quantile(good, 0.05) + np.quantile(wrong, 0.95)) / 2, *RATIO_LIMITS))


def _threshold(good: Sequence[float], wrong: Sequence[float]) -> float:
    unrelated = float(RobustLoss(RefinerSettings().loss_scale).value(torch.tensor(2.0)))  # of orthogonal features
    if not good:
        return unrelated
    highest = float(np.quantile(good, 0.95))
    lowest = float(np.quantile(wrong, 0.05)) if len(wrong) >= MIN_WRONG else unrelated
    return max((highest + lowest) / 2, highest)


def _error(T_true: Matrix, T: Matrix | None) -> tuple[float, float]:
    """Return the position error in metres and the rotation error in degrees; infinite without a pose."""
    if T is None:
        return math.inf, math.inf
    error = pose_tangent_error(T, T_true)
    return float(np.linalg.norm(error[:3])), float(np.degrees(np.linalg.norm(error[3:])))


def is_good(T_true: Matrix, T: Matrix | None) -> bool:
    """Return true if the error of a pose is below 10 cm and 5 deg."""
    metres, degrees = _error(T_true, T)
    return metres < GOOD_M and degrees < GOOD_DEG


def _accuracy(errors: Sequence[tuple[float, float]]) -> str:
    """Return the accuracy on held-out views, for ``kfloc map info``."""
    good = sum(metres < NEAR_M and degrees < NEAR_DEG for metres, degrees in errors)
    text = f"{good} of {len(errors)} views within {100 * NEAR_M:g} cm and {NEAR_DEG:g} deg"
    posed = np.array([error for error in errors if math.isfinite(error[0])])
    return (
        text if not len(posed) else text + ", median {:.1f} cm, {:.2f} deg".format(*np.median(posed, axis=0) * (100, 1))
    )


def median_scale(squared: Sequence[float]) -> float:
    finite = np.asarray(squared)[np.isfinite(squared)] if len(squared) else np.zeros(0)
    if len(finite) < 5:
        return 1.0
    return float(np.clip(np.median(finite) / CHI2_6_MEDIAN, 1e-3, 1e6))
