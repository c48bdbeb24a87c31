# SPDX-License-Identifier: Apache-2.0
"""Calibration of a map on held-out views, which are neither in its head's training data nor in its references.

Every quantity is chosen such that the localizer's statements match measured errors: variances such that 68 % of errors
are inside one sigma, pose covariances such that the median squared Mahalanobis error is that of its chi-square
distribution, and the acceptance threshold such that good alignments pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow import backward_flow
from kfloc_ros.kfnet.flow_network import LEARNED_FLOOR_M2, shipped_flow_network
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.measurement_calibration import MIN_ERRORS, ONE_SIGMA, calibrate_measurement, squared_quantile
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View, true_coordinates
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.cost import RobustLoss
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings
from kfloc_ros.types import Frame, SceneCoordinates

CHI2_6_MEDIAN = 5.348
TEMPERATURES = (0.005, 0.01, 0.02, 0.04, 0.08)
LEAST_SCALE = 1e-3
"""Smallest scale of process noise; its inverse is the largest."""
USUAL_LEARNED_SCALE = 0.15
"""Scale of the learned flow's process noise if a map has no neighbouring views to measure it on: the largest value of
the
measured maps, which have 0.06 to 0.15.
"""
MIN_WRONG = 5
MAX_MIRRORED = 20
"""Limit on mirrored views that are localized."""
MAX_CONFIDENCE_VIEWS = 8
"""Limit on held-out views that the confidence is calibrated on, each four times."""
RATIO_LIMITS = 0.1, 0.5
GOOD_M, GOOD_DEG = 0.10, 5.0
"""Position and rotation errors below which an alignment is good."""
NEAR_M, NEAR_DEG = 0.05, 5.0
"""Errors below which a held-out view counts as localized in the description of the map."""
WRONG_START = make_pose(so3_exp(np.array([0.0, 0.5, 0.0])), np.array([0.5, 0.0, 0.0]))
"""Pose relative to a view from which the alignment cannot converge: its result is wrong."""


def calibrate(
    draft: SceneMap,
    held_out: Sequence[HeldOut],
    device: str,
    on_progress: Callable[[float, str], None],
) -> SceneMap:
    """Return the map with its calibration; with the defaults if too few views were held out."""
    usual = replace(draft.calibration, learned_process_scale=USUAL_LEARNED_SCALE)
    draft = replace(draft, calibration=usual)
    if not held_out:
        return draft
    views, stamps_ns = [held.view for held in held_out], [held.stamp_ns for held in held_out]
    features = _coarse_features(views, device, on_progress)
    truth = [true_coordinates(view, (f.shape[1], f.shape[2])) for view, f in zip(views, features, strict=True)]
    on_progress(0.3, "measurement")
    target = choose_device(device)
    found = calibrate_measurement(draft.head.to(target), Backbone(device=target, runtime="auto"), held_out)
    draft.head.to("cpu")
    calibration = replace(draft.calibration, measurement_variance_scale=found.variance_scale, roughness=found.roughness)
    pairs = neighbours(held_out)
    if pairs:
        on_progress(0.5, "flow")
        calibration = calibrate_flow(calibration, features, truth, pairs)
    on_progress(0.6, "poses")
    calibration, quality = _calibrate_poses(replace(draft, calibration=calibration), views, stamps_ns, device)
    on_progress(0.9, "confidence")
    odds = _confidence_odds(replace(draft, calibration=calibration), views, device)
    calibration = replace(calibration, confidence_odds=odds)
    return replace(draft, calibration=calibration, provenance={**draft.provenance, "held_out": quality})


def neighbours(held_out: Sequence[HeldOut]) -> list[int]:
    """Return the views that follow their predecessor in the same recording, at most one frame between them."""
    return [
        i
        for i, (before, held) in enumerate(itertools.pairwise(held_out), start=1)
        if held.recording == before.recording and 0 < held.view.index - before.view.index <= 2
    ]


def _coarse_features(
    views: Sequence[View], device: str, on_progress: Callable[[float, str], None]
) -> list[torch.Tensor]:
    backbone = Backbone(device=choose_device(device), runtime="auto")
    features = []
    for i, view in enumerate(views):
        on_progress(0.3 * i / len(views), "features")
        features.append(backbone.extract(view.image).coarse[0].cpu())
    return features


def calibrate_flow(
    calibration: Calibration,
    features: Sequence[torch.Tensor],
    truth: Sequence[SceneCoordinates],
    pairs: Sequence[int],
) -> Calibration:
    """Calibrate the process noise of the flow network, and of the cost volume at its best temperature.

    Args:
        calibration: calibration to update.
        features: (C, h, w) of the views.
        truth: true scene coordinates of the views.
        pairs: views whose predecessors are propagated to them.
    """
    network = shipped_flow_network(torch.device("cpu"))
    learned = _propagate(network.flow, features, truth, pairs)
    best = None
    for temperature in TEMPERATURES:
        cost_volume = _propagate(partial(backward_flow, temperature=temperature), features, truth, pairs)
        if best is None or cost_volume.median_m < best[0].median_m:
            best = cost_volume, temperature
    assert best is not None
    return replace(
        calibration,
        flow_temperature=best[1],
        process_scale=best[0].loose_scale(calibration.process_floor_m2),
        learned_process_scale=learned.scale(LEARNED_FLOOR_M2),
    )


@dataclass(frozen=True, eq=False)
class PropagationErrors:
    """Errors of true coordinates propagated from one view to the next, and the modelled process noise."""

    squared_m2: torch.Tensor
    """(N,) squared errors of every axis."""
    process_m2: torch.Tensor
    """(N,) modelled process noise, unscaled."""
    median_m: float
    """Median length of the errors; infinite if there are none."""

    def scale(self, floor_m2: float) -> float:
        """Return the scale of the process noise at which 68 % of the errors are inside one sigma, given the floor."""
        if len(self.squared_m2) < MIN_ERRORS:
            return USUAL_LEARNED_SCALE
        low, high = LEAST_SCALE, 1.0 / LEAST_SCALE
        for _ in range(30):
            middle = math.sqrt(low * high)
            inside = float((self.squared_m2 < middle * self.process_m2 + floor_m2).float().mean())
            low, high = (middle, high) if inside < ONE_SIGMA else (low, middle)
        return high

    def loose_scale(self, floor_m2: float) -> float:
        """Return the factor by which noise and floor together are too large; the floor is then added once more.

        This is more than 68 % requires. It is right for noise that does not know where the flow is wrong.
        """
        return squared_quantile((self.squared_m2 / (self.process_m2 + floor_m2)).sqrt(), default=1.0)


def _propagate(
    flow: FlowFunction, features: Sequence[torch.Tensor], truth: Sequence[SceneCoordinates], pairs: Sequence[int]
) -> PropagationErrors:
    squared, process, lengths = [], [], []
    for i in pairs:
        prior = warp(truth[i - 1], flow(features[i], features[i - 1]), 1.0, 0.0)
        both = prior.valid & truth[i].valid
        error = (prior.mean - truth[i].mean)[:, both]
        squared.append(error.square().reshape(-1))
        process.append(prior.variance[both].repeat(3))
        lengths.append(error.norm(dim=0))
    length = torch.cat(lengths)
    return PropagationErrors(
        torch.cat(squared), torch.cat(process), float(length.median()) if len(length) else math.inf
    )


def _calibrate_poses(
    draft: SceneMap, views: Sequence[View], stamps_ns: Sequence[int], device: str
) -> tuple[Calibration, str]:
    """Run the localizer and fit the covariance scales and the acceptance threshold; also return the accuracy as text.

    The threshold is midway between the 95th percentile of the costs of good alignments and the 5th percentile of wrong
    ones. Query views differ more from the references than held-out mapping views do, so the threshold must not be close
    to the good ones.
    """
    localizer = Localizer(draft, LocalizerConfig(device=device, camera_check="off"))
    coarse, refined, costs, ratios, errors = [], [], [], [], []
    for view, stamp in zip(views, stamps_ns, strict=True):
        estimate = localizer.process(Frame(view.image, view.camera, stamp, view.index)).estimate
        if estimate.coarse is not None and estimate.coarse.success:
            coarse.append(mahalanobis(view.T_map_camera, estimate.coarse.T_map_camera, estimate.coarse.covariance))
            if _is_good(view.T_map_camera, estimate.coarse.T_map_camera):
                ratios.append(estimate.coarse.inlier_ratio)
        errors.append(_error(view.T_map_camera, estimate.T_map_camera))
        alignment = estimate.alignment
        if alignment is not None and alignment.success and _is_good(view.T_map_camera, alignment.T_map_camera):
            refined.append(mahalanobis(view.T_map_camera, alignment.T_map_camera, alignment.covariance))
            costs.append(alignment.final_cost)
    draft.head.to("cpu")
    found = replace(
        draft.calibration,
        coarse_covariance_scale=median_scale(coarse),
        refined_covariance_scale=median_scale(refined),
        max_alignment_cost=_threshold(costs, _wrong_costs(draft, views, device)),
        min_inlier_ratio=_ratio_threshold(ratios, _mirrored_ratios(draft, views, stamps_ns, device)),
    )
    return found, _accuracy(errors)


def _confidence_odds(draft: SceneMap, views: Sequence[View], device: str) -> float:
    """Return the factor on the odds of right poses, from held-out views as they are, and dark, blurred, or changed."""
    localizer = Localizer(draft, LocalizerConfig(device=device))
    confidences, rights = [], []
    for i, view in enumerate(views[:: max(len(views) // MAX_CONFIDENCE_VIEWS, 1)]):
        for k, image in enumerate((view.image, *_treated(view.image))):
            localizer.reset("each image for itself")
            stamp_ns = 10**10 * (1 + 10 * i + k)
            estimate = localizer.process(Frame(image, view.camera, stamp_ns, view.index)).estimate
            if estimate.confidence is not None:
                confidences.append(estimate.confidence)
                rights.append(_is_good(view.T_map_camera, estimate.T_map_camera))
    draft.head.to("cpu")
    return odds_factor(confidences, rights)


def _treated(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
    """Return an image dark, blurred, and with its middle displaced."""
    h, w = image.shape[:2]
    dark = np.asarray(255.0 * (image / 255.0) ** 5, dtype=np.uint8)
    blurred = np.asarray(cv2.GaussianBlur(image, (0, 0), w / 100), dtype=np.uint8)
    moved = image.copy()
    moved[h // 5 : 4 * h // 5, w // 5 + w // 12 : 4 * w // 5 + w // 12] = image[
        h // 5 : 4 * h // 5, w // 5 : 4 * w // 5
    ]
    return dark, blurred, moved


def odds_factor(confidences: Sequence[float], rights: Sequence[bool]) -> float:
    """Return the factor on the odds of confidences at which they fit what was right best.

    The logarithm has a standard normal prior, so a few images change little; without any, the factor is 1.
    """
    if not confidences:
        return 1.0
    share = np.clip(np.asarray(confidences, dtype=np.float64), 1e-6, 1.0 - 1e-6)
    logit, right = np.log(share / (1.0 - share)), np.asarray(rights, dtype=np.float64)
    shift = 0.0
    for _ in range(50):
        found = 1.0 / (1.0 + np.exp(-(logit + shift)))
        slope, curvature = (right - found).sum() - shift, (found * (1.0 - found)).sum() + 1.0
        step = float(np.clip(slope / curvature, -1.0, 1.0))
        shift += step
        if abs(step) < 1e-9:
            break
    return math.exp(shift)


def _wrong_costs(draft: SceneMap, views: Sequence[View], device: str) -> list[float]:
    """Return the costs of alignments that converged to a wrong pose."""
    target = choose_device(device)
    backbone = Backbone(device=target, runtime="auto")
    settings = RefinerSettings(max_cost=math.inf)
    refiner = Refiner(draft.references.to(target), draft.camera, settings)
    wrong = []
    for view in views:
        alignment = refiner.align(backbone.extract(view.image), [view.T_map_camera @ WRONG_START])
        if alignment.success and not _is_good(view.T_map_camera, alignment.T_map_camera):
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


def _is_good(T_true: Matrix, T: Matrix | None) -> bool:
    metres, degrees = _error(T_true, T)
    return metres < GOOD_M and degrees < GOOD_DEG


def _accuracy(errors: Sequence[tuple[float, float]]) -> str:
    """Return the accuracy on held-out views, for ``kfloc map info``."""
    good = sum(metres < NEAR_M and degrees < NEAR_DEG for metres, degrees in errors)
    text = f"{good} of {len(errors)} views within {100 * NEAR_M:g} cm and {NEAR_DEG:g} deg"
    posed = np.array([error for error in errors if math.isfinite(error[0])])
    if not len(posed):
        return text
    metres, degrees = np.median(posed, axis=0)
    return f"{text}, median {100 * metres:.1f} cm, {degrees:.2f} deg"


def mahalanobis(T_true: Matrix, T: Matrix | None, covariance: NDArray[np.float64] | None) -> float:
    """Return the squared Mahalanobis length of a pose error (NEES)."""
    if T is None or covariance is None:
        return float("nan")
    error = pose_tangent_error(T, T_true)
    return float(error @ np.linalg.solve(covariance, error))


def median_scale(squared: Sequence[float]) -> float:
    finite = np.asarray(squared)[np.isfinite(squared)] if len(squared) else np.zeros(0)
    if len(finite) < 5:
        return 1.0
    return float(np.clip(np.median(finite) / CHI2_6_MEDIAN, 1e-3, 1e6))
