# SPDX-License-Identifier: Apache-2.0
"""The recursive filter: carries the belief over scene coordinates from frame to frame.

One implementation for both families of networks: they differ in the function that gives the flow, and in whether the
process noise comes from a network or is modelled from the flow's uncertainty. It works in the map frame; since the
frame in which a reference SCoordNet regresses is an isometry of it, up to a scale, the result is the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.kfnet import kalman
from kfloc_ros.kfnet.oflownet import Flow, backward_flow
from kfloc_ros.kfnet.pose_correction import onto_rays
from kfloc_ros.tracking import jumped
from kfloc_ros.types import CoarsePose, FilterReport, Matrix, SceneCoordinates

NO_PRIOR = float("nan")
REMEMBERED_POSES = 8
"""Frames for which a refined pose may come late."""

FlowFunction = Callable[[torch.Tensor, torch.Tensor], Flow]
"""Backward flow from the features (C, h, w) of the current and of the previous frame."""


class NisMode(Enum):
    """What happens to a cell whose measurement contradicts its prior."""

    OFF = "off"
    """Nothing: prior and measurement are fused all the same."""
    OUTPUT_ONLY = "output_only"
    """The emitted coordinates are the measurement's; the recursion keeps what was fused (as published)."""
    STATE = "state"
    """The recursion starts anew from the measurement in this cell, too."""
    SURER = "surer"
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
    """Contradicting frames in a row that are taken for bad pictures (with ``NisMode.SURER``, the belief is kept);
    with the next one, the belief is taken to be wrong and dropped. Never with ``NisMode.OFF``."""
    nis_mode: NisMode = NisMode.SURER
    error_correlation: float = 0.7
    """Of the errors of prior and measurement, as measured; 0 is the independence that the original assumes."""
    max_edge_ratio: float = 0.6
    """If the flow of more cells than this ends at the border of its search window, the recursion starts anew."""
    min_inlier_ratio: float = 0.0
    """A pose with a smaller share of inliers than this drops the belief that it came from."""
    posterior_floor_m2: float = 0.0
    """Smallest posterior variance of fused cells."""
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
    """What the recursion carries on, where that is not the posterior (``NisMode.OUTPUT_ONLY``)."""
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


class SceneCoordinateFilter:
    """Prior by flow, Kalman update, NIS test, resets.

    The recursion starts anew, with the measurement as posterior: at the first frame, after a gap in time, when time
    goes backwards, when the flow ends at the border of its window, when most of the prior contradicts the
    measurement, after a frame without a (good enough) pose, and when a belief that refined poses have confirmed has
    not been for a while: such a belief agrees with itself, however far it has drifted.

    Args:
        settings: of the recursion.
        flow: backward flow between two frames' features; by default the fast family's.
    """

    def __init__(self, settings: FilterSettings, flow: FlowFunction | None = None) -> None:
        self.settings = settings
        self._flow = flow or (lambda now, before: backward_flow(now, before, settings.flow_temperature))
        self._belief: SceneCoordinates | None = None
        self._features: torch.Tensor | None = None
        self._stamp_ns = 0
        self._poses: dict[int, Matrix] = {}
        """Coarse poses of the last frames since the recursion began, by stamp, as corrected since."""
        self._confirmed_ns: int | None = None
        self._reset_reason = "first frame"
        self._contradictions = 0

    def reset(self, reason: str) -> None:
        """Forget the belief; the next frame starts from its measurement alone."""
        self._belief, self._features, self._reset_reason = None, None, reason
        self._confirmed_ns, self._poses = None, {}
        self._contradictions = 0

    def judge(self, pose: CoarsePose) -> None:
        """Say what pose came of the last posterior: a belief that gives none, or hardly one, is not carried on.

        Only what was told here can be learned from later.
        """
        if not pose.success:
            self.reset(f"no coarse pose: {pose.reason}")
        elif pose.inlier_ratio < self.settings.min_inlier_ratio:
            self.reset(f"only {pose.inlier_ratio:.0%} of the cells agree with the pose")
        elif pose.T_map_camera is not None:
            self._poses[self._stamp_ns] = pose.T_map_camera
            while len(self._poses) > REMEMBERED_POSES:
                del self._poses[next(iter(self._poses))]

    def learn(self, stamp_ns: int, camera: Camera, T_map_camera: Matrix) -> None:
        """Correct the belief by the pose that refinement found for a frame, and stands by.

        The frame need not be the last one, since a refiner in a process of its own answers later: how the camera moved
        from it to the last one is known from their coarse poses, whose errors are alike. A pose found far from the
        frame's coarse one shows that the belief was of another place; then it is dropped.

        Args:
            stamp_ns: of the frame; one that is no longer known, or that had no coarse pose, teaches nothing.
            camera: of the frames.
            T_map_camera: refined pose of the frame.
        """
        coarse = self._poses.get(stamp_ns)
        if self._belief is None or coarse is None:
            return
        if jumped(coarse, T_map_camera):
            self.reset("the pose was found elsewhere")
            return
        correction = T_map_camera @ inverse_pose(coarse)
        self._poses = {stamp: correction @ T for stamp, T in self._poses.items() if stamp >= stamp_ns}
        self._belief = onto_rays(self._belief, camera, self._poses[self._stamp_ns])
        self._confirmed_ns = stamp_ns
        self._contradictions = 0  # if the measurement contradicted it, the picture was to blame

    def step(self, stamp_ns: int, features: torch.Tensor, measurement: SceneCoordinates) -> Filtered:
        """Fuse the measurement of a frame with the belief carried from the frame before.

        Args:
            stamp_ns: time of the frame; a gap or a step backwards resets the recursion.
            features: (C, h, w) L2-normalised features of the frame, of the kind that the flow takes.
            measurement: scene coordinates of the frame.
        """
        self._check_time(stamp_ns)
        if self._belief is None or self._features is None:
            filtered = _started_anew(measurement, self._reset_reason)
        else:
            filtered = self._carried(self._belief, self._flow(features, self._features), measurement)
            if filtered.report.reset_reason:
                self._confirmed_ns, self._poses = None, {}
            confirmed = self._confirmed_ns is not None
            filtered = replace(filtered, report=replace(filtered.report, confirmed=confirmed))
        self._belief = filtered.belief or filtered.posterior
        self._features, self._stamp_ns, self._reset_reason = features, stamp_ns, ""
        return filtered

    def _check_time(self, stamp_ns: int) -> None:
        if self._belief is None:
            return
        gap_s = (stamp_ns - self._stamp_ns) * 1e-9
        if gap_s <= 0:
            self.reset("time went backwards")
        elif gap_s > self.settings.max_gap_s:
            self.reset(f"no frame for {gap_s:.2f} s")
        elif self._confirmed_ns is not None:
            unconfirmed_s = (stamp_ns - self._confirmed_ns) * 1e-9
            if unconfirmed_s > self.settings.max_gap_s:
                self.reset(f"no refined pose for {unconfirmed_s:.2f} s")

    def _carried(self, belief: SceneCoordinates, flow: Flow, measurement: SceneCoordinates) -> Filtered:
        s = self.settings
        if flow.at_edge is not None and (ratio := float(flow.at_edge.float().mean())) > s.max_edge_ratio:
            reason = f"the flow of {ratio:.0%} of the cells leaves its search window"
            return replace(_started_anew(measurement, reason), flow=flow)
        prior = warp(belief, flow, s.process_scale, s.process_floor_m2, blend_sigma=s.blend_sigma)
        filtered = replace(fuse(prior, measurement, s), flow=flow)
        rejected = filtered.report.rejected_ratio
        self._contradictions = self._contradictions + 1 if rejected > s.max_rejected_ratio else 0
        patience = s.patience if s.nis_mode is NisMode.SURER else 0
        if self._contradictions <= patience or s.nis_mode is NisMode.OFF:
            return filtered
        self._contradictions = 0
        reason = f"{rejected:.0%} of the prior contradicts the measurement"
        report = replace(filtered.report, reset_reason=reason)
        return replace(filtered, posterior=measurement, belief=None, report=report)


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
    if mode is NisMode.SURER:
        kept = both & ~agree
        if report.rejected_ratio <= settings.max_rejected_ratio:  # else the picture is bad, whatever its cells claim
            kept &= prior.variance < measurement.variance
        mean, variance = torch.where(kept, prior.mean, mean), torch.where(kept, prior.variance, variance)
    belief = replace(measurement, mean=mean, variance=variance)
    if mode is not NisMode.OUTPUT_ONLY:
        return Filtered(belief, report, prior=prior, nis=update.nis)
    emitted = torch.where(agree, update.mean, measurement.mean)
    return Filtered(replace(belief, mean=emitted), report, belief, prior=prior, nis=update.nis)


def _started_anew(measurement: SceneCoordinates, reason: str) -> Filtered:
    return Filtered(measurement, FilterReport(reason, 0.0, NO_PRIOR, 0.0))
