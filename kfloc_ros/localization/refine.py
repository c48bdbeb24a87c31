# SPDX-License-Identifier: Apache-2.0
"""The second stage, coarse pose to pose: what PixLoc does, and what the result is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.kfnet.pnp import agreeing_share
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.stages import CoarseResult, Observation, check_frame, pnp_settings, timed
from kfloc_ros.localization.tracking import ConstantVelocity, Track, TrackSettings, agrees
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.heads import choose_heads
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings
from kfloc_ros.relocalization.decision import UNRELATED_COST, settled
from kfloc_ros.relocalization.search import Relocalizer
from kfloc_ros.types import Alignment, CoarsePose, Frame, Matrix, PoseEstimate, TrackingState


class RefineStage:
    """Reference selection, feature-metric alignment, motion model, state and covariance."""

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig) -> None:
        calibration = scene_map.calibration
        self._device = choose_device(config.device)
        references = scene_map.references.to(self._device)
        self._relocalizer = Relocalizer(references, scene_map.camera) if config.relocalize else None
        heads = choose_heads(config.alignment_heads)
        self._refiner = Refiner(
            references,
            scene_map.camera,
            RefinerSettings(
                num_references=config.num_references,
                max_cost=min(calibration.max_alignment_cost, UNRELATED_COST),
                covariance_scale=calibration.refined_covariance_scale,
            ),
            None if heads is None else heads.to(self._device),
        )
        self._config = config
        self._camera = scene_map.camera
        self._motion = ConstantVelocity(config.max_gap_s)
        self._track = Track(TrackSettings(check_period=config.tracking_check_period))
        self._tracks = config.tracking and config.refine
        self._had_pose = False
        self._follows_pose = False
        """Whether the frame before had a pose, so that this one is expected near the predicted one."""
        self._judgement = JudgementSettings(min_inlier_ratio=calibration.min_inlier_ratio)
        self._suggested: tuple[Matrix, ...] = ()

    @property
    def references(self) -> ReferenceViews:
        """What poses are aligned with."""
        return self._refiner.references

    @property
    def refiner(self) -> Refiner:
        """What aligns poses; it keeps nothing from one call to the next."""
        return self._refiner

    def suggest(self, starts: Sequence[Matrix]) -> None:
        """Have the next frame try further poses ``T_map_camera`` to start from, such as a user's guess; any thread.

        A hint and no order: the start at which the image looks most like the map is the one that is refined.
        """
        self._suggested = tuple(starts)

    def track(self, frame: Frame, observation: Observation) -> PoseEstimate | None:
        """Align from the predicted pose alone, while a track holds; None if the frame needs a coarse pose."""
        predicted = self._motion.predict(frame.stamp_ns)
        if not self._tracks or predicted is None or self._suggested or not self._track.holds:
            return None
        with timed(observation.timings_ms, "refine"):
            alignment = self._refiner.align(observation.features, [predicted])
        if self._track.doubt(alignment, predicted):
            return None
        estimate = PoseEstimate(
            frame.stamp_ns,
            TrackingState.TRACKING,
            "",
            T_map_camera=alignment.T_map_camera,
            covariance=alignment.covariance,
            alignment=alignment,
            tracked=True,
        )
        return self._finish(estimate, observation.timings_ms)

    def process(self, frame: Frame, coarse: CoarseResult) -> PoseEstimate:
        """Refine a coarse pose; says in ``state`` and ``reason`` what the result is worth.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        check_frame(frame, self._camera)
        timings = dict(coarse.timings_ms)
        predicted = self._motion.predict(frame.stamp_ns)
        expected = predicted if self._follows_pose else None
        alignment: Alignment | None = None
        if self._config.refine:
            features = coarse.features.to(self._device)
            suggested, self._suggested = self._suggested, ()
            starts = [T for T in (coarse.pose.T_map_camera, predicted, *suggested) if T is not None]
            with timed(timings, "refine"):
                alignment = self._refiner.align(features, starts)
                if self._tracks:
                    alignment = self._checked(alignment, coarse.pose, features)
                if alignment.success and not self._is_spoken_for(alignment, coarse, features):
                    alignment = self._examined(alignment, features, expected)
            if not alignment.success and self._relocalizer is not None:
                with timed(timings, "relocalize"):
                    alignment = self._search(features, alignment, predicted)
        return self._finish(self._judge(coarse, alignment), timings)

    def _checked(self, alignment: Alignment, coarse: CoarsePose, features: BackboneFeatures) -> Alignment:
        """The alignment if it agrees with the coarse pose, else the better of it and one from the coarse pose."""
        if self._track.check(alignment, coarse) or coarse.T_map_camera is None:
            return alignment
        other = self._refiner.align(features, [coarse.T_map_camera])
        if not other.success or (alignment.success and alignment.final_cost <= other.final_cost):
            return alignment
        self._track.check(other, coarse)
        return other

    def _is_spoken_for(self, alignment: Alignment, coarse: CoarseResult, features: BackboneFeatures) -> bool:
        """Whether something that knows nothing of the poses before says that the camera is where an alignment ended.

        The coarse pose; but from a belief that those poses corrected, this frame's own measurement or its matches.
        """
        if not agrees(alignment, coarse.pose):
            return False
        if not coarse.filter.confirmed:
            return True
        pose, measurement = alignment.T_map_camera, coarse.measurement
        assert pose is not None
        if measurement is not None:
            share = agreeing_share(measurement, self._camera, pose, pnp_settings(self._config, measurement.stride))
            if share >= self._judgement.min_inlier_ratio:
                return True
        return self._relocalizer is not None and self._relocalizer.agrees(features, pose)

    def _examined(self, alignment: Alignment, features: BackboneFeatures, expected: Matrix | None) -> Alignment:
        """An alignment that no coarse pose speaks for, failed if the image's matches or the motion contradict it."""

        def align(starts: Sequence[Matrix]) -> Alignment:
            return self._refiner.align(features, starts)

        if len(alignment.reference_ids) > self._config.num_references:  # little in view: other views may see more
            alignment = settled(align, alignment)
        return (
            alignment if self._relocalizer is None else self._relocalizer.examine(features, align, alignment, expected)
        )

    def _finish(self, estimate: PoseEstimate, timings: dict[str, float]) -> PoseEstimate:
        timings["total"] = sum(timings.values())
        self._follows_pose = estimate.T_map_camera is not None
        if estimate.T_map_camera is not None:
            self._motion.observe(estimate.stamp_ns, estimate.T_map_camera)
            self._had_pose = True
        return replace(estimate, timings_ms=timings)

    def _search(self, features: BackboneFeatures, failed: Alignment, predicted: Matrix | None) -> Alignment:
        """The alignment found in the whole map, or the failed one with what the search says about it."""
        assert self._relocalizer is not None
        expected = predicted if self._follows_pose else None
        limit = self._relocalizer.settings.near_max_cost
        likely = [T for T in (failed.T_map_camera, predicted) if T is not None]
        found = self._relocalizer.find(
            features, lambda starts: self._refiner.align(features, starts, max_cost=limit), expected, likely
        )
        return found if found.success else replace(failed, reason=f"{failed.reason}; searched the map: {found.reason}")

    def _judge(self, coarse: CoarseResult, alignment: Alignment | None) -> PoseEstimate:
        stamp_ns, had_pose = coarse.stamp_ns, self._had_pose
        return judge(stamp_ns, coarse.pose, coarse.filter, alignment, had_pose=had_pose, settings=self._judgement)

    def reset(self, reason: str) -> None:
        """Forget the motion; the next frame stands on its coarse pose alone."""
        del reason
        self._motion.forget()
        self._follows_pose = False
        self._track.end()
