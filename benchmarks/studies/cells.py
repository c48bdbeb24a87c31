# SPDX-License-Identifier: Apache-2.0
"""Accuracy of scene coordinates, cell by cell: mapping error, and consistency of the variances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.types import SceneCoordinates


@dataclass(frozen=True)
class CellAccuracy:
    """Accuracy over all frames of a run that have true coordinates."""

    frames: int
    median_error_m: float
    """Median over frames of each frame's median distance to the true point; the original prints this, mean and std."""
    mean_error_m: float
    std_error_m: float
    normalized_mean_square: float
    """Mean of (error / sigma)^2 per axis; 1 if the variances are right, otherwise dominated by outliers."""
    coverage: tuple[float, float, float]
    """Share of axis errors within 1, 2 and 3 sigma; 0.683, 0.954, 0.997 if the variances are right."""


class CellStatistics:
    """Accumulator over frames; its memory does not grow with the number of cells."""

    def __init__(self) -> None:
        self._medians_m: list[float] = []
        self._count = 0
        self._square = 0.0
        self._inside = np.zeros(3)

    def add(self, coordinates: SceneCoordinates, true_mean: torch.Tensor, known: torch.Tensor) -> None:
        """Compare one frame with true coordinates (3, h, w) where ``known`` (h, w) is true."""
        cells = known & coordinates.valid
        if not bool(cells.any()):
            return
        error = (coordinates.mean - true_mean)[:, cells]
        ratio = (error / coordinates.variance[cells].sqrt()).abs()
        self._medians_m.append(float(error.norm(dim=0).median()))
        self._count += ratio.numel()
        self._square += float(ratio.square().sum())
        self._inside += [float((ratio < k).sum()) for k in (1, 2, 3)]

    def result(self) -> CellAccuracy:
        """Return the accuracy over all frames added; NaN without frames."""
        if not self._medians_m:
            return CellAccuracy(0, math.nan, math.nan, math.nan, math.nan, (math.nan, math.nan, math.nan))
        one, two, three = self._inside / self._count
        return CellAccuracy(
            frames=len(self._medians_m),
            median_error_m=float(np.median(self._medians_m)),
            mean_error_m=float(np.mean(self._medians_m)),
            std_error_m=float(np.std(self._medians_m)),
            normalized_mean_square=self._square / self._count,
            coverage=(float(one), float(two), float(three)),
        )
