# SPDX-License-Identifier: Apache-2.0
"""One step of the filter: a belief carried along a flow, and fused with a measurement of the same cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F

from kfloc_ros.kfnet import kalman
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.types import FilterReport, SceneCoordinates

NO_PRIOR = float("nan")


class NisMode(Enum):
    """What happens to a cell whose measurement contradicts its prior."""

    OFF = "off"
    """Nothing: prior and measurement are fused all the same."""
    OUTPUT_ONLY = "output_only"
    """The emitted coordinates are the measurement's; the recursion keeps what was fused (as published)."""
    LOWER_VARIANCE = "lower_variance"
    """The cell keeps whichever of prior and measurement claims the smaller variance. A blurred or covered picture
    gives measurements that are worse than the belief and say so; the other modes always side with them."""


@dataclass(frozen=True)
class FilterSettings:
    """What the recursion needs to know; the first three are calibrated when a map is built.

    The defaults are this project's; the original has no NIS test by default, no resets and no floors.
    """

    flow_temperature: float
    process_scale: float
    """Multiplies the modelled process variance."""
    process_floor_m2: float
    """Process variance that is always added."""
    nis_threshold: float = kalman.NIS_THRESHOLD_95
    max_gap_s: float = 0.5
    """A longer gap between frames, or between refined poses that confirm the belief, resets the recursion."""
    max_rejected_ratio: float = 0.7
    """If more of the prior's cells than this fail the NIS test, prior and measurement contradict each other."""
    patience: int = 1
    """Contradicting frames in a row that are taken for bad images (with ``NisMode.LOWER_VARIANCE``, the belief is
    kept); with the next one, the belief is taken to be wrong and dropped. Never with ``NisMode.OFF``."""
    nis_mode: NisMode = NisMode.LOWER_VARIANCE
    error_correlation: float = 0.7
    """Of the errors of prior and measurement, as measured; 0 is the independence that the original assumes."""
    max_edge_ratio: float = 0.6
    """If the flow of more cells than this ends at the border of its search window, the recursion starts anew."""
    min_inlier_ratio: float = 0.0
    """A pose with a smaller share of inliers than this drops the belief that it came from."""
    posterior_floor_m2: float = 0.0
    """Smallest posterior variance of fused cells."""
    confirmed_variance_scale: float = 0.75
    """Of what is emitted from a belief that refined poses correct: what is left of the cells' variance without the
    error that they share, as measured. What is carried on keeps its variance, or it would shrink with every frame."""
    blend_sigma: bool = False
    """Carry standard deviations instead of variances along the flow, as published."""


@dataclass(frozen=True, eq=False)
class Prior:
    """The belief carried into this frame."""

    mean: torch.Tensor
    variance: torch.Tensor
    valid: torch.Tensor
    process_variance: torch.Tensor | None = None
    """(h, w) square metres of noise that carrying added; part of ``variance``."""


@dataclass(frozen=True, eq=False)
class Filtered:
    """Posterior and report of one frame, and what they were made of."""

    posterior: SceneCoordinates
    """What this frame gives out."""
    report: FilterReport
    belief: SceneCoordinates | None = None
    """What the recursion carries on, where that is not the posterior: see ``NisMode.OUTPUT_ONLY``, ``confirmed``."""
    flow: Flow | None = None
    """From the frame before; None at a fresh start."""
    prior: Prior | None = None
    nis: torch.Tensor | None = None
    """(h, w) normalised innovation squared; it means something where prior and measurement are valid."""


def warp(
    belief: SceneCoordinates,
    flow: Flow,
    process_scale: float,
    process_floor_m2: float,
    *,
    blend_sigma: bool = False,
) -> Prior:
    """Carry a belief along a backward flow and add process noise.

    The process variance is what the flow itself says, if it does; else what the flow's uncertainty means in metres,
    through the local gradient of the scene coordinates, plus how much the four cells that are blended disagree (a
    depth edge). It is scaled, and a floor added. A cell is valid only if the flow is and all the cells it blends are.
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
    uncertainty = belief.variance.sqrt() if blend_sigma else belief.variance
    table = torch.cat([belief.mean - centre, uncertainty[None], belief.valid[None].to(belief.mean.dtype)])
    cells = table.reshape(5, -1).t()[corners]  # (h w, 4, 5)
    blended = (weights[..., None] * cells).sum(1)
    spread = (weights[..., None] * (cells[..., :3] - blended[:, None, :3]) ** 2).sum(dim=(1, 2)) / 3
    mean = blended[:, :3].t().reshape(3, h, w)
    process = flow.process_variance_m2
    if process is None:
        process = flow.variance * _metres_per_cell_squared(mean) + spread.reshape(h, w)
    carried = blended[:, 3].square() if blend_sigma else blended[:, 3]
    process = process_scale * process + process_floor_m2
    return Prior(
        mean=mean + centre,
        variance=kalman.predict(carried.reshape(h, w), process),
        valid=flow.valid & (blended[:, 4].reshape(h, w) > 0.999),
        process_variance=process,
    )


def _metres_per_cell_squared(mean: torch.Tensor) -> torch.Tensor:
    """Mean over axes of the squared change of the coordinates (3, h, w) across one cell, (h, w)."""
    padded = F.pad(mean[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return (dx * dx + dy * dy).sum(0) / 3


def fuse(prior: Prior, measurement: SceneCoordinates, settings: FilterSettings) -> Filtered:
    """Kalman update where the prior is valid, and the NIS test; the measurement elsewhere."""
    update = kalman.update(
        prior.mean, prior.variance, measurement.mean, measurement.variance, settings.error_correlation
    )
    both = prior.valid & measurement.valid
    agree = both & (update.nis <= settings.nis_threshold)
    n_both = int(both.sum())
    report = FilterReport(
        reset_reason="",
        prior_ratio=float(prior.valid.float().mean()),
        nis_mean=float(update.nis[both].mean()) if n_both else NO_PRIOR,
        rejected_ratio=1.0 - int(agree.sum()) / n_both if n_both else 0.0,
    )
    mode = settings.nis_mode
    fused = both if mode in (NisMode.OFF, NisMode.OUTPUT_ONLY) else agree
    mean = torch.where(fused, update.mean, measurement.mean)
    variance = torch.where(fused, update.variance.clamp(min=settings.posterior_floor_m2), measurement.variance)
    if mode is NisMode.LOWER_VARIANCE:
        kept = both & ~agree
        if report.rejected_ratio <= settings.max_rejected_ratio:  # else the picture is bad, whatever its cells claim
            kept &= prior.variance < measurement.variance
        mean, variance = torch.where(kept, prior.mean, mean), torch.where(kept, prior.variance, variance)
    belief = replace(measurement, mean=mean, variance=variance)
    if mode is not NisMode.OUTPUT_ONLY:
        return Filtered(belief, report, prior=prior, nis=update.nis)
    emitted = torch.where(agree, update.mean, measurement.mean)
    return Filtered(replace(belief, mean=emitted), report, belief, prior=prior, nis=update.nis)


def started_anew(measurement: SceneCoordinates, reason: str) -> Filtered:
    """The measurement alone, where there is no belief to fuse it with."""
    return Filtered(measurement, FilterReport(reason, 0.0, NO_PRIOR, 0.0))


def confirmed(filtered: Filtered, variance_scale: float) -> Filtered:
    """What a step gave out, if refined poses corrected the belief that it came from; see ``FilterSettings``."""
    posterior = filtered.posterior
    return replace(
        filtered,
        posterior=replace(posterior, variance=variance_scale * posterior.variance),
        belief=filtered.belief or posterior,
        report=replace(filtered.report, confirmed=True),
    )
