# SPDX-License-Identifier: Apache-2.0
"""Filter step: propagation of a belief along a flow, and fusion with a measurement of the same cells.

A cell's belief is an isotropic Gaussian: a mean (3,) in metres and one variance in square metres for x, y and z. The
process model is the identity along the image flow (KFNet, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F

from kfloc_ros.device import runs_compiled
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.types import FilterReport, SceneCoordinates

NO_PRIOR = float("nan")
NIS_THRESHOLD_95 = 7.815
"""95 % point of the chi-square distribution with 3 degrees of freedom."""

MIN_VARIANCE_M2 = 1e-10


class NisMode(Enum):
    """Treatment of a cell whose measurement contradicts its prior."""

    OFF = "off"
    """Prior and measurement are fused regardless."""
    OUTPUT_ONLY = "output_only"
    """The output is the measurement; the recursion continues with the fused value (as published)."""
    LOWER_VARIANCE = "lower_variance"
    """The cell keeps the prior or the measurement, whichever has the lower variance. A blurred or covered image
    gives measurements that are worse than the belief and have a higher variance; the other modes always take the
    measurement."""


@dataclass(frozen=True)
class FilterSettings:
    """Settings of the filter; the first three are calibrated when a map is built.

    The defaults are this project's; :meth:`published` gives the original's.
    """

    flow_temperature: float
    process_scale: float
    """Factor on the modelled process variance."""
    process_floor_m2: float
    """Process variance that is always added, m^2."""
    nis_threshold: float = NIS_THRESHOLD_95
    max_gap_s: float = 0.5
    """Longest gap between frames, or between refined poses that confirm the belief; a longer one resets the filter."""
    max_rejected_ratio: float = 0.7
    """Largest share of the prior's cells that may fail the NIS test; above it, prior and measurement contradict each
    other."""
    patience: int = 1
    """Successive contradicting frames that count as bad images and keep the belief (``NisMode.LOWER_VARIANCE``). After
    one more the belief counts as wrong, and the filter resets. With ``NisMode.OFF`` it never does."""
    nis_mode: NisMode = NisMode.LOWER_VARIANCE
    error_correlation: float = 0.7
    """Correlation of the errors of prior and measurement, as measured; 0 is the original's assumption of
    independence."""
    max_edge_ratio: float = 0.6
    """Largest share of cells whose flow may end at the border of its search window; above it, the filter resets."""
    min_inlier_ratio: float = 0.0
    """Smallest share of PnP inliers of a pose; below it, the filter resets."""
    posterior_floor_m2: float = 0.0
    """Smallest posterior variance of fused cells."""
    confirmed_variance_scale: float = 0.75
    """Scale of the output variances while refined poses correct the belief: the share left, as measured, without the
    error that all cells have in common. The recursion continues with the unscaled variances, or they would shrink with
    every frame."""
    blend_sigma: bool = False
    """Interpolate standard deviations instead of variances along the flow, as published."""
    sequence_resets_only: bool = False
    """Reset only at the start of a sequence: the first frame, a gap, or time going backwards, as published."""

    @classmethod
    def published(
        cls,
        flow_temperature: float = 1.0,
        process_scale: float = 1.0,
        process_floor_m2: float = 0.0,
        *,
        nis_test: bool = False,
        nis_threshold: float = NIS_THRESHOLD_95,
        max_gap_s: float = 0.5,
    ) -> FilterSettings:
        """Return the settings of the published recursion.

        It fuses every cell as independent, interpolates standard deviations, and resets at the start of a sequence
        only. Unlike the original, a cell whose flow leaves the image or the search window takes the measurement; the
        original fuses it with the origin.

        Args:
            flow_temperature: for the flow of the fast family.
            process_scale: factor on the process variance; 1: that of the network.
            process_floor_m2: process variance that is always added.
            nis_test: emit the measurement where it contradicts the prior; the recursion does not change.
            nis_threshold: limit of that test.
            max_gap_s: longest gap within a sequence.
        """
        return cls(
            flow_temperature,
            process_scale,
            process_floor_m2,
            nis_threshold=nis_threshold,
            max_gap_s=max_gap_s,
            nis_mode=NisMode.OUTPUT_ONLY if nis_test else NisMode.OFF,
            error_correlation=0.0,
            blend_sigma=True,
            sequence_resets_only=True,
        )


@dataclass(frozen=True, eq=False)
class Prior:
    """Belief propagated into this frame."""

    mean: torch.Tensor
    variance: torch.Tensor
    valid: torch.Tensor
    process_variance: torch.Tensor | None = None
    """(h, w) process noise added by the propagation, m^2; part of ``variance``."""


@dataclass(frozen=True, eq=False)
class Filtered:
    """Posterior and report of one frame, with the intermediate results."""

    posterior: SceneCoordinates
    """Output for this frame."""
    report: FilterReport
    belief: SceneCoordinates | None = None
    """Belief for the next frame, if it is not the posterior: see ``NisMode.OUTPUT_ONLY`` and :func:`confirmed`."""
    flow: Flow | None = None
    """Flow from the previous frame; None after a reset."""
    prior: Prior | None = None
    nis: torch.Tensor | None = None
    """(h, w) normalised innovation squared; meaningful where prior and measurement are valid."""


def warp(
    belief: SceneCoordinates,
    flow: Flow,
    process_scale: float,
    process_floor_m2: float,
    *,
    blend_sigma: bool = False,
) -> Prior:
    """Propagate a belief along a backward flow and add process noise.

    The process variance is the flow's own, if it has one. Otherwise it is the flow's variance in metres, by the local
    gradient of the scene coordinates, plus the spread of the four cells that are interpolated (large at a depth edge).
    It is scaled, and a floor is added. A cell is valid if its flow and all the cells that it interpolates are.

    Args:
        belief: scene coordinates of the previous frame.
        flow: backward flow to the previous frame.
        process_scale: factor on the process variance.
        process_floor_m2: added to the process variance.
        blend_sigma: interpolate standard deviations instead of variances.
    """
    uncertainty = belief.variance.sqrt() if blend_sigma else belief.variance
    along = _along_flow if runs_compiled(belief.mean, belief.variance, flow.offset) else _along_flow_in_torch
    mean, carried, spread, whole = along(belief, uncertainty, flow.offset)
    process = flow.process_variance_m2
    if process is None:
        process = flow.variance * _metres_per_cell_squared(mean) + spread
    process = process_scale * process + process_floor_m2
    return Prior(
        mean=mean,
        variance=kalman_predict(carried.square() if blend_sigma else carried, process),
        valid=flow.valid & whole,
        process_variance=process,
    )


def _along_flow(
    belief: SceneCoordinates, uncertainty: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what :func:`_along_flow_in_torch` does, by a compiled loop."""
    from kfloc_ros.kfnet import kernels

    _, h, w = belief.mean.shape
    mean, carried, spread = torch.empty(3, h, w), torch.empty(h, w), torch.empty(h, w)
    whole = torch.empty(h, w, dtype=torch.bool)
    before, its_uncertainty, valid = (t.contiguous().numpy() for t in (belief.mean, uncertainty, belief.valid))
    to = offset.contiguous().numpy()
    kernels.warp(before, its_uncertainty, valid, to, mean.numpy(), carried.numpy(), spread.numpy(), whole.numpy())
    return mean, carried, spread, whole


def _along_flow_in_torch(
    belief: SceneCoordinates, uncertainty: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a belief interpolated along a flow (2, h, w).

    Returns:
        Mean (3, h, w), uncertainty (h, w), variance per axis of the four interpolated means (h, w), and (h, w) bool,
            every interpolated cell is valid.
    """
    _, h, w = belief.mean.shape
    device = belief.mean.device
    u = torch.arange(w, device=device) + offset[0]
    v = torch.arange(h, device=device)[:, None] + offset[1]
    u, v = u.clamp(0, w - 1).reshape(-1), v.clamp(0, h - 1).reshape(-1)
    u0, v0 = u.floor().clamp(max=w - 2), v.floor().clamp(max=h - 2)
    a, b = u - u0, v - v0
    base = (v0 * w + u0).long()
    corners = torch.stack([base, base + 1, base + w, base + w + 1], dim=1)
    weights = torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], dim=1)
    centre = belief.mean.mean(dim=(1, 2), keepdim=True)  # keeps the squares below small in float32
    table = torch.cat([belief.mean - centre, uncertainty[None], belief.valid[None].to(belief.mean.dtype)])
    cells = table.reshape(5, -1).t()[corners]  # (h w, 4, 5)
    blended = (weights[..., None] * cells).sum(1)
    spread = (weights[..., None] * (cells[..., :3] - blended[:, None, :3]) ** 2).sum(dim=(1, 2)) / 3
    mean = blended[:, :3].t().reshape(3, h, w) + centre
    return mean, blended[:, 3].reshape(h, w), spread.reshape(h, w), blended[:, 4].reshape(h, w) > 0.999


def _metres_per_cell_squared(mean: torch.Tensor) -> torch.Tensor:
    """Return the mean over axes of the squared change of coordinates (3, h, w) across one cell, (h, w)."""
    padded = F.pad(mean[None], (1, 1, 1, 1), mode="replicate")[0]
    dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return (dx * dx + dy * dy).sum(0) / 3


@dataclass(frozen=True, eq=False)
class KalmanUpdate:
    """Posterior of a Kalman update."""

    mean: torch.Tensor
    """(3, ...) metres."""
    variance: torch.Tensor
    """(...) square metres; at most the smaller of prior and measurement variance."""
    nis: torch.Tensor
    """(...) normalised innovation squared; chi-square with 3 degrees of freedom if the variances are right."""


def kalman_predict(variance: torch.Tensor, process_variance: torch.Tensor) -> torch.Tensor:
    """Return the prior variance: that of the warped belief plus the process noise, both floored."""
    return variance.clamp(min=MIN_VARIANCE_M2) + process_variance.clamp(min=MIN_VARIANCE_M2)


def kalman_update(
    prior_mean: torch.Tensor,
    prior_variance: torch.Tensor,
    measurement: torch.Tensor,
    measurement_variance: torch.Tensor,
    correlation: float = 0.0,
) -> KalmanUpdate:
    """Fuse a prior (3, ...) with a measurement (3, ...).

    With independent errors:  K = P / (P + R);  x' = x + K (z - x);  P' = (1 - K) P, computed as P R / (P + R), which
    does not cancel. With correlated errors, C = correlation * sqrt(P R) (Bar-Shalom and Campo, 1986): K = (P - C) / (P
    + R - 2 C), kept in [0, 1];  P' = (1 - K)^2 P + K^2 R + 2 K (1 - K) C. A network's errors in neighbouring frames are
    similar, so fusing them as if independent gives too small variances; with the correlation, the variance of a belief
    converges to correlation^2 R.

    Args:
        prior_mean: metres.
        prior_variance: (...) square metres.
        measurement: metres.
        measurement_variance: (...) square metres.
        correlation: of the prior's and the measurement's errors, 0 to less than 1.
    """
    P = prior_variance.clamp(min=MIN_VARIANCE_M2)
    R = measurement_variance.clamp(min=MIN_VARIANCE_M2)
    innovation = measurement - prior_mean
    if correlation == 0.0:
        S = P + R
        gain = P / S
        variance = gain * R
    else:
        C = correlation * (P * R).sqrt()
        S = P + R - 2.0 * C
        gain = ((P - C) / S).clamp(0.0, 1.0)
        rest = 1.0 - gain
        variance = rest.square() * P + gain.square() * R + 2.0 * gain * rest * C
    return KalmanUpdate(
        mean=prior_mean + gain * innovation,
        variance=variance,
        nis=(innovation * innovation).sum(0) / S,
    )


def fuse(prior: Prior, measurement: SceneCoordinates, settings: FilterSettings) -> Filtered:
    """Apply the Kalman update and the NIS test where prior and measurement are valid; elsewhere take the valid one."""
    update = kalman_update(
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
        keep_prior = both & ~agree
        if report.rejected_ratio <= settings.max_rejected_ratio:  # else the image is bad, whatever its variances
            keep_prior &= prior.variance < measurement.variance
        mean, variance = torch.where(keep_prior, prior.mean, mean), torch.where(keep_prior, prior.variance, variance)
    unmeasured = prior.valid & ~measurement.valid
    belief = replace(
        measurement,
        mean=torch.where(unmeasured, prior.mean, mean),
        variance=torch.where(unmeasured, prior.variance, variance),
        valid=measurement.valid | prior.valid,
    )
    if mode is not NisMode.OUTPUT_ONLY:
        return Filtered(belief, report, prior=prior, nis=update.nis)
    emitted = torch.where(agree, update.mean, measurement.mean)
    return Filtered(replace(belief, mean=emitted), report, belief, prior=prior, nis=update.nis)


def restarted(measurement: SceneCoordinates, reason: str) -> Filtered:
    """Return the measurement as the posterior, after a reset."""
    return Filtered(measurement, FilterReport(reason, 0.0, NO_PRIOR, 0.0))


def confirmed(filtered: Filtered, variance_scale: float) -> Filtered:
    """Return a filter step that refined poses confirm, with its output variances scaled; see ``FilterSettings``."""
    posterior = filtered.posterior
    return replace(
        filtered,
        posterior=replace(posterior, variance=variance_scale * posterior.variance),
        belief=filtered.belief or posterior,
        report=replace(filtered.report, confirmed=True),
    )
