# SPDX-License-Identifier: Apache-2.0
"""Calibration of a head's variances: a factor for views near the mapped ones, and its growth away from them.

Views far from the mapped ones are not available when a map is built. But a head is equally inaccurate in views that are
rotated and zoomed beyond its training augmentation, and their true coordinates are known: they calibrate the growth
with roughness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.kfnet.scoordnet import Head, RoughnessScale, roughness_m
from kfloc_ros.mapping.schedule import HeldOut, inner_half
from kfloc_ros.mapping.views import IDENTITY, View, similarity, true_coordinates, warp_image
from kfloc_ros.types import Matrix

ONE_SIGMA = 0.6827
MIN_ERRORS = 100
TURNS = ((30.0, 1.0), (60.0, 1.0), (-45.0, 0.7), (0.0, 0.6))
"""Roll in degrees, and pixels of the view per pixel of the rotated image; training uses up to 20 degrees and 0.75 to
1.3.
"""
MAX_TURNED = 12
"""Number of views that are rotated, each in all these ways; a quarter of the held-out views at most."""
MAX_POWER = 6.0
LEAST_POWER = 0.01
BISECTIONS = 20
MAX_RATIOS = 3000
"""Limit on ratios per view: sufficient, and quick to sort."""


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
    measured = head.measure(backbone.extract(view.image if turn is IDENTITY else warp_image(view.image, turn)))
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
