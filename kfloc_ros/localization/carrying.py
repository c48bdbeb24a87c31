# SPDX-License-Identifier: Apache-2.0
"""Poses by this session's own images, where the map alone does not settle the pose: by their points, or from one image
to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import CHI2_6_999, UncertainPose, pose_tangent_error, probability_within
from kfloc_ros.geometry.lie import Matrix, inverse_pose, jumped
from kfloc_ros.kfnet.pnp import absolute_pose, agreeing_share
from kfloc_ros.localization.bridging import Bridge, BridgedPose
from kfloc_ros.localization.camera_change import JumpCheck
from kfloc_ros.localization.config import LocalizerConfig, pnp_settings
from kfloc_ros.localization.judgement import GOOD_DEG, GOOD_M, LEAST_CONFIDENCE
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.localization.tracking import agrees
from kfloc_ros.pixloc.refiner import Refiner, failed_alignment, query_levels
from kfloc_ros.pixloc.session_points import SessionPoints
from kfloc_ros.relocalization.matching import similar_cells
from kfloc_ros.relocalization.search import Relocalizer
from kfloc_ros.types import Alignment, Frame, PoseEstimate, TrackingState


@dataclass(frozen=True)
class CarrySettings:
    """Conditions under which points of this session's images give a pose."""

    max_cost: float = 0.28
    """Largest accepted cost; that of unrelated images is 0.29 and more."""
    min_map_support: float = 1.0
    """Support by the map's points from which a joint alignment is a pose in the map, and not one that is carried on.
    On d435_office no such pose was off by more than 8 cm, and of those with less none by more than 10 cm."""
    session_weight: float = 0.1
    """Weight of this session's points beside the map's. They share the errors of the poses that they come from, so they
    choose between minima of the map's points, but hardly move them."""
    learn_period_s: float = 0.1
    """Time between two images whose points are learned."""
    rest_period_s: float = 0.3
    """The same, while the map alone settles the poses."""
    learn_motion: float = 0.04
    """Motion of the points in the image, in the median and relative to its width, from which an image is learned
    earlier: a fast camera, or few images a second."""
    rest_motion: float = 0.1
    """The same, while the map alone settles the poses."""
    drift_m_s: float = 0.01
    drift_deg_s: float = 0.5
    """Growth of the standard deviation of a pose that is carried on."""
    min_similarity: float = 0.7
    """Smallest cosine of two features that match, where points are searched in the whole image."""
    max_error_px: float = 12.0
    """Inlier threshold of the reprojection error of these matches: a cell and a half."""
    min_inliers: int = 15
    """Number of these matches that a pose needs to be aligned."""


@dataclass(frozen=True, eq=False)
class FrameEvidence:
    """Evidence of one frame, independent of earlier poses, for an alignment."""

    refiner: Refiner
    relocalizer: Relocalizer | None
    camera: Camera
    config: LocalizerConfig
    min_inlier_ratio: float
    """Share of a measurement's cells that agree with a right pose, from the map's calibration."""

    def supports(self, alignment: Alignment, coarse: CoarseResult, features: BackboneFeatures) -> bool:
        """Return true if independent evidence supports an alignment.

        Enough reference points that find themselves there are such evidence. So is the coarse pose; but if refined
        poses have corrected its belief, it is not independent, and only this frame's own measurement or its matches
        count.
        """
        if self.refiner.is_certain(alignment):
            return True
        if not agrees(alignment, coarse.pose):
            return False
        if not coarse.filter.confirmed:
            return True
        pose, measurement = alignment.T_map_camera, coarse.measurement
        assert pose is not None
        if measurement is not None:
            share = agreeing_share(measurement, self.camera, pose, pnp_settings(self.config, measurement.stride))
            if share >= self.min_inlier_ratio:
                return True
        return self.relocalizer is not None and self.relocalizer.agrees(features, pose)


class Carrier:
    """Points of the last images of one camera, and alignments with them.

    Args:
        evidence: evidence for alignments, with the aligner, the camera and the localizer's options.
        settings: conditions; None: the defaults.
    """

    def __init__(self, evidence: FrameEvidence, settings: CarrySettings | None = None) -> None:
        self._evidence, self._refiner, self._camera = evidence, evidence.refiner, evidence.camera
        config = evidence.config
        self._longest_ns = int(config.carry_s * 1e9)
        self._bridge = Bridge(self._camera, config.max_gap_s, config.carry_s, config.carry_sigma_m)
        self._settings = settings or CarrySettings()
        self._points = SessionPoints(self._camera)
        self.jumps = JumpCheck(self._points, self._camera, config.carry_s)
        self._confirmed: tuple[int, Matrix] | None = None
        """Stamp of the last pose that the map confirms, and covariance of the last one that the map alone gave."""
        self._learned: tuple[int, UncertainPose] | None = None
        """Stamp and pose of the last image whose points were learned."""

    def reset(self) -> None:
        """Drop all points."""
        self._points.reset()
        self._bridge.reset()
        self._confirmed = self._learned = None
        self.jumps.forget()

    def is_settled(self, alignment: Alignment) -> bool:
        """Return true if the map alone settles the pose, so that points of this session's images add nothing."""
        settled = self._refiner.settings.settled_support
        return alignment.success and not alignment.carried and alignment.support >= settled

    def align(
        self, coarse: CoarseResult, features: BackboneFeatures, predicted: Matrix | None, alignment: Alignment
    ) -> Alignment | None:
        """Align with the map's points and this session's together, or with this session's alone.

        A joint alignment that neither the map's points nor other evidence supports counts as carried on. So does one
        with the session's points alone; it is tried only where the map's points do not support the pose.

        Args:
            coarse: coarse result of the image.
            features: its backbone features.
            predicted: predicted pose, (4, 4), if any.
            alignment: alignment with the map alone.

        Returns:
            The alignment; None if points of this session do not settle the pose.
        """
        s, stamp_ns, learned = self._settings, coarse.stamp_ns, self._learned
        if self._confirmed is None or not 0 < stamp_ns - self._confirmed[0] <= self._longest_ns:
            return None
        starts = [] if predicted is None else [predicted]
        if predicted is not None and learned is not None:
            starts.append(learned[1].T_map_camera)  # or it has not moved on
        found = None if alignment.success else self._by_session(features, starts)
        start = found.T_map_camera if found is not None and found.success else predicted
        if start is not None:
            joint = self._joint(start, coarse, features, alignment)
            if joint is not None:
                return joint
        if alignment.success and alignment.support >= s.min_map_support:
            return None
        found = self._by_session(features, starts) if found is None else found
        if not found.success:  # the motion has changed: where do the points lie in the image?
            located = None if self.is_blind(stamp_ns) else self._located(features)
            joint = None if located is None else self._joint(located, coarse, features, alignment)
            if joint is not None or located is None:
                return joint
            found = self._by_session(features, [located])
        if not found.success:
            return None
        return replace(self._widened(found, stamp_ns), carried=True, reason=alignment.reason)

    def _joint(
        self, start: Matrix, coarse: CoarseResult, features: BackboneFeatures, alignment: Alignment
    ) -> Alignment | None:
        """Return the alignment with the map's points and this session's together; None if they do not settle it.

        Points of this session are those in view from the start; the end of the alignment with the map alone is another
        start.
        """
        s, points = self._settings, self._points.usable(start)
        if points is None:
            return None
        light = replace(points, confidence=s.session_weight * points.confidence)
        starts = [T for T in (start, alignment.T_map_camera) if T is not None]
        found = self._refiner.align(features, starts, max_cost=s.max_cost, further=light, only_certain=True, wide=False)
        if not found.success:
            return None
        joint = self._widened(found, coarse.stamp_ns)
        # its own support includes points of this session, which are not independent of earlier poses
        alone, by_map = replace(joint, support=0.0), joint.map_support >= s.min_map_support
        if by_map or (alignment.success and self._evidence.supports(alone, coarse, features)):
            return joint
        return replace(joint, carried=True, reason=alignment.reason)

    def _by_session(self, features: BackboneFeatures, starts: list[Matrix]) -> Alignment:
        """Return the alignment with this session's points alone, from the points in view from the first start."""
        points = self._points.usable(starts[0]) if starts else None
        if points is None:
            return failed_alignment("no points of this session are in view")
        limit = self._settings.max_cost
        return self._refiner.align(features, starts, max_cost=limit, further=points, with_map=False, only_certain=True)

    def _located(self, features: BackboneFeatures) -> Matrix | None:
        """Return the pose (4, 4) by mutual nearest neighbours of all points of this session in the whole image."""
        s, (rows, positions) = self._settings, self._points.all()
        if len(rows) < s.min_inliers:
            return None
        pixels, found = similar_cells(rows, features, s.min_similarity)
        if len(pixels) < s.min_inliers:
            return None
        points = positions[found]
        origin = points.mean(axis=0)
        T, inliers = absolute_pose(pixels, points - origin, self._camera, s.max_error_px, max_iterations=1000)
        if inliers.sum() < s.min_inliers:
            return None
        T_map_camera = inverse_pose(T)
        T_map_camera[:3, 3] += origin
        return T_map_camera

    def bridge(self, frame: Frame, features: BackboneFeatures) -> BridgedPose | None:
        """Return the pose of an image that neither the map nor points settle, as far as the images before tell it."""

        def usual_depth(pixels: NDArray[np.float64], T: Matrix) -> float:
            mapped = self._refiner.references.points_near(T, self._camera, self._evidence.config.num_references)
            return float(np.median(self._points.depths(pixels, T, mapped)[0]))

        return self._bridge.carry(frame, features.reliability[0], usual_depth)

    def bridged_pose(self, stamp_ns: int) -> Matrix | None:
        """Return the pose (4, 4) that :meth:`bridge` has found for an image; None if there is none."""
        found = self._bridge.pose(stamp_ns)
        return None if found is None else found.T_map_camera

    def shows_enough(self, features: BackboneFeatures) -> bool:
        """Return true if an image shows at least half as much as the last images that had a pose."""
        return self._bridge.shows_enough(features.reliability[0])

    def is_blind(self, stamp_ns: int) -> bool:
        """Return true if :meth:`bridge` carries the pose through an image that shows too little to be found anywhere.

        It shows less than half as much as the last images that had a pose: a dark corner, a hand, or a blurred swing.
        """
        found = self._bridge.pose(stamp_ns)
        return found is not None and found.is_blind

    def bridged(self, estimate: PoseEstimate) -> PoseEstimate:
        """Return an estimate without a refined pose with that of :meth:`bridge`: DEGRADED, and said so.

        A coarse pose that could not be refined stays if it is more likely to be right, by the two covariances. Both may
        come from the poses before, so that they are not fused.
        """
        found, alignment = self._bridge.pose(estimate.stamp_ns), estimate.alignment
        if found is None or (estimate.T_map_camera is not None and (alignment is None or alignment.success)):
            return estimate
        limits, coarse = (GOOD_M, math.radians(GOOD_DEG)), estimate.covariance
        confidence = probability_within(found.covariance, *limits)
        if coarse is not None and probability_within(coarse, *limits) >= confidence:
            return estimate
        how = "by the flow of the images" if found.by_flow else "at a fading speed"
        return replace(
            estimate,
            state=TrackingState.DEGRADED,
            reason=f"carried on {how} for {found.since_s:.1f} s: {estimate.reason}",
            T_map_camera=found.T_map_camera,
            covariance=found.covariance,
            bridged=True,
            confidence=confidence,
        )

    def end_bridge(self) -> None:
        """Carry no earlier pose on: something excludes it."""
        self._bridge.reset()

    def keep_session_view(self, frame: Frame, features: BackboneFeatures, estimate: PoseEstimate) -> None:
        """Keep points of an image with an accepted alignment, and measure the depths of the others in it.

        A tentative first pose teaches nothing: those that have to agree with it must be independent of it.

        Args:
            frame: the image.
            features: its backbone features.
            estimate: its pose.
        """
        alignment, T, stamp_ns = estimate.alignment, estimate.T_map_camera, estimate.stamp_ns
        if not self._longest_ns or T is None or estimate.tentative or estimate.bridged:
            return
        if estimate.covariance is not None:
            self._bridge.observe(frame, features.reliability[0], T, estimate.covariance)
        if alignment is None or not alignment.success or estimate.covariance is None:
            return
        if alignment.covariance is not None and not alignment.carried:
            is_joint = alignment.map_support != alignment.support
            last = alignment.covariance if self._confirmed is None or not is_joint else self._confirmed[1]
            self._confirmed = stamp_ns, last
        if self._learned is not None:
            before_ns, before = self._learned[0], self._learned[1].T_map_camera
            if jumped(before, T) or stamp_ns <= before_ns:
                self._points.reset()
            elif not self._is_due(stamp_ns - before_ns, before, T, self.is_settled(alignment)):
                return
        self._learned = stamp_ns, UncertainPose(T, estimate.covariance)
        self.jumps.observe(estimate)
        mapped = self._refiner.references.points_near(T, self._camera, self._evidence.config.num_references)
        self._points.observe(query_levels(features), T, mapped)

    def _is_due(self, passed_ns: int, before: Matrix, now: Matrix, settled: bool) -> bool:
        """Return true if an image is to be learned, by time or motion since the last one that was."""
        s = self._settings
        if passed_ns >= 1e9 * (s.rest_period_s if settled else s.learn_period_s):
            return True
        limit = s.rest_motion if settled else s.learn_motion
        return self._points.displacement_px(before, now) >= limit * self._camera.width

    def fused(
        self, stamp_ns: int, features: BackboneFeatures, predicted: Matrix | None, alignment: Alignment
    ) -> Alignment:
        """Return an alignment that is too uncertain to be claimed, fused with the pose by this session's points alone.

        Where the map shows little of a view, or from afar, the last poses may be better known. The errors of both come
        from one map, so their covariances are intersected. If the two contradict each other, the covariance holds both.
        """
        T, covariance, limits = alignment.T_map_camera, alignment.covariance, (GOOD_M, math.radians(GOOD_DEG))
        if self._learned is None or not alignment.success or alignment.carried or T is None or covariance is None:
            return alignment
        passed_ns, certainty = stamp_ns - self._learned[0], probability_within(covariance, *limits)
        if not 0 < passed_ns <= self._longest_ns or certainty >= LEAST_CONFIDENCE:
            return alignment
        known = self._learned[1].covariance + self._drift(passed_ns)
        if probability_within(known, *limits) <= certainty:
            return alignment
        found = self._by_session(features, [T if predicted is None else predicted, T])
        if not found.success or found.T_map_camera is None or found.covariance is None:
            return alignment
        by_map, by_session = UncertainPose(T, covariance), UncertainPose(found.T_map_camera, found.covariance + known)
        both = by_map.intersected(by_session)
        if by_map.chi2(by_session) > CHI2_6_999:
            apart = [pose_tangent_error(both.T_map_camera, p.T_map_camera) for p in (by_map, by_session)]
            both = replace(both, covariance=both.covariance + sum(np.outer(a, a) for a in apart))
        return replace(alignment, T_map_camera=both.T_map_camera, covariance=both.covariance)

    def _drift(self, passed_ns: int) -> Matrix:
        """Return the covariance (6, 6) by which a pose that is carried on gets worse in a time."""
        s = self._settings
        return np.diag(np.repeat([s.drift_m_s, math.radians(s.drift_deg_s)], 3) * (1e-9 * passed_ns)) ** 2

    def _widened(self, alignment: Alignment, stamp_ns: int) -> Alignment:
        """Return an alignment with what is not known of its points: the errors of the poses that they come from."""
        if alignment.covariance is None or self._confirmed is None:
            return alignment
        confirmed_ns, covariance = self._confirmed
        return replace(alignment, covariance=alignment.covariance + covariance + self._drift(stamp_ns - confirmed_ns))
