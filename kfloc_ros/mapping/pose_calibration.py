# SPDX-License-Identifier: Apache-2.0
"""Calibration of a map's poses on held-out views: covariances, acceptance thresholds, confidence, the map's own error.

The covariance of poses is the one that makes their errors most likely, and the acceptance threshold is such that good
alignments pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import choose_device
from kfloc_ros.evaluation.metrics import PoseError, pose_error
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.covariance import covered, mahalanobis, median_scale, normalised, pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import is_good
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.cost import RobustLoss
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.patches import PatchAligner
from kfloc_ros.pixloc.references import view_distances
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment, Frame

CHI2_6_90 = 10.645
"""90 % quantile of the chi-square distribution with 6 degrees of freedom."""
ONE_SIGMA = 0.6827
FREEDOM = 4.0
"""Degrees of freedom of the t distribution of normalised errors; outliers then count little."""
MIN_ERRORS = 8
"""Fewest errors that a covariance is fitted to."""
LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD, LEAST_GROWTH = 3e-4, 2e-4, 8e-4
"""Smallest own error of a map, and its growth. Views held out of a recording lie between its references, and share
their drift; those of another walk, even in a rendered room without noise, have errors that are larger by this."""
SIGMA_LIMIT, STARTING_SCALES = 0.3, (0.1, 0.5, 2.0, 8.0)
VALUE_LIMITS = np.array([(1e-3, 1e3), (LEAST_OWN_ERROR_M, 0.1), (LEAST_OWN_ERROR_RAD, 0.1), (LEAST_GROWTH, 0.1)])
SMALLEST_STEP = 0.02
"""Limits of the values of a :class:`PoseCovariance`, and the step of their logarithms that ends the search."""
PATCH_SCALE_LIMITS = 0.01, 1.0  # in the light of the demo's second walk, 0.006 as by its held-out views is too small
ABSURD_COVARIANCE_SCALE = 300.0
"""Limit on the calibrated scale of aligned poses' covariances. Measured: 0.1 to 45 in maps of right data, 834 where
depth was read five times too small."""
_POSITION, _ROTATION = slice(0, 3), slice(3, 6)
SHIFT_LIMITS, USUAL_QUANTILE = (2.0, 4.0), 0.95
"""Limits of the displacement of blocks that right poses have in a map, and its quantile among held-out views."""
FIT_SCALE_LIMITS = 0.5, 100.0
LEFT_OUT_M = 0.15, 0.45, 0.8
"""Distances (``view_distances``) within which reference views are left out, to measure how errors grow away from the
mapped views. Patches gain most near a view, so their factor is fitted to poses without the views within the first."""
OTHER_PASS_FRAMES, OTHER_PASS_M = 60, 0.25
"""A view of another part of the recording is more frames away than the first, and nearer than the second (a radian
counts as half a metre)."""
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
    """Scale of the covariance by the points, the map's own error on each axis, and its growth with the distance."""

    scale: float
    own_error_m: float
    own_error_rad: float
    own_error_growth: float = LEAST_GROWTH
    """Rotation, rad per metre from the nearest view."""

    @classmethod
    def of(cls, near: PoseErrors, far: PoseErrors, other_passes: PoseErrors) -> PoseCovariance:
        """Return the covariance with the largest likelihood of the errors.

        Features change with the viewpoint, for all points of a view alike, so errors grow with the distance from the
        mapped views, and most in the directions that many points fix: as a common rotation. Views that were held out
        lie close to the mapped ones, and are also aligned without the nearest. The poses of a map's views are not exact
        either. Views that are aligned with their neighbours in time share the errors of these; those of another pass
        through the place show them.

        Args:
            near: errors of views aligned with all others.
            far: errors of views aligned without the nearest.
            other_passes: errors of views aligned with views of other parts of the recording; 68 % are covered.
        """
        least = LEAST_OWN_ERROR_M, LEAST_OWN_ERROR_RAD
        if len(near.errors) < MIN_ERRORS:
            return cls(1.0, *least)
        if (usual := median_scale(normalised(near.errors, near.covariances))) > ABSURD_COVARIANCE_SCALE:
            return cls(usual, *least)
        errors = near.joined(far)
        starts = [cls(k * usual, 1e-3, 1e-3, 1e-3)._most_likely(errors) for k in STARTING_SCALES]
        best = max(starts, key=lambda found: found.likelihood(errors))
        if len(other_passes.errors) >= MIN_ERRORS:
            best = best._covering(other_passes, "own_error_m", _POSITION)
            best = best._covering(other_passes, "own_error_rad", _ROTATION)
        return best

    def total(self, errors: PoseErrors) -> NDArray[np.float64]:
        """Return the covariances (N, 6, 6) of poses."""
        turned = self.own_error_rad**2 + (self.own_error_growth * errors.distances_m) ** 2
        own = np.stack([np.full_like(turned, self.own_error_m**2)] * 3 + [turned] * 3, axis=1)
        return self.scale * errors.covariances + errors.disagreements + own[:, :, None] * np.eye(6)

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
        values, step = np.clip(np.log([getattr(self, item.name) for item in fields(self)]), low, high), np.full(4, 0.7)
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

    def _covering(self, errors: PoseErrors, name: str, axes: slice) -> PoseCovariance:
        """Return the covariance with an own error that covers 68 % of the errors on some axes."""
        low, high = getattr(self, name), SIGMA_LIMIT
        if self.covered(errors, axes) >= ONE_SIGMA:
            return self
        for _ in range(30):
            middle = math.sqrt(low * high)
            is_enough = replace(self, **{name: middle}).covered(errors, axes) >= ONE_SIGMA
            low, high = (low, middle) if is_enough else (middle, high)
        return replace(self, **{name: high})


def calibrate_poses(draft: SceneMap, held_out: Sequence[HeldOut], device: str) -> tuple[Calibration, str]:
    """Run the localizer; fit the covariance, the camera's scale and the thresholds; also return the accuracy as text.

    The threshold is midway between the 95th percentile of the costs of good alignments and the 5th percentile of wrong
    ones. Query views differ more from the references than held-out mapping views do, so the threshold must not be close
    to the good ones.
    """
    views, stamps_ns = [held.view for held in held_out], [held.stamp_ns for held in held_out]
    localizer = Localizer(draft, LocalizerConfig(device=device, camera_check="off", carry_s=0.0))
    coarse, refined, costs, ratios, errors, cameras, others = [], [], [], [], [], [], []
    left_out: list[list[tuple[Matrix, Alignment]]] = [[] for _ in LEFT_OUT_M]
    shifts: list[float] = []
    for view, stamp in zip(views, stamps_ns, strict=True):
        localization = localizer.process(Frame(view.image, view.camera, stamp, view.index))
        estimate, features = localization.estimate, localization.features
        if estimate.coarse is not None and estimate.coarse.success:
            coarse.append(mahalanobis(view.T_map_camera, estimate.coarse.T_map_camera, estimate.coarse.covariance))
            if is_good(view.T_map_camera, estimate.coarse.T_map_camera):
                ratios.append(estimate.coarse.inlier_ratio)
        errors.append(pose_error(estimate.T_map_camera, view.T_map_camera))
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
        for found, least_m in zip(left_out, LEFT_OUT_M, strict=True):
            of_usual = shifts if least_m < LEFT_OUT_M[-1] else []
            found += _aligned_with(distances >= least_m, localizer.refiner, view, on_device, of_usual)
        others_in_time = np.abs(np.array(references.ids) - view.index) > OTHER_PASS_FRAMES
        if (distances[others_in_time] <= OTHER_PASS_M).any():
            others += _aligned_with(others_in_time, localizer.refiner, view, on_device, [])
    draft.head.to("cpu")
    own = localizer.refiner.settings
    far = [item for found in left_out for item in found]
    covariance = PoseCovariance.of(*(PoseErrors.of(aligned, own, True) for aligned in (refined, far, others)))
    calibration = replace(
        draft.calibration,
        patch_covariance_scale=patch_covariance_scale([*left_out[0], *others], own, covariance),
        coarse_covariance_scale=median_scale(coarse),
        refined_covariance_scale=covariance.scale,
        own_error_m=covariance.own_error_m,
        own_error_rad=covariance.own_error_rad,
        own_error_growth=covariance.own_error_growth,
        usual_shift_chi2=usual_shift_chi2(shifts),
        camera_fit_scale=camera_fit_scale(cameras),
        max_alignment_cost=_threshold(costs, _wrong_costs(draft, views, device)),
        min_inlier_ratio=_ratio_threshold(ratios, _mirrored_ratios(draft, views, stamps_ns, device)),
    )
    return calibration, _accuracy(errors)


def _aligned_with(
    chosen: NDArray[np.bool_], refiner: Refiner, view: View, features: BackboneFeatures, shifts: list[float]
) -> list[tuple[Matrix, Alignment]]:
    """Return the true pose of a view and its alignment with chosen reference views; nothing if it fails.

    The displacement of the image's blocks at that pose is added to ``shifts``.
    """
    if not chosen.any():
        return []
    others = refiner.references.selected([int(k) for k in np.flatnonzero(chosen)])
    refiner = Refiner(others, refiner.camera, refiner.settings)
    alignment = refiner.align(features, [view.T_map_camera])
    alignment = PatchAligner(others, refiner.camera).improved(view.image, alignment)
    T = alignment.T_map_camera
    if not alignment.success or T is None or not is_good(view.T_map_camera, T):
        return []
    blocks = refiner.inspect(features, T).blocks
    if blocks is not None:
        shifts.append(blocks.shift_chi2)
    return [(view.T_map_camera, alignment)]


def patch_covariance_scale(
    aligned: Sequence[tuple[Matrix, Alignment]], own: RefinerSettings, covariance: PoseCovariance
) -> float:
    """Return the factor on calibrated covariances at which poses improved by patches, made with ``own``, are right."""
    used = [item for item in aligned if item[1].by_patches and item[1].covariance is not None]
    if len(used) < MIN_ERRORS:
        return 1.0
    found = PoseErrors.of(used, own)
    errors, total, noise = found.errors, covariance.total(found), np.array([item[1].patch_noise for item in used])
    factors = np.geomspace(*PATCH_SCALE_LIMITS, 80)
    by_median = [abs(math.log(median_scale(normalised(errors, k * total + noise)))) for k in factors]
    by_coverage = [abs(covered(errors, k * total + noise, slice(0, 6)) - ONE_SIGMA) for k in factors]
    return float(factors[min(np.argmin(by_median), np.argmin(by_coverage))])  # heavy tails make them differ


def usual_shift_chi2(found: Sequence[float]) -> float:
    """Return the displacement of blocks that right poses have in a map, from those of held-out views."""
    if len(found) < MIN_ERRORS:
        return SHIFT_LIMITS[0]
    return float(np.clip(np.quantile(found, USUAL_QUANTILE), *SHIFT_LIMITS))


def camera_fit_scale(squared: Sequence[float]) -> float:
    """Return the factor on the covariance of fitted cameras at which their squared Mahalanobis lengths are chi-square.

    The larger of those by the median and by the 90 % quantile: a right camera must not be called wrong.
    """
    if len(squared) < MIN_ERRORS:
        return Calibration().camera_fit_scale
    by_median, by_tail = median_scale(squared), float(np.quantile(squared, 0.9)) / CHI2_6_90
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


def _accuracy(errors: Sequence[PoseError]) -> str:
    """Return the accuracy on held-out views, for ``kfloc map info``."""
    good = sum(error.translation_m < NEAR_M and error.rotation_deg < NEAR_DEG for error in errors)
    text = f"{good} of {len(errors)} views within {100 * NEAR_M:g} cm and {NEAR_DEG:g} deg"
    posed = [(100 * e.translation_m, e.rotation_deg) for e in errors if math.isfinite(e.translation_m)]
    return text if not posed else text + ", median {:.1f} cm, {:.2f} deg".format(*np.median(posed, axis=0))
