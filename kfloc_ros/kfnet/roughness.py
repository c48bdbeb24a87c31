# SPDX-License-Identifier: Apache-2.0
"""How rough scene coordinates are, which tells how far a view is from what a head was trained on.

Surfaces are mostly smooth, so coordinates of neighbouring cells lie nearly on a line. Where a head knows nothing, each
cell errs by itself, and they do not. A head's own variance grows there, too, but not nearly enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.kfnet.experts import Head
from kfloc_ros.types import SceneCoordinates

REACH_CELLS = 2
"""From a cell to the two that it is compared with. Neighbours share most of the image that they are told from, and err
alike."""
STEPS = ((0, REACH_CELLS), (REACH_CELLS, 0), (REACH_CELLS, REACH_CELLS), (REACH_CELLS, -REACH_CELLS))


@dataclass(frozen=True)
class RoughnessScale:
    """What roughness means in one map: calibrated on views that its head was not trained on, as they are and turned."""

    usual_m: float
    """Of views among the mapped ones; smoother ones are not taken to be better."""
    power: float
    """With which the variance of a rougher view's cells grows."""

    def __post_init__(self) -> None:
        for name in ("usual_m", "power"):
            value = getattr(self, name)
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"the roughness's '{name}' must be a positive number, not {value!r}")

    def factor(self, roughness_m: torch.Tensor) -> torch.Tensor:
        """By how much variances are larger in views of this roughness; 1 where it is not known."""
        return torch.nan_to_num((roughness_m / self.usual_m).clamp(min=1.0) ** self.power, nan=1.0)

    def applied(self, measured: SceneCoordinates) -> SceneCoordinates:
        """The same coordinates with the variances of all cells made larger, by one factor."""
        return replace(measured, variance=measured.variance * self.factor(roughness_m(measured)))


class MeasurementCalibration(Protocol):
    """What a map says of its head's variances."""

    @property
    def measurement_variance_scale(self) -> float: ...

    @property
    def roughness(self) -> RoughnessScale | None: ...


def measure(head: Head, features: TrunkFeatures, calibration: MeasurementCalibration) -> SceneCoordinates:
    """Scene coordinates of the first image of a batch, their variances as calibrated."""
    measured = head.measure(features, calibration.measurement_variance_scale)
    return measured if calibration.roughness is None else calibration.roughness.applied(measured)


def roughness_m(measured: SceneCoordinates) -> torch.Tensor:
    """Median over cells of how far they are from the middle between two others, in four directions; a scalar, metres.

    It is given as the standard deviation, per axis, of errors of cells that would make a flat surface about so rough
    if they were independent (a second difference has six times their variance). NaN where no cell can be told.
    """
    r = REACH_CELLS
    _, h, w = measured.mean.shape
    if min(h, w) <= 2 * r:
        return measured.mean.new_tensor(math.nan)
    centre = 2.0 * measured.mean[:, r : h - r, r : w - r]
    squared = torch.zeros_like(centre)
    for dy, dx in STEPS:
        after = measured.mean[:, r + dy : h - r + dy, r + dx : w - r + dx]
        before = measured.mean[:, r - dy : h - r - dy, r - dx : w - r - dx]
        squared += (after + before - centre).square()
    rough = squared.sum(0) / (3 * len(STEPS) * 6)
    usable = measured.valid[r : h - r, r : w - r] & rough.isfinite()
    return rough[usable].sqrt().median() if bool(usable.any()) else rough.new_tensor(math.nan)
