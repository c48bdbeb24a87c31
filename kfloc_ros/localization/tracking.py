# SPDX-License-Identifier: Apache-2.0
"""From frame to frame without a coarse pose: the motion model, and how far it may be relied on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, inverse_pose, jumped, make_pose, rotation_angle_deg, so3_exp, so3_log
from kfloc_ros.types import Alignment, CoarsePose

CHI2_6_999 = 22.458
"""99.9 % quantile of the chi-square distribution with 6 degrees of freedom."""


class ConstantVelocity:
    """Predicts a pose from the last two."""

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_ns = int(max_gap_s * 1e9)
        self._last: list[tuple[int, Matrix]] = []

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Remember a pose."""
        if self._last and not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            self.forget()
        if self._last and jumped(self._last[-1][1], T_map_camera):
            self.forget()  # found elsewhere: what lies between is not a motion that goes on
        self._last = [*self._last[-1:], (stamp_ns, T_map_camera)]

    def predict(self, stamp_ns: int) -> Matrix | None:
        """Pose at a later time, or None without a recent one."""
        if not self._last or not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            return None
        (t1, T1) = self._last[-1]
        if len(self._last) == 1:
            return T1
        (t0, T0) = self._last[0]
        share = (stamp_ns - t1) / (t1 - t0)
        step = inverse_pose(T0) @ T1
        return T1 @ make_pose(so3_exp(share * so3_log(step[:3, :3])), share * step[:3, 3])

    def forget(self) -> None:
        self._last = []


@dataclass(frozen=True)
class TrackSettings:
    """When a pose that was aligned from the predicted one alone is believed."""

    check_period: int = 10
    """Every so many frames a coarse pose is found all the same, and has to agree."""
    max_correction_m: float = 0.15
    max_correction_deg: float = 6.0
    """A prediction that was wrong by more than either is no motion of a camera, or not where it ended."""
    max_cost_ratio: float = 1.5
    """How much more than at the last check the alignment may cost."""


class Track:
    """Whether the next frame may be aligned from the predicted pose alone.

    A track begins with an alignment that agrees with its frame's coarse pose, ends with any doubt, and has to agree
    with a coarse pose again every so many frames: the coarse pose knows nothing of the poses before, so that a wrong
    place which looks right cannot be held for longer.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self._settings = settings or TrackSettings()
        self._checked_cost: float | None = None
        self._unchecked = 0

    @property
    def holds(self) -> bool:
        """Whether there is a track whose next check is not due yet."""
        return self._checked_cost is not None and self._unchecked + 1 < self._settings.check_period

    def check(self, alignment: Alignment, coarse: CoarsePose) -> bool:
        """Begin or go on if an alignment agrees with the coarse pose of its frame, else end; says which."""
        agree = agrees(alignment, coarse)
        self._checked_cost, self._unchecked = (alignment.final_cost, 0) if agree else (None, 0)
        return agree

    def doubt(self, alignment: Alignment, predicted: Matrix) -> str:
        """What speaks against an alignment that started at the predicted pose, or nothing, which goes on."""
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
        """Have the next frames begin anew with a coarse pose."""
        self._checked_cost, self._unchecked = None, 0


def agrees(alignment: Alignment, coarse: CoarsePose) -> bool:
    """Whether an alignment lies where a coarse pose, with its covariance, says that the camera is."""
    if not (alignment.success and coarse.success):
        return False
    if alignment.T_map_camera is None or coarse.T_map_camera is None or coarse.covariance is None:
        return False
    error = pose_tangent_error(coarse.T_map_camera, alignment.T_map_camera)
    covariance = coarse.covariance if alignment.covariance is None else coarse.covariance + alignment.covariance
    return bool(error @ np.linalg.solve(covariance, error) <= CHI2_6_999)
