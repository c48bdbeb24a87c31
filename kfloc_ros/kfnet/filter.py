# SPDX-License-Identifier: Apache-2.0
"""Recursive filter that propagates the belief over scene coordinates from frame to frame.

One implementation serves both families of networks. They differ in the flow function, and in the process noise:
predicted by a network, or modelled from the flow's uncertainty. The filter works in the map frame. The frame in which a
reference SCoordNet regresses is an isometry of it, up to a scale, so the result is the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kfloc_ros.device import runs_compiled
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, jumped
from kfloc_ros.jobs import SharedResult
from kfloc_ros.kfnet.flow import Flow, backward_flow
from kfloc_ros.kfnet.fusion import Filtered, FilterSettings, NisMode, confirmed, fuse, restarted, warp
from kfloc_ros.types import CoarsePose, Matrix, SceneCoordinates

REMEMBERED_POSES = 8
"""Number of frames within which a refined pose may arrive late."""

MIN_COVER, SETTLED_COVER = 0.7, 0.5
"""Smallest share of valid cells of a belief that covers a frame, and of one that is settled."""

SETTLED_FRAMES = 5
"""Corrections by refined poses, without a contradiction among them, that settle a belief."""
SETTLED_S = 0.25
"""Longest time since the last frame whose refined pose confirmed a settled belief, and to the next frame."""
SETTLED_REJECTED_RATIO = 0.5
"""Largest share of the prior's cells that may fail the NIS test in a frame of a settled belief."""

FlowFunction = Callable[[torch.Tensor, torch.Tensor], Flow]
"""Backward flow from the features (C, h, w) of the current and of the previous frame."""


class SceneCoordinateFilter:
    """Kalman filter over scene coordinates: prior by flow, update, NIS test, resets.

    A reset makes the measurement the posterior. The filter resets

    - at the first frame, after a gap in time, and when time goes backwards,
    - when the flow ends at the border of its search window,
    - when most of the prior contradicts the measurement,
    - after a frame without a (good enough) pose,
    - when refined poses have confirmed the belief, but no longer do: such a belief agrees with itself, however far it
    has drifted.

    With ``FilterSettings.sequence_resets_only`` only the first of these applies.

    Args:
        settings: settings of the filter.
        flow: backward flow between two frames' features; None: that of the fast family.
    """

    def __init__(self, settings: FilterSettings, flow: FlowFunction | None = None) -> None:
        self.settings = settings
        self._flow = flow or (lambda now, before: backward_flow(now, before, settings.flow_temperature))
        self._belief: SceneCoordinates | None = None
        self._features: torch.Tensor | None = None
        self._stamp_ns = 0
        self._flowing: tuple[int, SharedResult[Flow]] | None = None
        """Flow of the next frame, begun before its :meth:`step`, with its stamp."""
        self._poses: dict[int, Matrix] = {}
        """Coarse poses of the last frames since the reset, by stamp, with all corrections applied."""
        self._confirmed_ns: int | None = None
        self._reset_reason = "first frame"
        self._contradictions = 0
        self._settling = 0

    def reset(self, reason: str) -> None:
        """Drop the belief; the next frame starts from its measurement alone."""
        self._belief, self._features, self._flowing, self._reset_reason = None, None, None, reason
        self._confirmed_ns, self._poses = None, {}
        self._contradictions, self._settling = 0, 0

    @property
    def last_pose(self) -> Matrix | None:
        """Coarse pose ``T_map_camera`` of the last frame that had one since the reset, with all corrections applied."""
        return next(reversed(self._poses.values()), None)

    def accept_pose(self, pose: CoarsePose) -> None:
        """Take note of the pose computed from the last posterior; no pose, or one with few inliers, resets the filter.

        Only frames with a pose noted here can be corrected later.
        """
        if self.settings.sequence_resets_only:
            return
        if not pose.success:
            self.reset(f"no coarse pose: {pose.reason}")
        elif pose.inlier_ratio < self.settings.min_inlier_ratio:
            self.reset(f"only {pose.inlier_ratio:.0%} of the cells agree with the pose")
        elif pose.T_map_camera is not None:
            self._poses[self._stamp_ns] = pose.T_map_camera
            while len(self._poses) > REMEMBERED_POSES:
                del self._poses[next(iter(self._poses))]

    def correct_belief(self, stamp_ns: int, camera: Camera, T_map_camera: Matrix) -> None:
        """Correct the belief by an accepted refined pose of a recent frame.

        The frame need not be the last one, since a refiner in a separate process answers later. The motion from that
        frame to the last one follows from their coarse poses, whose errors are similar. A refined pose far from the
        frame's coarse pose shows that the belief was of another place; the filter then resets.

        Args:
            stamp_ns: stamp of the frame; an unknown frame, or one without a coarse pose, changes nothing.
            camera: pinhole camera of the frames.
            T_map_camera: refined pose of the frame, (4, 4).
        """
        coarse = self._poses.get(stamp_ns)
        if self._belief is None or coarse is None or self._stamp_ns not in self._poses:
            return
        if jumped(coarse, T_map_camera):
            self.reset("the refined pose is at another place")
            return
        correction = T_map_camera @ inverse_pose(coarse)
        self._poses = {stamp: correction @ T for stamp, T in self._poses.items() if stamp >= stamp_ns}
        self._belief = onto_rays(self._belief, camera, self._poses[self._stamp_ns])
        follows = self._confirmed_ns is not None and stamp_ns - self._confirmed_ns <= SETTLED_S * 1e9
        self._confirmed_ns = stamp_ns
        self._settling = self._settling + 1 if follows else 1
        self._contradictions = 0  # a refined pose confirms the belief, so the measurement was bad

    @property
    def is_confirmed(self) -> bool:
        """True if refined poses have confirmed the belief."""
        return self._confirmed_ns is not None

    @property
    def is_settled(self) -> bool:
        """True if refined poses of several frames in a row have confirmed the belief, without a contradiction since."""
        return self._confirmed_ns is not None and self._settling >= SETTLED_FRAMES

    def is_settled_at(self, stamp_ns: int) -> bool:
        """Return true if the belief is settled, and a pose confirmed it shortly before this time."""
        if self._confirmed_ns is None or not self.is_settled:
            return False
        return 0 < stamp_ns - self._confirmed_ns <= SETTLED_S * 1e9

    def covers(self, stamp_ns: int) -> bool:
        """Return true if a frame at this time meets a confirmed belief over most cells; a gap in time resets it.

        A belief that the frame before contradicted covers nothing.
        """
        self._check_time(stamp_ns)
        if self._belief is None or self._confirmed_ns is None or self._contradictions:
            return False
        least = SETTLED_COVER if self.is_settled else MIN_COVER
        return float(self._belief.valid.float().mean()) >= least

    def begin_flow(self, stamp_ns: int, features: torch.Tensor) -> Callable[[], None]:
        """Begin the flow of the next :meth:`step`, which needs no measurement; return what another thread can run."""
        if self._belief is None or self._features is None:
            return lambda: None
        before, flow = self._features, self._flow

        @torch.inference_mode()
        def compute() -> Flow:
            return flow(features, before)

        self._flowing = stamp_ns, SharedResult(compute)
        return self._flowing[1].help

    def step(self, stamp_ns: int, features: torch.Tensor, measurement: SceneCoordinates) -> Filtered:
        """Fuse the measurement of a frame with the belief propagated from the previous frame.

        Args:
            stamp_ns: stamp of the frame; a gap or a step backwards resets the filter.
            features: (C, h, w) L2-normalised features of the frame, of the kind that the flow function takes.
            measurement: scene coordinates of the frame.
        """
        self._check_time(stamp_ns)
        if self._belief is None or self._features is None:
            filtered = restarted(measurement, self._reset_reason)
        else:
            begun_ns, begun = self._flowing or (None, None)
            flow = begun.result() if begun and begun_ns == stamp_ns else self._flow(features, self._features)
            filtered = self._propagate(self._belief, flow, measurement)
            if filtered.report.reset_reason:
                self._confirmed_ns, self._poses = None, {}
            if filtered.report.reset_reason or filtered.report.rejected_ratio > SETTLED_REJECTED_RATIO:
                self._settling = 0
            if self._confirmed_ns is not None:
                filtered = confirmed(filtered, self.settings.confirmed_variance_scale)
        self._belief = filtered.belief or filtered.posterior
        self._features, self._stamp_ns, self._reset_reason, self._flowing = features, stamp_ns, "", None
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

    def _propagate(self, belief: SceneCoordinates, flow: Flow, measurement: SceneCoordinates) -> Filtered:
        s = self.settings
        at_edge = None if s.sequence_resets_only else flow.at_edge
        if at_edge is not None and (ratio := float(at_edge.float().mean())) > s.max_edge_ratio:
            reason = f"the flow of {ratio:.0%} of the cells leaves its search window"
            return replace(restarted(measurement, reason), flow=flow)
        prior = warp(belief, flow, s.process_scale, s.process_floor_m2, blend_sigma=s.blend_sigma)
        filtered = replace(fuse(prior, measurement, s), flow=flow)
        rejected = filtered.report.rejected_ratio
        self._contradictions = self._contradictions + 1 if rejected > s.max_rejected_ratio else 0
        patience = s.patience if s.nis_mode is NisMode.LOWER_VARIANCE else 0
        if self._contradictions <= patience or s.nis_mode is NisMode.OFF or s.sequence_resets_only:
            return filtered
        self._contradictions = 0
        reason = f"{rejected:.0%} of the prior contradicts the measurement"
        report = replace(filtered.report, reset_reason=reason)
        return replace(filtered, posterior=measurement, belief=None, report=report)


MIN_DEPTH_M = 0.1
"""Smallest depth of a valid point; a nearer point, or one behind the camera, is not what the cell showed."""


def onto_rays(belief: SceneCoordinates, camera: Camera, T_map_camera: Matrix) -> SceneCoordinates:
    """Move every point of a belief, at its depth, onto the viewing ray of its cell from a pose.

    Points that are not in front of the camera become invalid. Variances stay, since the largest error left is a cell's
    depth, which is no better known than before.

    Args:
        belief: scene coordinates of an image, map frame.
        camera: pinhole camera of the image.
        T_map_camera: pose of the image, (4, 4).
    """
    _, h, w = belief.mean.shape
    device = belief.mean.device
    if runs_compiled(belief.mean):
        from kfloc_ros.kfnet import kernels

        onto, valid, c = torch.empty(3, h, w), torch.empty(h, w, dtype=torch.bool), camera
        model = np.array([c.fx, c.fy, c.cx, c.cy, belief.stride, belief.pixel_offset], dtype=np.float64)
        before, T = (belief.mean.contiguous().numpy(), belief.valid.contiguous().numpy()), T_map_camera.astype(float)
        kernels.onto_rays(*before, np.ascontiguousarray(T), model, MIN_DEPTH_M, onto.numpy(), valid.numpy())
        return replace(belief, mean=onto, valid=valid)
    pose = torch.from_numpy(T_map_camera).to(device)
    back = torch.from_numpy(inverse_pose(T_map_camera)).to(device)
    depth_m = torch.einsum("k,khw->hw", back[2, :3], belief.mean.double()) + back[2, 3]
    u = torch.arange(w, device=device, dtype=torch.float64) * belief.stride + belief.pixel_offset
    v = torch.arange(h, device=device, dtype=torch.float64) * belief.stride + belief.pixel_offset
    x = ((u - camera.cx) / camera.fx).expand(h, w)
    y = ((v - camera.cy) / camera.fy)[:, None].expand(h, w)
    points = torch.stack([x * depth_m, y * depth_m, depth_m])
    mean = torch.einsum("ik,khw->ihw", pose[:3, :3], points) + pose[:3, 3, None, None]
    return replace(belief, mean=mean.to(belief.mean.dtype), valid=belief.valid & (depth_m > MIN_DEPTH_M))
