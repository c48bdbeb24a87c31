# SPDX-License-Identifier: Apache-2.0
"""Tracking from frame to frame without a coarse pose: the motion model, and the conditions for relying on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, inverse_pose, jumped, make_pose, rotation_angle_deg, so3_exp, so3_log
from kfloc_ros.types import Alignment, CoarsePose

CHI2_6_999 = 22.458
"""99.9 % quantile of the chi-square distribution with 6 degrees of freedom."""


class ConstantVelocity:
    """Constant-velocity motion model from the last two poses.

    Args:
        max_gap_s: longest gap between two poses of one motion.
    """

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_ns = int(max_gap_s * 1e9)
        self._last: list[tuple[int, Matrix]] = []

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Add a pose; a gap or a jump starts a new motion."""
        if self._last and not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            self.reset()
        if self._last and jumped(self._last[-1][1], T_map_camera):
            self.reset()  # relocalized elsewhere: the difference is not a motion
        self._last = [*self._last[-1:], (stamp_ns, T_map_camera)]

    def predict(self, stamp_ns: int) -> Matrix | None:
        """Return the pose at a later time, or None without a recent pose."""
        if not self._last or not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            return None
        (t1, T1) = self._last[-1]
        if len(self._last) == 1:
            return T1
        (t0, T0) = self._last[0]
        share = (stamp_ns - t1) / (t1 - t0)
        step = inverse_pose(T0) @ T1
        return T1 @ make_pose(so3_exp(share * so3_log(step[:3, :3])), share * step[:3, 3])

    def reset(self) -> None:
        """Drop all poses."""
        self._last = []


@dataclass(frozen=True)
class TrackSettings:
    """Conditions for accepting a pose that was aligned from the predicted one alone."""

    check_period: int = 10
    """Frames between two checks by a coarse pose."""
    max_correction_m: float = 0.15
    max_correction_deg: float = 6.0
    """A correction of the prediction by more than either limit is not a camera motion, or the alignment is wrong."""
    max_cost_ratio: float = 1.5
    """Largest ratio of the alignment's cost to that at the last check."""


class Track:
    """Track: permission to align the next frame from the predicted pose alone.

    A track begins with an alignment that agrees with its frame's coarse pose. It ends with any contradiction. A coarse
    pose, which is independent of earlier poses, must confirm it every few frames; so a wrong place that looks right
    cannot persist.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self._settings = settings or TrackSettings()
        self._checked_cost: float | None = None
        self._unchecked = 0

    @property
    def holds(self) -> bool:
        """True if there is a track whose next check is not due yet."""
        return self._checked_cost is not None and self._unchecked + 1 < self._settings.check_period

    def check(self, alignment: Alignment, coarse: CoarsePose) -> bool:
        """Begin or continue the track if an alignment agrees with its frame's coarse pose, else end it.

        Returns:
            True if the two agree.
        """
        agree = agrees(alignment, coarse)
        self._checked_cost, self._unchecked = (alignment.final_cost, 0) if agree else (None, 0)
        return agree

    def contradiction(self, alignment: Alignment, predicted: Matrix) -> str:
        """Return the reason against an alignment from the predicted pose, or an empty string; update the track."""
        s = self._settings
        limit = (self._checked_cost or 0.0) * s.max_cost_ratio
        reason = alignment.reason
        if alignment.success and alignment.T_map_camera is not None:
            moved = inverse_pose(predicted) @ alignment.T_map_camera
            moved_m, moved_deg = float(np.linalg.norm(moved[:3, 3])), rotation_angle_deg(moved[:3, :3])
            if moved_m > s.max_correction_m or moved_deg > s.max_correction_deg:
                reason = f"the prediction was wrong by {moved_m:.2f} m and {moved_deg:.1f} deg"
            elif alignment.final_cost > limit:
                reason = f"the image looks less like the map than before (cost {alignment.final_cost:.3f})"
        if reason:
            self.end()
        else:
            self._unchecked += 1
        return reason

    def end(self) -> None:
        """End the track; the next frame needs a coarse pose."""
        self._checked_cost, self._unchecked = None, 0


def agrees(alignment: Alignment, coarse: CoarsePose) -> bool:
    """Return true if an alignment lies within the covariance of a coarse pose."""
    if not (alignment.success and coarse.success):
        return False
    if alignment.T_map_camera is None or coarse.T_map_camera is None or coarse.covariance is None:
        return False
    error = pose_tangent_error(coarse.T_map_camera, alignment.T_map_camera)
    covariance = coarse.covariance if alignment.covariance is None else coarse.covariance + alignment.covariance
    return bool(error @ np.linalg.solve(covariance, error) <= CHI2_6_999)
