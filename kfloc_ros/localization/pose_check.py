# SPDX-License-Identifier: Apache-2.0
"""Check of aligned poses by the whole image: what speaks against a pose, its covariance and its confidence.

An alignment fits the points that it sees, whatever the reason for their positions. Five things speak against its pose
where the residuals alone do not:

- the image fits the map only with another camera: a wrong calibration, or a print of the room somewhere else;
- a connected part of the image agrees on a displacement: that part moved, or the pose is that of the moved part;
- blocks of the image are displaced, here by more and there by less: the pose is a compromise between two groups;
- much of what the map has in view is not seen;
- the points themselves are found elsewhere more often than where the pose has them.

What is not known of the camera enlarges the covariance, by the alignment's own Jacobian.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import CHI2_6_999, at_least, pose_tangent_error, probability_within
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.jobs import HELPERS, SharedResult
from kfloc_ros.localization.camera_change import LIKELY, MOST_CAMERA_RISK, CameraChange
from kfloc_ros.localization.camera_check import CHI2_6_95, CameraCheck
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import (
    GOOD_DEG,
    GOOD_M,
    LEAST_CONFIDENCE,
    CameraVerdict,
    confidence_of,
    fit_score,
    sentence,
    sentence_on_one_image,
    widened,
)
from kfloc_ros.localization.results import StageTimes
from kfloc_ros.localization.tracking import FirstPoses, Support
from kfloc_ros.maps.scene_map import Calibration
from kfloc_ros.pixloc.camera_fit import MAPPED_ODDS, Correction, FittedCamera
from kfloc_ros.pixloc.image_check import BlockMatch
from kfloc_ros.pixloc.refiner import Inspection, Refiner
from kfloc_ros.types import Frame, PoseEstimate, TrackingState

SUSPICIOUS_CHI2, SUSPICIOUS_SHARE = 6.0, 0.75
"""The camera is fitted to an image whose residuals suggest an offset beyond the first (chi-square, 6 degrees of
freedom), or of which less than the second share of blocks matches; other images are fitted every few frames."""
MAX_MOTION_S = 0.5
"""Longest time between two poses, in seconds, from which a motion is computed."""
COSTLY_POWER = 6
"""Power of the cost, relative to the map's limit, by which covariances of costlier poses grow. On six maps, squared
errors up to 1.2 and up to 1.4 times the limit are 1.2 and 1.8 times as large in bad images, 2.7 and 4.3 times where
something moved."""
KEPT_IN_VIEW = 0.67
"""Share of the points in view that an alignment with another camera has to keep to be compared."""


class PoseCheck:
    """Check of the poses of one camera in one map.

    Args:
        refiner: aligner of the map's reference views.
        camera: pinhole camera of the map.
        config: options of the localizer.
        calibration: of the map.
    """

    def __init__(self, refiner: Refiner, camera: Camera, config: LocalizerConfig, calibration: Calibration) -> None:
        self._fit_scale, self._odds = calibration.camera_fit_scale, calibration.confidence_odds
        self._usual_chi2 = calibration.usual_shift_chi2
        self._first_poses, self._expects_fit = FirstPoses(config.first_fix_agreement), False
        self._support, self._last = Support(), (0, np.eye(4))
        self._readout_s, self._corrects_camera = config.rolling_shutter_readout_s, config.camera_check == "correct"
        self._refiner, self._camera = refiner, camera
        usual, wrong = 0.01 * config.calibration_error_percent, 0.01 * config.wrong_camera_percent
        cameras = CameraCheck(camera, None, usual, self._fit_scale, wrong)
        self._cameras = None if config.camera_check == "off" else cameras
        self._change = CameraChange(self._fit_scale, cameras.tolerance, camera.width, wrong)
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
        """Return the estimate with its confidence; DEGRADED with a larger covariance if the image contradicts it."""
        T, alignment = estimate.T_map_camera, estimate.alignment
        if T is None:
            return estimate
        times = StageTimes(estimate.timings_ms)
        self._change.observe(estimate.stamp_ns, T)
        is_aligned = alignment is not None and alignment.success and estimate.state is TrackingState.TRACKING
        with times.stage("check"):
            prepared = self._refiner.prepared(features, T)
            fit = SharedResult(lambda: self._refiner.fit_camera(prepared))
            if is_aligned and self._cameras is not None and (self._expects_fit or self._cameras.is_due):
                HELPERS.enlist(fit.help)  # beside the inspection, which may find that it is not needed
            inspection = self._refiner.inspect(prepared)
            estimate, turn_rad = self._rolled(estimate, inspection.blocks)
            chi2: float | None = None
            fitted: FittedCamera | None = None
            if alignment is not None and is_aligned:
                excess = alignment.final_cost / self._refiner.settings.max_cost
                if excess > 1.0 and estimate.covariance is not None:  # matches alone support it: a bad image
                    estimate = replace(estimate, covariance=excess**COSTLY_POWER * estimate.covariance)
                checked, chi2, fitted = self._check_camera(frame, features, estimate, inspection, turn_rad, fit)
                checked = _check_blocks(checked, inspection.blocks, self._camera, self._usual_chi2)
                estimate = self._support.judged(checked, inspection.blocks, self._refiner.is_certain(alignment))
                estimate = self._check_doubt(estimate, inspection, frame.source_camera, fitted)
            evidence = self._evidence(estimate, inspection, chi2)
            if fitted is not None:
                evidence["fit_score"] = fit_score(T, fitted)
            confidence, C = confidence_of(evidence, self._odds), estimate.covariance
            if C is not None:  # no more than the covariance itself claims
                confidence = min(confidence, probability_within(C, GOOD_M, math.radians(GOOD_DEG)))
            estimate = self._waiting(estimate, confidence)
            self._change.is_claimed = estimate.state is TrackingState.TRACKING
            self._support.observe(estimate)
        return replace(estimate, evidence=evidence, confidence=confidence, timings_ms=times.with_total())

    def reset(self) -> None:
        """Forget earlier poses, not the camera; the next pose is a first one."""
        self._first_poses.reset()
        self._change.begin_motion()
        self._support.reset()
        self._last = (0, np.eye(4))

    def _rolled(self, estimate: PoseEstimate, blocks: BlockMatch | None) -> tuple[PoseEstimate, float]:
        """Return the estimate with a covariance that includes the motion during the readout, and that as an angle, rad.

        Poses of rows are spread evenly over the motion: a variance of a twelfth of its square, in all directions.
        """
        T, depth_m = estimate.T_map_camera, max(blocks.depth_m if blocks is not None else 1.0, 0.1)
        assert T is not None
        (last_ns, last), self._last = self._last, (estimate.stamp_ns, T)
        elapsed_s = 1e-9 * (estimate.stamp_ns - last_ns)
        if self._readout_s == 0.0 or not 0.0 < elapsed_s <= MAX_MOTION_S:
            return estimate, 0.0
        moved = pose_tangent_error(last, T) * self._readout_s / elapsed_s
        turn_rad = float(np.linalg.norm(moved[3:]) + np.linalg.norm(moved[:3]) / depth_m)
        if estimate.covariance is not None:
            spread = np.repeat([(turn_rad * depth_m) ** 2, turn_rad**2], 3) / 12.0
            estimate = replace(estimate, covariance=estimate.covariance + np.diag(spread))
        return estimate, turn_rad

    def _waiting(self, estimate: PoseEstimate, confidence: float) -> PoseEstimate:
        """Return the estimate; DEGRADED if it is unlikely, and tentative while others have to agree with it first."""
        T = estimate.T_map_camera
        assert T is not None
        if confidence < LEAST_CONFIDENCE and estimate.state is TrackingState.TRACKING:
            reason = f"errors below {100 * GOOD_M:g} cm, {GOOD_DEG:g} deg have a probability of only {confidence:.2f}"
            estimate = replace(estimate, state=TrackingState.DEGRADED, reason=reason)
        missing = self._first_poses.missing(estimate.stamp_ns, T, confidence)
        if missing == 0:
            return estimate
        waits = f"a first pose with a confidence of {confidence:.2f} waits for {missing} more that agree"
        reason = "; ".join(filter(None, (estimate.reason, waits)))
        return replace(estimate, state=TrackingState.DEGRADED, reason=reason, tentative=True)

    def _check_camera(
        self,
        frame: Frame,
        features: BackboneFeatures,
        estimate: PoseEstimate,
        inspection: Inspection,
        turn_rad: float,
        fit: SharedResult[FittedCamera | None],
    ) -> tuple[PoseEstimate, float | None, FittedCamera | None]:
        """Return the estimate, the chi-square of the camera's offsets in this image, and the fit, if one is due."""
        cameras, T = self._cameras, estimate.T_map_camera
        if cameras is None or T is None:
            return estimate, None, None
        so_far = cameras.doubt.probability
        if cameras.begin(frame.source_camera, turn_rad):
            self._correction = None
            self._change.announced(so_far)
        score, blocks, fitted, another = inspection.camera, inspection.blocks, None, 0.0
        chi2 = None if score is None else cameras.chi2(score.offsets, score.covariance)
        is_suspicious = blocks is not None and blocks.matching_share < SUSPICIOUS_SHARE
        is_suspicious = is_suspicious or (chi2 is not None and chi2 > SUSPICIOUS_CHI2)
        is_due = cameras.count_frame()
        self._expects_fit = is_suspicious
        if is_due or is_suspicious:
            fitted = fit.result()
        if fitted is not None:
            chi2, another = max(cameras.chi2_of(fitted.fit) or 0.0, chi2 or 0.0), cameras.another(fitted.fit)
            if fitted.parts is not None and estimate.covariance is not None:
                estimate = replace(estimate, covariance=estimate.covariance + fitted.parts.moments)
            cameras.add(fitted, T, is_due)
            if cameras.mapped_offsets is not None and inspection.blocks is not None:
                depth_m = inspection.blocks.depth_m
                found = self._mapped_probability(features, T, cameras.mapped_offsets, depth_m)
                cameras.mapped_probability = cameras.mapped_probability if found is None else found
        verdict = cameras.verdict
        if verdict is not None and verdict.wrong is not None:
            self.camera_note = sentence(verdict, frame.source_camera, self._camera)
            estimate = replace(cameras.widened(estimate), state=TrackingState.DEGRADED, reason=self.camera_note)
            if self._applies_correction:
                self._correction = Correction.of(self._camera, verdict.offsets, self._correction)
                self.camera_note += "; localizing with the camera that fits"
                cameras.reset()
                self._change.reset()
            return estimate, chi2, fitted
        if self._correction is None:
            self.camera_note = ""
        if fitted is not None and chi2 is not None:
            certain = cameras.mapped_verdict(fitted.fit)
            if certain is None and chi2 > CHI2_6_999 and another > LIKELY:
                certain = cameras.verdict_of(fitted.fit)
            if certain is not None:
                return self._contradicted(frame, estimate, fitted, certain), chi2, fitted
            if chi2 > CHI2_6_95:  # how vague the other camera's pose is does not count
                apart = pose_tangent_error(T, fitted.T_map_camera)
                estimate = widened(estimate, apart, np.zeros((6, 6)), likely=another)
        if inspection.sensitivity is not None and estimate.covariance is not None:
            S = inspection.sensitivity
            alone = None if fitted is None else fitted.fit
            wider = estimate.covariance + S @ cameras.moments(inspection.camera, frame.source_camera, alone) @ S.T
            if (shear := cameras.shear(inspection.camera, alone)) is not None:
                wider = wider + shear.of_pose(S)[0]
            estimate = replace(estimate, covariance=0.5 * (wider + wider.T))
        return estimate, chi2, fitted

    def _check_doubt(
        self, estimate: PoseEstimate, inspection: Inspection, given: Camera | None, fitted: FittedCamera | None
    ) -> PoseEstimate:
        """Return the estimate; DEGRADED if a wrong camera may move it by more than the limits, which it then covers.

        An image can fit a wrong camera as well as the right one. Later images, or a step of the pose, tell them apart.
        """
        cameras, S = self._cameras, inspection.sensitivity
        if cameras is None or S is None or estimate.covariance is None:
            return estimate
        doubts = [d for d in (self._change.doubt(S, fitted), cameras.doubt) if d is not None]
        doubt = max(doubts, key=lambda d: d.of_pose(S)[1])
        (covariance, risk), is_stepped = doubt.of_pose(S), doubt is not cameras.doubt
        cameras.is_doubtful = risk > MOST_CAMERA_RISK
        if not (cameras.is_doubtful or is_stepped):
            return estimate
        estimate = replace(estimate, covariance=estimate.covariance + covariance)
        if estimate.state is not TrackingState.TRACKING or not cameras.is_doubtful:
            return estimate
        source = "camera_info" if given is not None else "the map's images"
        if is_stepped:
            source += f", since the pose stepped by {self._change.step_m:.2f} m"
        reason = (
            f"the images do not tell yet whether the camera is that of {source}: its focal length is known to "
            f"{100 * doubt.focal_sigma:.0f} %, and errors above {100 * GOOD_M:g} cm, {GOOD_DEG:g} deg by a wrong one "
            f"have a probability of {100 * risk:.1f} %"
        )
        return replace(estimate, state=TrackingState.DEGRADED, reason=reason)

    def _mapped_probability(
        self, features: BackboneFeatures, T: Matrix, offsets: NDArray[np.float64], depth_m: float
    ) -> float | None:
        """Return the probability that an image with another calibration is of the map's camera; None if not known.

        The image is aligned with either camera. Where it hardly tells them apart, both cost the same, however sharp the
        minimum is that a fit of the camera found.

        Args:
            features: features of the image.
            T: aligned pose, (4, 4).
            offsets: (6,) offsets of the map's camera from the given one.
            depth_m: usual depth; the second alignment begins where points at this depth stay in the image.
        """
        focal, aspect, dx, dy = (float(c) for c in offsets[:4])
        c, refiner, scale = self._camera, self._refiner, math.exp(focal)
        mapped = replace(c, fx=c.fx * scale, fy=c.fy * scale * math.exp(aspect), cx=c.cx + dx, cy=c.cy + dy)
        turn = so3_exp(np.array([-dy / mapped.fy, dx / mapped.fx, 0.0]))
        start = T @ make_pose(turn, np.array([0.0, 0.0, depth_m * (1.0 - scale)]))
        given = refiner.align(features, [T], max_cost=math.inf)
        other = Refiner(refiner.references, mapped, refiner.settings).align(features, [start], max_cost=math.inf)
        if not (given.success and other.success and other.valid_ratio >= KEPT_IN_VIEW * given.valid_ratio):
            return None
        rise = (other.final_cost - given.final_cost) / max(given.final_cost, 1e-9)
        sizes = {ident: len(view) for ident, view in zip(refiner.references.ids, refiner.references.views, strict=True)}
        points = given.valid_ratio * sum(sizes[ident] for ident in given.reference_ids)
        odds = math.log(MAPPED_ODDS) - 0.5 * points * rise / self._fit_scale
        return 1.0 / (1.0 + math.exp(-max(min(odds, 30.0), -30.0)))

    def _contradicted(
        self, frame: Frame, estimate: PoseEstimate, fitted: FittedCamera, certain: CameraVerdict
    ) -> PoseEstimate:
        """Return the estimate, DEGRADED, of an image that fits the map with another camera only; with both poses."""
        T = estimate.T_map_camera
        assert T is not None
        apart = pose_tangent_error(T, fitted.T_map_camera)
        both = widened(estimate, apart, fitted.covariance)
        reason = sentence_on_one_image(certain, frame.source_camera, self._camera)
        return replace(both, state=TrackingState.DEGRADED, reason=reason)

    def _evidence(self, estimate: PoseEstimate, inspection: Inspection, chi2: float | None) -> dict[str, float]:
        """Return the values that the confidence depends on; see :func:`confidence_of`."""
        evidence: dict[str, float] = {}
        alignment, blocks = estimate.alignment, inspection.blocks
        if alignment is not None:
            evidence["cost_ratio"] = min(alignment.final_cost / self._refiner.settings.max_cost, 2.0)
        if blocks is not None:
            evidence["missing_share"] = 1.0 - blocks.matching_share
            evidence["shift_score"] = math.log1p(blocks.shift_chi2)
        if chi2 is not None:
            evidence["camera_score"] = math.log1p(chi2)
        if estimate.covariance is not None:
            variance = np.diag(estimate.covariance)
            sigma = max(math.sqrt(variance[:3].sum()) / GOOD_M, math.degrees(math.sqrt(variance[3:].sum())) / GOOD_DEG)
            evidence["sigma_score"] = float(np.clip(math.log(max(sigma, 1e-6)), -5.0, 3.0))
        return evidence


def _check_blocks(estimate: PoseEstimate, blocks: BlockMatch | None, camera: Camera, usual_chi2: float) -> PoseEstimate:
    """Return the estimate with a covariance that includes what displaces blocks; DEGRADED if they contradict it.

    A pose that is off displaces blocks, too, so that its covariance may explain them already: the larger one counts.
    """
    if blocks is None:
        return estimate
    if estimate.covariance is not None:
        variances = blocks.variances(camera, usual_chi2)
        estimate = replace(estimate, covariance=at_least(estimate.covariance, variances))
    if not blocks.fault or estimate.state is not TrackingState.TRACKING:
        return estimate
    return replace(estimate, state=TrackingState.DEGRADED, reason=blocks.fault)
