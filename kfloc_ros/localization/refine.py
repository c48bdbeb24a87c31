# SPDX-License-Identifier: Apache-2.0
"""Refine half of the localizer, from a coarse pose to a judged pose: PixLoc's steps, one method each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from kfloc_ros.device import choose_device, has_numba
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.localization.carrying import Carrier, FrameEvidence
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.depth import DepthCheck
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.pose_check import PoseCheck
from kfloc_ros.localization.results import CoarseResult, StageTimes
from kfloc_ros.localization.tracking import ConstantVelocity, RepeatGuard, Track, TrackSettings
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.patches import PatchAligner
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.relocalization.decision import UNRELATED_COST, SearchPlan, SearchSettings, realigned
from kfloc_ros.relocalization.search import Relocalizer
from kfloc_ros.types import Alignment, CoarsePose, Frame, Matrix, PoseEstimate, TrackingState, check_frame


class RefineStage:
    """Motion model, feature-metric alignment, relocalization, judgement.

    :class:`~kfloc_ros.localization.localizer.Localizer` calls the steps in order.

    Args:
        scene_map: map of the scene.
        config: options of the localizer.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig) -> None:
        calibration = scene_map.calibration
        self._device = choose_device(config.device)
        references = scene_map.references.to(self._device)
        self._relocalizer = Relocalizer(references, scene_map.camera) if config.relocalize else None
        self.refiner = Refiner(
            references,
            scene_map.camera,
            RefinerSettings(
                num_references=config.num_references,
                max_cost=min(calibration.max_alignment_cost, UNRELATED_COST),
                covariance_scale=calibration.refined_covariance_scale,
                covariance_doubling_m=calibration.covariance_doubling_m,
                own_error_m=calibration.own_error_m,
                own_error_rad=calibration.own_error_rad,
                own_error_growth=calibration.own_error_growth,
                sideways=calibration.sideways,
            ),
        )
        """Aligner of poses; it has no state."""
        self._patches = PatchAligner(references, scene_map.camera, calibration.patch_covariance_scale)
        self._depth = DepthCheck(self.refiner, scene_map.camera)
        self._config = config
        self._camera = scene_map.camera
        self._motion = ConstantVelocity(config.max_gap_s)
        self._track = Track(TrackSettings(check_period=config.tracking_check_period))
        self.tracks = config.tracking and config.refine
        """True if frames may be aligned from the predicted pose alone."""
        self._had_pose = False
        self._search = SearchPlan(SearchSettings(config.max_speed_m_s, config.max_turn_deg_s))
        self._judgement = JudgementSettings(min_inlier_ratio=calibration.min_inlier_ratio)
        self._evidence = FrameEvidence(
            self.refiner, self._relocalizer, scene_map.camera, config, calibration.min_inlier_ratio
        )
        self._carrier = Carrier(self._evidence)
        self._follows_pose = False
        """True if the previous frame had a pose, so that this one is expected near the predicted pose."""
        self._repeats = RepeatGuard(config.max_repeat_s)
        self.corrects_camera = config.camera_check == "correct"
        """True if images may be converted to a fitted camera."""
        self._check = PoseCheck(self.refiner, scene_map.camera, config, calibration)

    @property
    def camera_note(self) -> str:
        """Sentence on a camera that does not fit the images; empty if it fits."""
        return self._check.camera_note

    @property
    def references(self) -> ReferenceViews:
        """Reference views that poses are aligned with."""
        return self.refiner.references

    def track(
        self, frame: Frame, features: BackboneFeatures, times: StageTimes, predicted: Matrix | None = None
    ) -> PoseEstimate | None:
        """Align from the predicted pose alone, while a track lasts.

        Args:
            frame: image of the map's camera.
            features: backbone features of the frame.
            times: time spent on the frame so far.
            predicted: pose (4, 4) predicted by odometry; None: constant velocity predicts it.

        Returns:
            The estimate; None if the frame needs a coarse pose.
        """
        stamp_ns = frame.stamp_ns
        predicted = self._predicted(stamp_ns, predicted)
        if not self.tracks or predicted is None or not self._track.holds:
            return None
        if self._repeats.fault(frame.image, stamp_ns):
            return None
        with times.stage("refine"):
            alignment = self._completed(frame, features, self.refiner.align(features, [predicted]))
        if self._track.contradiction(alignment, predicted):
            return None
        estimate = PoseEstimate(
            stamp_ns,
            TrackingState.TRACKING,
            "",
            T_map_camera=alignment.T_map_camera,
            covariance=alignment.covariance,
            alignment=alignment,
            tracked=True,
        )
        return self._remember(estimate, times)

    def align(
        self,
        frame: Frame,
        coarse: CoarseResult,
        hints: Sequence[Matrix],
        times: StageTimes,
        predicted: Matrix | None = None,
    ) -> Alignment | None:
        """Align from the coarse pose, the predicted pose or a hint, whichever fits the image best.

        If the map's points do not settle the pose, points of this session's images are aligned, too. An alignment
        without support that is independent of earlier poses is checked by the image's matches. An image that shows too
        little to be found, and whose pose is carried on, has another only where its points make that certain at once.

        Returns:
            The alignment; None if refinement is off.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        check_frame(frame, self._camera)
        if not self._config.refine:
            return None
        features = coarse.features.to(self._device)
        with times.stage("refine"):
            if predicted is None and not (self._follows_pose and self._carrier.shows_enough(features)):
                self._carrier.bridge(frame, features)
            if hints:  # the pose so far may be wrong
                self._carrier.jumps.forget()
            first = self._predicted(coarse.stamp_ns, predicted)
            starts = [T for T in (coarse.pose.T_map_camera, first, *hints) if T is not None]
            alignment = self._align_from(starts, coarse, features, first)
            may_bridge = self._follows_pose and predicted is None and not self._carrier.is_blind(coarse.stamp_ns)
            if may_bridge and not self.refiner.is_certain(alignment):
                bridged = self._carrier.bridge(frame, features)
                if bridged is not None and bridged.by_flow:  # the motion has changed, or the pose is in another minimum
                    again = self._align_from([bridged.T_map_camera], coarse, features, bridged.T_map_camera)
                    if again.success and not (alignment.success and alignment.support >= again.support):
                        alignment = again
            completed = self._completed(frame, features, alignment)
            if alignment.success and not completed.success:  # the depth excludes it: nothing may be carried on
                self._carrier.end_bridge()
            return self._carrier.fused(coarse.stamp_ns, features, first, completed)

    def relocalize(
        self,
        frame: Frame,
        coarse: CoarseResult,
        alignment: Alignment | None,
        times: StageTimes,
        predicted: Matrix | None = None,
    ) -> Alignment | None:
        """Search the map if the alignment failed: what is within reach of the last pose, or the whole of it.

        Images wait after a search in vain; see :class:`SearchPlan`. An image that shows too little to be found is not
        searched while its pose is carried on. Stage ``relocalize`` is that of the whole map.

        Returns:
            The accepted alignment, or the failed one with the search's reason added.
        """
        if alignment is None or alignment.success or self._relocalizer is None:
            return alignment
        if predicted is None and self._carrier.is_blind(coarse.stamp_ns):
            return alignment
        features = coarse.features.to(self._device)
        predicted = self._predicted(coarse.stamp_ns, predicted)
        likely = [T for T in (alignment.T_map_camera, predicted) if T is not None]
        with times.stage("search_near"):
            likeness, best = self._relocalizer.likeness(features)
            if not self._search.is_due(coarse.stamp_ns, likeness, best):
                return alignment
            among = self._search.in_reach(coarse.stamp_ns, self.references.T_map_camera, best)
        with times.stage("relocalize" if among is None else "search_near"):
            align = partial(self._align_costly, features)
            found = self._relocalizer.find(features, align, self._expected(predicted), likely, among)
            found = self._completed(frame, features, found)
        if found.success:
            return found
        self._search.failed(coarse.stamp_ns, likeness, best)
        searched = "the map" if among is None else "near the last pose"
        return replace(alignment, reason=f"{alignment.reason}; searched {searched}: {found.reason}")

    def judge(
        self,
        frame: Frame,
        coarse: CoarseResult,
        alignment: Alignment | None,
        times: StageTimes,
        predicted: Matrix | None = None,
    ) -> PoseEstimate:
        """Return state, reason, pose and covariance of the frame; the pose updates the motion model.

        Without odometry, an image that has no pose may have the one before carried on.
        """
        evidence = coarse.stamp_ns, coarse.pose, coarse.filter, alignment
        estimate = judge(*evidence, had_pose=self._had_pose, settings=self._judgement)
        if self._config.use_depth:
            estimate = self._depth.of_estimate(frame.depth_m, coarse.features.to(self._device), estimate)
        repeated = self._repeats.fault(frame.image, frame.stamp_ns)
        if repeated:
            state = TrackingState.LOST if self._had_pose else TrackingState.INITIALIZING
            estimate = replace(estimate, state=state, reason=repeated, T_map_camera=None, covariance=None)
        elif predicted is None:
            estimate = self._carrier.bridged(estimate)
        return self._remember(estimate, times)

    def keep_session_view(self, frame: Frame, features: BackboneFeatures, estimate: PoseEstimate) -> PoseEstimate:
        """Keep an image with an accepted pose as a view of this session, for later images to be aligned with."""
        if not self._config.refine:
            return estimate
        times = StageTimes(estimate.timings_ms)
        with times.stage("session"):
            self._carrier.keep_session_view(frame, features.to(self._device), estimate)
        return replace(estimate, timings_ms=times.with_total())

    def corrected(self, frame: Frame) -> Frame:
        """Return a frame with its image converted to the map's camera, if a fitted camera replaces the given one."""
        return self._check.corrected(frame)

    def check(self, frame: Frame, features: BackboneFeatures, estimate: PoseEstimate) -> PoseEstimate:
        """Check a pose by the whole image: the camera, moved parts, and what is missing.

        Returns:
            The estimate with its confidence; DEGRADED with a larger covariance if the image contradicts it.
        """
        if not self._config.refine or estimate.bridged:
            return estimate
        features = features.to(self._device)
        checked = self._check.check(frame, features, self._carrier.jumps.judged(features, estimate))
        if checked.state is not estimate.state:
            self._track.end()
        return checked

    def warm_up(self) -> None:
        """Run the compiled loops that a frame of noise does not reach."""
        if has_numba():
            from kfloc_ros.pixloc import check_kernels, patch_kernels, point_kernels

            for loops in (point_kernels, patch_kernels, check_kernels):
                loops.run_once()
            self.refiner.warm_up()

    def reset(self) -> None:
        """Reset the motion model and the track; the next frame starts from its coarse pose alone."""
        self._motion.reset()
        self._search.reset()
        self._follows_pose = False
        self._track.end()
        self._check.reset()
        self._carrier.reset()

    def _align_costly(
        self, features: BackboneFeatures, starts: Sequence[Matrix], *, only_certain: bool = False
    ) -> Alignment:
        """Align, also at a cost above the map's limit; the caller asks for other evidence, if the search can give it.

        The map's limit is calibrated on its own recording, and right poses of another visit cost more.
        """
        limit = None if self._relocalizer is None else self._relocalizer.settings.near_max_cost
        return self.refiner.align(features, starts, max_cost=limit, only_certain=only_certain, wide=not only_certain)

    def _completed(self, frame: Frame, features: BackboneFeatures, alignment: Alignment) -> Alignment:
        """Return the alignment, improved by the map's patches, and corrected or refused by depth if that is used."""
        alignment = self._patches.improved(frame.image, alignment)
        return self._depth.of_alignment(frame.depth_m, features, alignment) if self._config.use_depth else alignment

    def _predicted(self, stamp_ns: int, by_odometry: Matrix | None) -> Matrix | None:
        """Return the pose predicted by odometry, else carried on, else by constant velocity; None without any."""
        if by_odometry is not None:
            return by_odometry
        bridged = self._carrier.bridged_pose(stamp_ns)
        return self._motion.predict(stamp_ns) if bridged is None else bridged

    def _expected(self, predicted: Matrix | None) -> Matrix | None:
        """Return the pose at which the camera is expected, if the previous frame had a pose."""
        return predicted if self._follows_pose else None

    def _compare(self, alignment: Alignment, coarse: CoarsePose, features: BackboneFeatures) -> Alignment:
        """Return the alignment if it agrees with the coarse pose, else the better of it and the coarse pose's."""
        if self._track.check(alignment, coarse) or coarse.T_map_camera is None:
            return alignment
        other = self.refiner.align(features, [coarse.T_map_camera])
        if not other.success or (alignment.success and alignment.final_cost <= other.final_cost):
            return alignment
        self._track.check(other, coarse)
        return other

    def _align_from(
        self, starts: Sequence[Matrix], coarse: CoarseResult, features: BackboneFeatures, predicted: Matrix | None
    ) -> Alignment:
        """Align with the map, with this session's points if that does not settle the pose, and check the result."""
        is_blind = self._carrier.is_blind(coarse.stamp_ns)
        alignment = self._align_costly(features, starts, only_certain=is_blind)
        if self.tracks:
            alignment = self._compare(alignment, coarse.pose, features)
        if self._carrier.is_settled(alignment):
            return alignment
        by_session = self._carrier.align(coarse, features, predicted, alignment)
        if by_session is not None:
            return by_session
        if alignment.success and not self._evidence.supports(alignment, coarse, features):
            return self._examine(alignment, features, self._expected(predicted))
        return alignment

    def _examine(self, alignment: Alignment, features: BackboneFeatures, expected: Matrix | None) -> Alignment:
        """Check an alignment that the coarse pose does not support, by the image's matches and the motion."""

        align = partial(self._align_costly, features)
        if len(alignment.reference_ids) > self._config.num_references:  # few points in view; other views may show more
            alignment = realigned(align, alignment)
        if self._relocalizer is None:
            return alignment
        return self._relocalizer.examine(features, align, alignment, expected)

    def _remember(self, estimate: PoseEstimate, times: StageTimes) -> PoseEstimate:
        self._follows_pose = estimate.T_map_camera is not None and not estimate.bridged
        if estimate.T_map_camera is not None and self._follows_pose:
            self._motion.observe(estimate.stamp_ns, estimate.T_map_camera)
            self._search.observe(estimate.stamp_ns, estimate.T_map_camera, estimate.covariance)
            self._had_pose = True
        return replace(estimate, timings_ms=times.with_total())
