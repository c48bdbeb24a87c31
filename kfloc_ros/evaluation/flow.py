# SPDX-License-Identifier: Apache-2.0
"""How good a flow is, cell by cell: its error against true flow, and what it does to the coordinates it carries."""

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
"""Tried on the process noise."""
LARGEST_AXIS_ERROR_M = 0.5
"""Errors count with at most this in the root mean square: a wholly wrong match has no size."""


@dataclass(frozen=True)
class FlowAccuracy:
    """Over all pairs of frames; lengths of flow in cells, NaN where no cell had a truth."""

    pairs: int
    median_cells: float
    """Of the distances to the true flow, in cells that the flow claims to know and whose point is seen again."""
    p90_cells: float
    lost: float
    """Share of these that are more than a cell off."""
    known: float
    """Share of the cells whose point is seen again that the flow claims to know."""
    flow_inside_1sigma: float
    """Share of the flow's axis errors within the sigma that the flow says."""
    prior_axis_rms_m: float
    """Of true coordinates carried along the flow against true ones, per axis."""
    prior_axis_median_m: float
    prior_inside_1sigma: float
    """Share of these axis errors within the process noise as it comes out of the flow."""
    process_scale: float
    """Factor on the process variance with which, the floor added, one sigma holds what it should."""
    process_inside_1sigma: float
    """What it then holds."""
    nll_without_floor: float
    """Negative log-likelihood per axis, the noise scaled and no floor: low where it tells large errors from small."""


class FlowStatistics:
    """Adds up pairs of frames; keeps the errors of all cells."""

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
        """One pair.

        Args:
            flow: backward, from this frame to the one before.
            true_offset: (2, h, w) cells.
            visible: (h, w) bool, where the point is seen in both frames.
            now: true coordinates of this frame's cells.
            before: of the one's before, without variance.
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
        """The figures.

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
    """The factor with which one sigma holds closest to what a Gaussian's does."""
    inside = [float((squared_m2 < s * process_m2 + floor_m2).float().mean()) for s in SCALES]
    return float(SCALES[int(np.argmin(np.abs(np.array(inside) - ONE_SIGMA)))])


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(np.quantile(values.numpy(), share)) if len(values) else float("nan")
