# SPDX-License-Identifier: Apache-2.0
"""Calibration of a map on held-out views, which are neither in its head's training data nor in its references.

Every quantity is chosen such that the localizer's statements match measured errors: here the variances of a head and of
the flow such that 68 % of errors are inside one sigma; see :mod:`kfloc_ros.mapping.pose_calibration` for poses.

Views far from the mapped ones are not available when a map is built. But a head is equally inaccurate in views that are
rotated and zoomed beyond its training augmentation, and their true coordinates are known: they calibrate the growth of
its variance with roughness.
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
from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow import backward_flow
from kfloc_ros.kfnet.flow_network import LEARNED_FLOOR_M2, shipped_flow_network
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.kfnet.scoordnet import Head, RoughnessScale, measure, roughness_m
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import is_good
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.checked_references import CheckedReferences
from kfloc_ros.mapping.pose_calibration import calibrate_poses
from kfloc_ros.mapping.pose_covariance import ONE_SIGMA
from kfloc_ros.mapping.schedule import HeldOut, inner_half
from kfloc_ros.mapping.views import IDENTITY, View, similarity, true_coordinates, warp_image
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.types import Frame, Matrix, SceneCoordinates

TEMPERATURES = (0.005, 0.01, 0.02, 0.04, 0.08)
LEAST_SCALE = 1e-3
"""Smallest scale of process noise; its inverse is the largest."""
USUAL_LEARNED_SCALE = 0.15
"""Scale of the learned flow's process noise if a map has no neighbouring views to measure it on: the largest value of
the measured maps, which have 0.06 to 0.15."""
MIN_ERRORS = 100
MAX_CONFIDENCE_VIEWS = 8
"""Limit on held-out views that the confidence is calibrated on, each four times."""
TURNS = ((30.0, 1.0), (60.0, 1.0), (-45.0, 0.7), (0.0, 0.6))
"""Roll in degrees, and pixels of the view per pixel of the rotated image; training uses up to 20 degrees and 0.75 to
1.3."""
MAX_TURNED = 12
"""Number of views that are rotated, each in all these ways; a quarter of the held-out views at most."""
LEAST_POWER, MAX_POWER = 0.01, 6.0
BISECTIONS = 20
MAX_RATIOS = 3000
"""Limit on ratios per view: sufficient, and quick to sort."""


def calibrate(
    draft: SceneMap,
    held_out: Sequence[HeldOut],
    device: str,
    on_progress: Callable[[float, str], None],
    checked: CheckedReferences | None = None,
) -> SceneMap:
    """Return the map with its calibration, see ``calibrate_poses``; with the defaults if no view was held out."""
    draft = replace(draft, calibration=replace(draft.calibration, learned_process_scale=USUAL_LEARNED_SCALE))
    if not held_out:
        return draft
    views = [held.view for held in held_out]
    features = _coarse_features(views, device, on_progress)
    truth = [true_coordinates(view, (f.shape[1], f.shape[2])) for view, f in zip(views, features, strict=True)]
    on_progress(0.3, "measurement")
    target = choose_device(device)
    found = calibrate_measurement(draft.head.to(target), Backbone(device=target, runtime="auto"), held_out)
    draft.head.to("cpu")
    calibration = replace(draft.calibration, measurement_variance_scale=found.variance_scale, roughness=found.roughness)
    if pairs := neighbours(held_out):
        on_progress(0.5, "flow")
        calibration = calibrate_flow(calibration, features, truth, pairs)
    draft, of_poses = replace(draft, calibration=calibration), lambda share: on_progress(0.6 + 0.3 * share, "poses")
    calibration, quality = calibrate_poses(draft, held_out, device, checked, of_poses)
    on_progress(0.9, "confidence")
    draft = replace(draft, calibration=calibration, provenance={**draft.provenance, "held_out": quality})
    return replace(draft, calibration=replace(calibration, confidence_odds=confidence_odds(draft, views, device)))


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


@dataclass(frozen=True, eq=False)
class MeasuredView:
    """Predictions of a head for one view, compared with the truth."""

    roughness_m: float
    ratios: torch.Tensor
    """(n,) |error| / sigma of cells, per axis, with the head's sigma."""
    run: int
    """Number of the run that the view was held out in."""


@dataclass(frozen=True)
class MeasurementScale:
    """Scale of variances at which 68 % of the axis errors are inside one sigma."""

    variance_scale: float
    roughness: RoughnessScale | None
    """None if rotated views do not need it or could not be measured."""


def calibrate_measurement(head: Head, backbone: Backbone, held_out: Sequence[HeldOut]) -> MeasurementScale:
    """Measure the held-out views as they are, and some of them rotated.

    Of each run, the inner half is used, where trained views are far.

    Args:
        head: head of the map, on the backbone's device.
        backbone: feature network.
        held_out: views that the head was not trained on.
    """
    chosen = [held for held, inner in zip(held_out, inner_half(held_out), strict=True) if inner]
    usual = [_measured(head, backbone, held, IDENTITY) for held in chosen]
    count = min(MAX_TURNED, -(-len(chosen) // len(TURNS)))
    to_turn = [chosen[k] for k in np.linspace(0, len(chosen) - 1, count).round().astype(int)]
    turned = [
        _measured(head, backbone, held, similarity(held.view.camera, np.radians(angle_deg), zoom))
        for held in to_turn
        for angle_deg, zoom in TURNS
    ]
    return scale_of(usual, turned)


def _measured(head: Head, backbone: Backbone, held: HeldOut, turn: Matrix) -> MeasuredView:
    view: View = held.view
    measured = measure(head, backbone.extract(view.image if turn is IDENTITY else warp_image(view.image, turn)))
    h, w = measured.variance.shape
    truth = true_coordinates(view, (h, w), turn)
    error = (measured.mean.cpu() - truth.mean).abs() / measured.variance.cpu().sqrt()
    ratios = error[:, truth.valid & measured.valid.cpu()].reshape(-1)
    return MeasuredView(float(roughness_m(measured)), ratios[:: max(1, len(ratios) // MAX_RATIOS)], held.run)


def scale_of(usual: Sequence[MeasuredView], turned: Sequence[MeasuredView]) -> MeasurementScale:
    """Return the factor on variances of usual views, and the power of roughness that fits the rotated ones.

    Args:
        usual: views as they are.
        turned: rotated views of any roughness, unknown to the head.
    """
    plain = scale_of_worse_runs(_by_run(usual, None))
    known = [view.roughness_m for view in usual if np.isfinite(view.roughness_m)]
    far = sum(len(view.ratios) for view in turned if np.isfinite(view.roughness_m))
    if not known or far < MIN_ERRORS:
        return MeasurementScale(plain, None)
    usual_m = max(float(np.median(known)), 1e-6)

    def evaluate(power: float) -> tuple[float, float]:
        """Return the factor for usual views, and the share of the rotated views' errors inside one sigma."""
        roughness = RoughnessScale(usual_m, power)
        scale = scale_of_worse_runs(_by_run(usual, roughness))
        return scale, float((torch.cat(_whitened(turned, roughness)).square() < scale).float().mean())

    if evaluate(LEAST_POWER)[1] >= ONE_SIGMA:
        return MeasurementScale(plain, None)
    low, high = LEAST_POWER, MAX_POWER
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if evaluate(middle)[1] < ONE_SIGMA else (low, middle)
    return MeasurementScale(evaluate(high)[0], RoughnessScale(usual_m, high))


def _whitened(views: Sequence[MeasuredView], roughness: RoughnessScale | None) -> list[torch.Tensor]:
    if roughness is None:
        return [view.ratios for view in views]
    return [view.ratios / roughness.factor(torch.tensor(view.roughness_m)).sqrt() for view in views]


def _by_run(views: Sequence[MeasuredView], roughness: RoughnessScale | None) -> list[torch.Tensor]:
    runs: dict[int, list[torch.Tensor]] = {}
    for view, ratios in zip(views, _whitened(views, roughness), strict=True):
        runs.setdefault(view.run, []).append(ratios)
    return [torch.cat(run) for run in runs.values()]


def scale_of_worse_runs(ratios: Sequence[torch.Tensor]) -> float:
    """Return the variance factor that puts 68 % of the errors, per axis, inside one sigma in the worse runs.

    A head's accuracy differs more between places than within one, and a query can be farther from the training data
    than any held-out view: the factor of all runs together would be too optimistic.

    Args:
        ratios: (n,) |error| / sigma for each run of held-out views.
    """
    enough = [run for run in ratios if len(run) >= MIN_ERRORS]
    ordered = sorted(enough, key=lambda run: squared_quantile(run, default=1.0))
    return squared_quantile(torch.cat(ordered[len(ordered) // 2 :]), default=1.0) if ordered else 1.0


def squared_quantile(ratios: torch.Tensor, default: float) -> float:
    """Return the square of the 68 % quantile of |error| / sigma: the factor by which the variance is too small."""
    if len(ratios) < MIN_ERRORS:
        return default
    step = max(1, len(ratios) // 1_000_000)  # torch.quantile accepts at most 16 million values
    return float(np.clip(float(torch.quantile(ratios[::step], ONE_SIGMA)) ** 2, 1e-3, 1e3))


def confidence_odds(draft: SceneMap, views: Sequence[View], device: str) -> float:
    """Return the factor on the odds of right poses, from held-out views as they are, and dark, blurred, or changed."""
    localizer = Localizer(draft, LocalizerConfig(device=device, carry_s=0.0))
    confidences, rights = [], []
    for i, view in enumerate(views[:: max(len(views) // MAX_CONFIDENCE_VIEWS, 1)]):
        for k, image in enumerate((view.image, *_treated(view.image))):
            localizer.reset("each image for itself")
            stamp_ns = 10**10 * (1 + 10 * i + k)
            estimate = localizer.process(Frame(image, view.camera, stamp_ns, view.index)).estimate
            if estimate.confidence is not None:
                confidences.append(estimate.confidence)
                rights.append(is_good(view.T_map_camera, estimate.T_map_camera))
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
