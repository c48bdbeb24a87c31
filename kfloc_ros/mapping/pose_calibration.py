# SPDX-License-Identifier: Apache-2.0
"""Calibration of a map's poses on held-out views: covariances, acceptance thresholds, confidence, the map's own error.

The covariance of poses is the one that makes their errors most likely, and the acceptance threshold is such that good
alignments pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kfloc_ros.device import choose_device
from kfloc_ros.evaluation.metrics import PoseError, pose_error
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import mahalanobis, median_scale
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.camera_check import CameraCheck
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import is_good
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.checked_references import CheckedReferences
from kfloc_ros.mapping.pose_covariance import (
    MIN_ERRORS,
    AlignedView,
    PoseCovariance,
    PoseErrors,
    patch_covariance_scale,
)
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.cost import RobustLoss
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.patches import PatchAligner
from kfloc_ros.pixloc.references import ReferenceViews, view_distances
from kfloc_ros.pixloc.refiner import Inspection, Refiner
from kfloc_ros.types import Alignment, Frame

Inspected = tuple[Matrix, Alignment, Inspection]
"""True pose of a view, (4, 4), its alignment, and the comparison of the whole image at the aligned pose."""
CHI2_6_90 = 10.645
"""90 % quantile of the chi-square distribution with 6 degrees of freedom."""
SHIFT_LIMITS, USUAL_QUANTILE = (2.0, 4.0), 0.95
"""Limits of the displacement of blocks that right poses have in a map, and its quantile among held-out views."""
FIT_SCALE_LIMITS = 0.5, 100.0
LEFT_OUT_M = 0.15, 0.3, 0.6
"""Distances (``view_distances``) within which reference views and images are left out, to measure how errors grow away
from the mapped views."""
OTHER_PASS_FRAMES, OTHER_PASS_M = 60, 0.25
"""A view of another part of the recording is more frames away than the first, and nearer than the second (a radian
counts as half a metre)."""
MIN_WRONG, MAX_MIRRORED = 5, 20  # fewest wrong poses of a threshold; most mirrored views that are localized
RATIO_LIMITS = 0.1, 0.5
NEAR_M, NEAR_DEG = 0.05, 5.0
"""Errors below which a held-out view counts as localized in the description of the map."""
WRONG_START = make_pose(so3_exp(np.array([0.0, 0.5, 0.0])), np.array([0.5, 0.0, 0.0]))
"""Pose relative to a view from which the alignment cannot converge: its result is wrong."""


def calibrate_poses(
    draft: SceneMap,
    held_out: Sequence[HeldOut],
    device: str,
    checked: CheckedReferences | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[Calibration, str]:
    """Run the localizer; fit the covariance, the camera's scale and the thresholds; also return the accuracy as text.

    Held-out views come in few runs, and their neighbours in time were evidence for the points that they see. So errors
    away from the mapped views are measured all over the recording, with references checked without the images near.

    The threshold is midway between the 95th percentile of the costs of good alignments and the 5th percentile of wrong
    ones. Query views differ more from the references than held-out mapping views do, so the threshold must not be close
    to the good ones.

    Args:
        draft: map without the held-out views.
        held_out: views to localize.
        device: device of the networks.
        checked: references of the map and the images that they were checked with; None: errors away from the mapped
            views are those of held-out views without the nearest references, which profit from images near them.
        on_progress: called with the share that is done.
    """
    views, stamps_ns = [held.view for held in held_out], [held.stamp_ns for held in held_out]
    localizer = Localizer(draft, LocalizerConfig(device=device, camera_check="off", carry_s=0.0))
    coarse, refined, costs, ratios, errors, fits, others = [], [], [], [], [], [], []
    for k, (view, stamp) in enumerate(zip(views, stamps_ns, strict=True)):
        on_progress(0.3 * k / len(views))
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
            costs.append(alignment.final_cost)
            prepared = localizer.refiner.prepared(features.to(choose_device(device)), alignment.T_map_camera)
            refined.append((view.T_map_camera, alignment, localizer.refiner.inspect(prepared)))
            fitted = localizer.refiner.fit_camera(prepared)
            if fitted is not None:
                fits.append((fitted, alignment.T_map_camera))
        references, on_device = localizer.refiner.references, features.to(choose_device(device))
        others_in_time = np.abs(np.array(references.ids) - view.index) > OTHER_PASS_FRAMES
        distances = view_distances(references.T_map_camera, view.T_map_camera)
        if (distances[others_in_time] <= OTHER_PASS_M).any():
            chosen = references.selected([int(k) for k in np.flatnonzero(others_in_time)])
            others += _aligned_with(chosen, localizer.refiner, view, on_device)
    far, shifts = _aligned_away(localizer.refiner, views, device, checked, lambda share: on_progress(0.3 + 0.5 * share))
    draft.head.to("cpu")
    own, usual_chi2 = localizer.refiner.settings, usual_shift_chi2(shifts)
    fit_scale = camera_fit_scale([float(f.fit.offsets @ f.fit.information @ f.fit.offsets) for f, _ in fits])
    cameras = CameraCheck(draft.camera, fit_scale=fit_scale)
    for fitted, T in fits:
        cameras.add(fitted, T)
    of_check = partial(_after_check, cameras=cameras, camera=draft.camera, usual_chi2=usual_chi2)
    near, away, other_passes = ([of_check(*item) for item in found] for found in (refined, far, others))
    covariance = PoseCovariance.of(*(PoseErrors.of(aligned, own, True) for aligned in (near, away, other_passes)))
    calibration = replace(
        draft.calibration,
        patch_covariance_scale=patch_covariance_scale([*away, *other_passes], own, covariance),
        coarse_covariance_scale=median_scale(coarse),
        refined_covariance_scale=covariance.scale,
        own_error_m=covariance.own_error_m,
        own_error_rad=covariance.own_error_rad,
        own_error_growth=covariance.own_error_growth,
        covariance_doubling_m=covariance.doubling_m,
        sideways=covariance.sideways,
        usual_shift_chi2=usual_chi2,
        camera_fit_scale=fit_scale,
        max_alignment_cost=_threshold(costs, _wrong_costs(draft, views, device)),
        min_inlier_ratio=_ratio_threshold(ratios, _mirrored_ratios(draft, views, stamps_ns, device)),
    )
    return calibration, _accuracy(errors)


def _aligned_away(
    refiner: Refiner,
    held_out: Sequence[View],
    device: str,
    checked: CheckedReferences | None,
    on_progress: Callable[[float], None],
) -> tuple[list[Inspected], list[float]]:
    """Return true poses and alignments without what is near, and the displacement of the image's blocks."""
    target, found, shifts = choose_device(device), list[Inspected](), list[float]()
    backbone = Backbone(device=target, runtime="auto")
    views = held_out if checked is None else checked.spread
    away_from = partial(_away_from, refiner.references) if checked is None else checked.away_from
    for k, view in enumerate(views):
        on_progress(k / len(views))
        features = backbone.extract(view.image)
        for least_m in LEFT_OUT_M:
            others = away_from(view.T_map_camera, least_m)
            if others is not None:
                aligned = _aligned_with(others.to(target), refiner, view, features)
                found += aligned
                if least_m < LEFT_OUT_M[-1]:
                    shifts += [blocks.shift_chi2 for *_, seen in aligned if (blocks := seen.blocks) is not None]
    return found, shifts


def _away_from(references: ReferenceViews, T_map_camera: Matrix, least_m: float) -> ReferenceViews | None:
    """Return the views at least so far from a pose; None without any."""
    far = np.flatnonzero(view_distances(references.T_map_camera, T_map_camera) >= least_m)
    return references.selected([int(k) for k in far]) if len(far) else None


def _aligned_with(others: ReferenceViews, refiner: Refiner, view: View, features: BackboneFeatures) -> list[Inspected]:
    """Return the true pose of a view and its alignment with other reference views; nothing if it fails."""
    refiner = Refiner(others, refiner.camera, refiner.settings)
    alignment = refiner.align(features, [view.T_map_camera])
    alignment = PatchAligner(others, refiner.camera).improved(view.image, alignment)
    T = alignment.T_map_camera
    if not alignment.success or T is None or not is_good(view.T_map_camera, T):
        return []
    return [(view.T_map_camera, alignment, refiner.inspect(refiner.prepared(features, T)))]


def _after_check(
    T_true: Matrix,
    alignment: Alignment,
    inspection: Inspection,
    *,
    cameras: CameraCheck,
    camera: Camera,
    usual_chi2: float,
) -> AlignedView:
    """Return an alignment with what the check of its pose adds to its covariance."""
    blocks, S = inspection.blocks, inspection.sensitivity
    moments = np.zeros((6, 6)) if S is None else S @ cameras.moments(inspection.camera) @ S.T
    variances = np.zeros(6) if blocks is None else blocks.variances(camera, usual_chi2)
    return AlignedView(T_true, alignment, 0.5 * (moments + moments.T), variances)


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
