# SPDX-License-Identifier: Apache-2.0
"""Judgement of a frame: its tracking state and pose from the coarse pose and the alignment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, PoseEstimate, TrackingState

CHI2_6_999 = 22.458
"""99.9 % quantile of the chi-square distribution with 6 degrees of freedom."""


@dataclass(frozen=True)
class JudgementSettings:
    """Conditions for accepting a pose."""

    min_inlier_ratio: float = 0.2
    """Smallest share of agreeing cells of a coarse pose that is accepted on its own; from the map's calibration."""
    max_disagreement_m: float = 0.25
    max_disagreement_deg: float = 10.0
    """A coarse and a refined pose disagree if they are further apart than either limit, and than their covariances
    allow."""
    unrefined_scale: float = 4.0
    """Scale of the covariance of a coarse pose that could not be refined. Covariances are calibrated on good images,
    and an image that cannot be aligned is a bad one: blurred and half covered, the normalised squared errors of such
    poses were 2.7 times too large in the median on RedKitchen, and 7 times for the worst tenth."""


class RepeatGuard:
    """Detector of a camera that repeats its last image with new stamps.

    Args:
        limit_s: time after which a repeated image is no new image; 0: never.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._image: NDArray[np.uint8] | None = None
        self._since_ns = self._stamp_ns = 0

    def fault(self, image: NDArray[np.uint8], stamp_ns: int) -> str:
        """Return the reason why an image (H, W, 3) is a repeated one, or an empty string; equal for all calls of one
        stamp.
        """
        if self._limit_s == 0.0:
            return ""
        repeated = self._image is not None and stamp_ns >= self._stamp_ns and np.array_equal(image, self._image)
        if not repeated:
            self._image, self._since_ns = image, stamp_ns
        self._stamp_ns = stamp_ns
        repeated_s = 1e-9 * (stamp_ns - self._since_ns)
        if repeated_s <= self._limit_s:
            return ""
        return f"the camera repeats one image, byte for byte, for {repeated_s:.1f} s (max_repeat_s {self._limit_s:g})"


def judge(
    stamp_ns: int,
    coarse: CoarsePose,
    report: FilterReport,
    alignment: Alignment | None,
    *,
    had_pose: bool,
    settings: JudgementSettings,
) -> PoseEstimate:
    """Return state, reason, pose and covariance of a frame.

    An accepted alignment is TRACKING. If an accepted coarse pose disagrees with it, the state is DEGRADED, and the
    covariance covers both poses. If there is no accepted alignment, an accepted coarse pose is DEGRADED, with a larger
    covariance (TRACKING if no alignment was requested). Otherwise there is no pose.

    Args:
        stamp_ns: stamp of the frame.
        coarse: result of PnP.
        report: report of the filter.
        alignment: result of the alignment; None if refinement is off.
        had_pose: true if an earlier frame had a pose; a frame without one is then LOST instead of INITIALIZING.
        settings: thresholds.
    """
    common = PoseEstimate(stamp_ns, TrackingState.TRACKING, "", coarse=coarse, filter=report, alignment=alignment)
    weak = _weakness(coarse, settings)
    if alignment is not None and alignment.success and alignment.covariance is not None:
        apart = "" if weak else disagreement(alignment, coarse, settings)
        if not apart:
            return replace(common, T_map_camera=alignment.T_map_camera, covariance=alignment.covariance)
        assert alignment.T_map_camera is not None and coarse.T_map_camera is not None
        error = pose_tangent_error(alignment.T_map_camera, coarse.T_map_camera)
        both = alignment.covariance + np.outer(error, error)
        return replace(
            common, state=TrackingState.DEGRADED, reason=apart, T_map_camera=alignment.T_map_camera, covariance=both
        )
    if not weak:
        state = TrackingState.DEGRADED if alignment is not None else TrackingState.TRACKING
        reason = f"not refined: {alignment.reason}" if alignment is not None else ""
        covariance = coarse.covariance
        if alignment is not None and covariance is not None:
            covariance = settings.unrefined_scale * covariance
        return replace(common, state=state, reason=reason, T_map_camera=coarse.T_map_camera, covariance=covariance)
    state = TrackingState.LOST if had_pose else TrackingState.INITIALIZING
    return replace(common, state=state, reason=weak if alignment is None else f"{weak}; {alignment.reason}")


def disagreement(alignment: Alignment, coarse: CoarsePose, settings: JudgementSettings) -> str:
    """Return the contradiction between a refined and a coarse pose as a sentence, or an empty string."""
    if alignment.T_map_camera is None or coarse.T_map_camera is None:
        return ""
    if alignment.covariance is None or coarse.covariance is None:
        return ""
    between = inverse_pose(coarse.T_map_camera) @ alignment.T_map_camera
    apart_m, apart_deg = float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])
    if apart_m <= settings.max_disagreement_m and apart_deg <= settings.max_disagreement_deg:
        return ""
    error = pose_tangent_error(coarse.T_map_camera, alignment.T_map_camera)
    if error @ np.linalg.solve(alignment.covariance + coarse.covariance, error) <= CHI2_6_999:
        return ""
    return f"the coarse and the refined pose are {apart_m:.2f} m and {apart_deg:.1f} deg apart, and both look right"


def _weakness(coarse: CoarsePose, settings: JudgementSettings) -> str:
    """Return the reason why a coarse pose is not accepted on its own, or an empty string."""
    if not coarse.success:
        return coarse.reason
    if coarse.inlier_ratio >= settings.min_inlier_ratio:
        return ""
    return (
        f"only {100 * coarse.inlier_ratio:.0f} % of the cells agree with the coarse pose, "
        f"and {100 * settings.min_inlier_ratio:.0f} % are needed in this map"
    )
