# SPDX-License-Identifier: Apache-2.0
"""The recursive filter: carries the belief over scene coordinates from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kfloc_ros.kfnet import kalman
from kfloc_ros.kfnet.oflownet import Flow, backward_flow
from kfloc_ros.types import FilterReport, SceneCoordinates

NO_PRIOR = float("nan")


@dataclass(frozen=True)
class FilterSettings:
    """What the recursion needs to know; the first three are calibrated when a map is built."""

    flow_temperature: float
    process_scale: float
    """Multiplies the modelled process variance."""
    process_floor_m2: float
    """Process variance that is always added."""
    nis_threshold: float = kalman.NIS_THRESHOLD_95
    max_gap_s: float = 0.5
    """A longer gap between frames resets the recursion."""
    max_rejected_ratio: float = 0.7
    """If more of the prior's cells than this fail the NIS test, the whole prior is dropped."""


@dataclass(frozen=True, eq=False)
class Prior:
    """The belief carried into this frame."""

    mean: torch.Tensor
    variance: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, eq=False)
class Filtered:
    """Posterior and report of one frame."""

    posterior: SceneCoordinates
    report: FilterReport


def warp(belief: SceneCoordinates, flow: Flow, process_scale: float, process_floor_m2: float) -> Prior:
    """Carry a belief along a backward flow and add process noise.

    The process variance is what the flow's uncertainty means in metres, through the local gradient of the
    scene coordinates, plus how much the four cells that are blended disagree (a depth edge), plus a floor.
    A cell is valid only if the flow is and all the cells it blends are.
    """
    _, h, w = belief.mean.shape
    device = belief.mean.device
    u = torch.arange(w, device=device) + flow.offset[0]
    v = torch.arange(h, device=device)[:, None] + flow.offset[1]
    u, v = u.clamp(0, w - 1).reshape(-1), v.clamp(0, h - 1).reshape(-1)
    u0, v0 = u.floor().clamp(max=w - 2), v.floor().clamp(max=h - 2)
    a, b = u - u0, v - v0
    base = (v0 * w + u0).long()
    corners = torch.stack([base, base + 1, base + w, base + w + 1], dim=1)
    weights = torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], dim=1)
    centre = belief.mean.mean(dim=(1, 2), keepdim=True)  # keeps the squares below small in float32
    table = torch.cat([belief.mean - centre, belief.variance[None], belief.valid[None].to(belief.mean.dtype)])
    cells = table.reshape(5, -1).t()[corners]  # (h w, 4, 5)
    blended = (weights[..., None] * cells).sum(1)
    spread = (weights[..., None] * (cells[..., :3] - blended[:, None, :3]) ** 2).sum(dim=(1, 2)) / 3
    mean = blended[:, :3].t().reshape(3, h, w)
    process = process_scale * (flow.variance * _metres_per_cell_squared(mean) + spread.reshape(h, w))
    return Prior(
        mean=mean + centre,
        variance=kalman.predict(blended[:, 3].reshape(h, w), process + process_floor_m2),
        valid=flow.valid & (blended[:, 4].reshape(h, w) > 0.999),
    )


def _metres_per_cell_squared(mean: torch.Tensor) -> torch.Tensor:
    """Mean over axes of the squared change of the coordinates (3, h, w) across one cell, (h, w)."""
    padded = F.pad(mean[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return (dx * dx + dy * dy).sum(0) / 3


class SceneCoordinateFilter:
    """Prior by flow, Kalman update, NIS test in state mode, resets."""

    def __init__(self, settings: FilterSettings) -> None:
        self.settings = settings
        self._belief: SceneCoordinates | None = None
        self._features: torch.Tensor | None = None
        self._stamp_ns = 0
        self._reset_reason = "first frame"

    def reset(self, reason: str) -> None:
        """Forget the belief; the next frame starts from its measurement alone."""
        self._belief, self._features, self._reset_reason = None, None, reason

    def step(self, stamp_ns: int, features: torch.Tensor, measurement: SceneCoordinates) -> Filtered:
        """Fuse the measurement of a frame with the belief carried from the frame before.

        Args:
            stamp_ns: time of the frame; a gap or a step backwards resets the recursion.
            features: (C, h, w) L2-normalised trunk features of the frame.
            measurement: scene coordinates of the frame.
        """
        self._check_time(stamp_ns)
        if self._belief is None or self._features is None:
            filtered = Filtered(measurement, FilterReport(self._reset_reason, 0.0, NO_PRIOR, 0.0))
        else:
            s = self.settings
            flow = backward_flow(features, self._features, s.flow_temperature)
            prior = warp(self._belief, flow, s.process_scale, s.process_floor_m2)
            filtered = self._fuse(prior, measurement)
        self._belief, self._features, self._stamp_ns = filtered.posterior, features, stamp_ns
        self._reset_reason = ""
        return filtered

    def _check_time(self, stamp_ns: int) -> None:
        if self._belief is None:
            return
        gap_s = (stamp_ns - self._stamp_ns) * 1e-9
        if gap_s <= 0:
            self.reset("time went backwards")
        elif gap_s > self.settings.max_gap_s:
            self.reset(f"no frame for {gap_s:.2f} s")

    def _fuse(self, prior: Prior, measurement: SceneCoordinates) -> Filtered:
        fused = kalman.update(prior.mean, prior.variance, measurement.mean, measurement.variance)
        both = prior.valid & measurement.valid
        agree = both & (fused.nis <= self.settings.nis_threshold)
        n_both = int(both.sum())
        rejected = 1.0 - int(agree.sum()) / n_both if n_both else 0.0
        report = FilterReport(
            reset_reason="",
            prior_ratio=float(prior.valid.float().mean()),
            nis_mean=float(fused.nis[both].mean()) if n_both else NO_PRIOR,
            rejected_ratio=rejected,
        )
        if rejected > self.settings.max_rejected_ratio:
            reason = f"{rejected:.0%} of the prior contradicts the measurement"
            return Filtered(measurement, FilterReport(reason, report.prior_ratio, report.nis_mean, rejected))
        posterior = SceneCoordinates(
            mean=torch.where(agree, fused.mean, measurement.mean),
            variance=torch.where(agree, fused.variance, measurement.variance),
            valid=measurement.valid,
            stride=measurement.stride,
        )
        return Filtered(posterior, report)
