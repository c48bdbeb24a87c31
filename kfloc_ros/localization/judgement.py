# SPDX-License-Identifier: Apache-2.0
"""Judgement of a frame: state and pose from coarse pose and alignment, checked by the whole image; confidence.

An alignment fits the points that it sees, whatever the reason for their positions. Three things speak against its pose
where the residuals alone do not:

- the image fits the map only with another camera: a wrong calibration, or a print of the room somewhere else;
- a connected part of the image agrees on a displacement: that part moved, or the pose is that of the moved part;
- much of what the map has in view is not seen.

What is not known of the camera enlarges the covariance: the pose changes with the offsets of the camera by the
alignment's own Jacobian, and the offsets are known as well as calibrations usually are and as the images tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.localization.camera_check import (
    CHI2_5_99,
    CameraCheck,
    CameraCheckSettings,
    Correction,
    sentence,
    sentence_on_one_image,
    widened,
)
from kfloc_ros.localization.results import StageTimes
from kfloc_ros.pixloc.image_check import BlockMatch
from kfloc_ros.pixloc.refiner import FittedCamera, Inspection, Refiner
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, Frame, PoseEstimate, TrackingState

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


SUSPICIOUS_CHI2, SUSPICIOUS_SHARE = 6.0, 0.75
"""The camera is fitted to an image whose residuals suggest an offset beyond the first (chi-square, 5 degrees of
freedom), or of which less than the second share of blocks matches; other images are fitted every few frames."""
MOVED_BLOCKS, MOVED_SHARE = 4, 0.08
"""Blocks, and share of the blocks, that agree on a displacement where a part has moved."""
GOOD_M, GOOD_DEG = 0.10, 5.0
"""Errors below which a pose is right, in the meaning of its confidence."""

_MEANS = {"cost_ratio": 0.84, "missing_share": 0.16, "camera_score": 2.45, "sigma_score": -0.74}
_WEIGHTS = {"cost_ratio": -0.71, "missing_share": -2.12, "camera_score": -0.78, "sigma_score": -0.98}
_BIAS = 1.55
EVIDENCE = tuple(_WEIGHTS)
"""Names of the values that the confidence depends on; see :func:`confidence_of`."""


def confidence_of(evidence: Mapping[str, float], odds: float = 1.0) -> float:
    """Return the probability that a pose is right: errors below 10 cm and 5 deg.

    The model is a logistic regression on treated frames of three maps; see ``docs/results/trust.md``.

    Args:
        evidence: values by name; one that is not known counts as the mean. ``cost_ratio``: cost relative to the map's
            limit. ``missing_share``: blocks that do not match. ``camera_score``: log(1 + chi-square) of the camera's
            offsets. ``sigma_score``: log of the standard deviation relative to 10 cm or 5 deg.
        odds: factor on the odds, from the map's calibration.
    """
    total = (
        _BIAS
        + math.log(odds)
        + sum(weight * (evidence.get(k, _MEANS[k]) - _MEANS[k]) for k, weight in _WEIGHTS.items())
    )
    return 1.0 / (1.0 + math.exp(-max(min(total, 30.0), -30.0)))


class PoseCheck:
    """Check of the poses of one camera in one map.

    Args:
        refiner: aligner of the map's reference views.
        camera: pinhole camera of the map.
        mode: ``off``, ``warn`` or ``correct``; see ``LocalizerConfig.camera_check``.
        calibration_error: usual relative error of a focal length.
        confidence_odds: factor on the odds that a pose is right, from the map's calibration.
        settings: rate and conditions of the camera's check; None: the defaults.
    """

    def __init__(
        self,
        refiner: Refiner,
        camera: Camera,
        mode: str,
        calibration_error: float,
        confidence_odds: float = 1.0,
        settings: CameraCheckSettings | None = None,
    ) -> None:
        self._odds = confidence_odds
        self._refiner, self._camera, self._corrects_camera = refiner, camera, mode == "correct"
        self._cameras = None if mode == "off" else CameraCheck(camera, settings, calibration_error)
        self._correction: Correction | None = None
        self._applies_correction = False
        """True once images pass through :meth:`corrected`; the halves and places never correct, they only warn."""
        self.camera_note = ""
        """Sentence on a camera that does not fit the images; empty if it fits."""

    def corrected(self, frame: Frame) -> Frame:
        """Return a frame with its image converted to the map's camera, if a fitted camera replaces the given one."""
        self._applies_correction = self._corrects_camera
        return frame if self._correction is None else self._correction.apply(frame)

    def check(self, frame: Frame, features: BackboneFeatures, estimate: PoseEstimate) -> PoseEstimate:
        """Check a pose.

        Returns:
            The estimate with its confidence. It is DEGRADED, with a larger covariance and the reason, if the image
            contradicts it.
        """
        T, alignment = estimate.T_map_camera, estimate.alignment
        if T is None:
            return estimate
        times = StageTimes(estimate.timings_ms)
        with times.stage("check"):
            inspection = self._refiner.inspect(features, T)
            chi2: float | None = None
            if alignment is not None and alignment.success and estimate.state is TrackingState.TRACKING:
                excess = alignment.final_cost / self._refiner.settings.max_cost
                if excess > 1.0 and estimate.covariance is not None:  # matches alone support it: a bad image
                    scale = JudgementSettings.unrefined_scale * excess**2
                    estimate = replace(estimate, covariance=scale * estimate.covariance)
                checked, chi2 = self._check_camera(frame, features, estimate, inspection)
                estimate = _check_parts(checked, inspection.blocks, self._camera)
            evidence = self._evidence(estimate, inspection, chi2)
        return replace(
            estimate, evidence=evidence, confidence=confidence_of(evidence, self._odds), timings_ms=times.with_total()
        )

    def _check_camera(
        self, frame: Frame, features: BackboneFeatures, estimate: PoseEstimate, inspection: Inspection
    ) -> tuple[PoseEstimate, float | None]:
        """Return the estimate, and the chi-square of the offsets of the camera in this image."""
        cameras, T = self._cameras, estimate.T_map_camera
        if cameras is None or T is None:
            return estimate, None
        score, fitted = inspection.camera, None
        chi2 = None if score is None else cameras.chi2(score.offsets, score.covariance)
        is_suspicious = chi2 is not None and chi2 > SUSPICIOUS_CHI2
        if inspection.blocks is not None and inspection.blocks.matching_share < SUSPICIOUS_SHARE:
            is_suspicious = True
        is_due = cameras.count_frame()
        if is_due or is_suspicious:
            fitted = self._refiner.fit_camera(features, T)
        if fitted is not None:
            chi2 = max(cameras.chi2_of(fitted.fit) or 0.0, chi2 or 0.0)
            if is_due:
                cameras.add(fitted, T)
        verdict = cameras.verdict
        if verdict is not None and verdict.wrong is not None:
            self.camera_note = sentence(verdict, frame.source_camera, self._camera)
            estimate = replace(cameras.widened(estimate), state=TrackingState.DEGRADED, reason=self.camera_note)
            if self._applies_correction:
                self._correction = Correction.of(self._camera, verdict.offsets, self._correction)
                self.camera_note += "; localizing with the camera that fits"
                cameras.reset()
            return estimate, chi2
        if self._correction is None:
            self.camera_note = ""
        if fitted is not None and chi2 is not None and chi2 > CHI2_5_99:
            return self._contradicted(frame, estimate, fitted, cameras), chi2
        if inspection.sensitivity is not None and estimate.covariance is not None:
            S = inspection.sensitivity
            wider = estimate.covariance + S @ cameras.moments(inspection.camera) @ S.T
            estimate = replace(estimate, covariance=0.5 * (wider + wider.T))
        return estimate, chi2

    def _contradicted(
        self, frame: Frame, estimate: PoseEstimate, fitted: FittedCamera, cameras: CameraCheck
    ) -> PoseEstimate:
        """Return the estimate of an image that fits the map with another camera only."""
        reason = sentence_on_one_image(cameras.verdict_of(fitted.fit), frame.source_camera, self._camera)
        T = estimate.T_map_camera
        assert T is not None
        moved = pose_tangent_error(T, fitted.T_map_camera)
        return replace(widened(estimate, moved, fitted.covariance), state=TrackingState.DEGRADED, reason=reason)

    def _evidence(self, estimate: PoseEstimate, inspection: Inspection, chi2: float | None) -> dict[str, float]:
        """Return the values that the confidence depends on; see :func:`confidence_of`."""
        evidence: dict[str, float] = {}
        alignment, blocks = estimate.alignment, inspection.blocks
        if alignment is not None:
            evidence["cost_ratio"] = min(alignment.final_cost / self._refiner.settings.max_cost, 2.0)
        if blocks is not None:
            evidence["missing_share"] = 1.0 - blocks.matching_share
        if chi2 is not None:
            evidence["camera_score"] = math.log1p(chi2)
        if estimate.covariance is not None:
            variance = np.diag(estimate.covariance)
            sigma = max(math.sqrt(variance[:3].sum()) / GOOD_M, math.degrees(math.sqrt(variance[3:].sum())) / GOOD_DEG)
            evidence["sigma_score"] = float(np.clip(math.log(max(sigma, 1e-6)), -5.0, 3.0))
        return evidence


def _check_parts(estimate: PoseEstimate, blocks: BlockMatch | None, camera: Camera) -> PoseEstimate:
    """Return the estimate; DEGRADED, with a covariance that includes both poses, if a part is displaced."""
    if blocks is None or blocks.moved < max(MOVED_BLOCKS, MOVED_SHARE * blocks.blocks):
        return estimate
    if blocks.matching_share > 1.0 - MOVED_SHARE or estimate.state is not TrackingState.TRACKING:
        return estimate
    right, down = blocks.moved_px
    turn_rad = math.hypot(right / camera.fx, down / camera.fy)
    covariance = estimate.covariance
    if covariance is not None:
        # the pose of the displaced part is this far away, by turning or by moving
        other = np.repeat([(turn_rad * blocks.moved_depth_m) ** 2, turn_rad**2], 3)
        covariance = covariance + np.diag(other)
    reason = (
        f"{100 * blocks.moved_share:.0f} % of the image, as one part, is displaced by {right:+.0f} px right and "
        f"{down:+.0f} px down, while {100 * blocks.matching_share:.0f} % match: something has moved"
    )
    return replace(estimate, state=TrackingState.DEGRADED, reason=reason, covariance=covariance)
