# SPDX-License-Identifier: Apache-2.0
"""Accuracy of optical flow, cell by cell: error against the true flow, and effect on propagated coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.types import SceneCoordinates

ONE_SIGMA = 0.6827
"""Share of a Gaussian within one standard deviation."""
SCALES = np.geomspace(1e-3, 1e3, 121)
"""Candidate scales of the process noise."""
LARGEST_AXIS_ERROR_M = 0.5
"""Limit of each error in the root mean square, since the size of an entirely wrong match is meaningless."""


@dataclass(frozen=True)
class FlowAccuracy:
    """Accuracy over all pairs of frames; lengths of flow in cells, NaN without true flow."""

    pairs: int
    median_cells: float
    """Median distance to the true flow, over cells with a valid flow whose point is visible in both frames."""
    p90_cells: float
    lost: float
    """Share of these cells that are more than a cell off."""
    known: float
    """Share of cells with a valid flow, of those whose point is visible in both frames."""
    flow_inside_1sigma: float
    """Share of the flow's axis errors within the flow's own sigma."""
    prior_axis_rms_m: float
    """Root mean square, per axis, of true coordinates propagated along the flow minus true ones."""
    prior_axis_median_m: float
    prior_inside_1sigma: float
    """Share of these axis errors within the unscaled process noise."""
    process_scale: float
    """Factor on the process variance with which, floor included, one sigma covers the expected share."""
    process_inside_1sigma: float
    """Share that one sigma then covers."""
    nll_without_floor: float
    """Negative log-likelihood per axis with scaled noise and no floor; low if the noise separates large errors from
    small."""


class FlowStatistics:
    """Accumulator over pairs of frames; it keeps the errors of all cells."""

    def __init__(self) -> None:
        self._error: list[torch.Tensor] = []
        self._ratio: list[torch.Tensor] = []
        self._squared_m2: list[torch.Tensor] = []
        self._process_m2: list[torch.Tensor] = []
        self._pairs = self._right = self._seen = 0

    @torch.inference_mode()
    def add(
        self,
        flow: Flow,
        true_offset: torch.Tensor,
        visible: torch.Tensor,
        now: SceneCoordinates,
        before: SceneCoordinates,
    ) -> None:
        """Add one pair.

        Args:
            flow: backward flow, from this frame to the previous one.
            true_offset: (2, h, w) true flow in cells.
            visible: (h, w) bool, the point is visible in both frames.
            now: true coordinates of this frame's cells.
            before: true coordinates of the previous frame's cells, without variance.
        """
        self._pairs += 1
        both = flow.valid & visible
        difference = (flow.offset - true_offset)[:, both]
        self._error.append(difference.norm(dim=0).cpu())
        self._ratio.append((difference.abs() / flow.variance[both].sqrt()).reshape(-1).cpu())
        self._right += int(both.sum())
        self._seen += int(visible.sum())
        prior = warp(before, flow, 1.0, 0.0)
        usable = prior.valid & now.valid
        self._squared_m2.append((prior.mean - now.mean)[:, usable].square().reshape(-1).cpu())
        self._process_m2.append(prior.variance[usable].repeat(3).cpu())

    def result(self, floor_m2: float = 0.0) -> FlowAccuracy:
        """Return the accuracy over all pairs added.

        Args:
            floor_m2: process variance that the filter always adds.
        """
        error, ratio = (torch.cat(part) if part else torch.empty(0) for part in (self._error, self._ratio))
        squared, process = (torch.cat(p) if p else torch.empty(0) for p in (self._squared_m2, self._process_m2))
        scale = _scale_of(squared, process, floor_m2)
        fit = _scale_of(squared, process, 1e-8) * process + 1e-8
        return FlowAccuracy(
            pairs=self._pairs,
            median_cells=_quantile(error, 0.5),
            p90_cells=_quantile(error, 0.9),
            lost=float((error > 1.0).float().mean()),
            known=self._right / max(self._seen, 1),
            flow_inside_1sigma=float((ratio < 1).float().mean()),
            prior_axis_rms_m=float(squared.clamp(max=LARGEST_AXIS_ERROR_M**2).mean().sqrt()),
            prior_axis_median_m=_quantile(squared, 0.5) ** 0.5,
            prior_inside_1sigma=float((squared < process).float().mean()),
            process_scale=scale,
            process_inside_1sigma=float((squared < scale * process + floor_m2).float().mean()),
            nll_without_floor=float((0.5 * fit.log() + (squared / fit).clamp(max=25.0) / 2).mean()),
        )


def _scale_of(squared_m2: torch.Tensor, process_m2: torch.Tensor, floor_m2: float) -> float:
    """Return the factor with which one sigma covers most nearly a Gaussian's share."""
    inside = [float((squared_m2 < s * process_m2 + floor_m2).float().mean()) for s in SCALES]
    return float(SCALES[int(np.argmin(np.abs(np.array(inside) - ONE_SIGMA)))])


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(np.quantile(values.numpy(), share)) if len(values) else float("nan")
