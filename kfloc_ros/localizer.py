# SPDX-License-Identifier: Apache-2.0
"""The pipeline, Frame -> PoseEstimate: measure, filter, refine; or, while a track holds, refine alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kfloc_ros.config import option
from kfloc_ros.device import choose_device
from kfloc_ros.errors import FrameError
from kfloc_ros.features.trunk import Trunk, TrunkFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.judgement import JudgementSettings, judge
from kfloc_ros.kfnet import kalman
from kfloc_ros.kfnet.filter import NO_PRIOR, Filtered, FilterSettings, NisMode, SceneCoordinateFilter
from kfloc_ros.kfnet.flow_choice import FlowKind, choose_flow
from kfloc_ros.mapping.first_fix import UNRELATED_COST, FirstFix
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.pixloc.heads import load_heads
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings
from kfloc_ros.solvers.pnp import PnpSettings, solve_pnp
from kfloc_ros.tracking import ConstantVelocity, Track, TrackSettings
from kfloc_ros.types import (
    Alignment,
    CoarsePose,
    FilterReport,
    Frame,
    PoseEstimate,
    SceneCoordinates,
    TrackingState,
)


@dataclass(frozen=True)
class LocalizerConfig:
    """Options of the whole pipeline."""

    device: str = option(
        "auto", "Where networks run: auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    filter: bool = option(True, "Carry the belief over scene coordinates from frame to frame.")
    refine: bool = option(True, "Align the coarse pose with the map's reference views.")
    tracking: bool = option(
        False, "While alignments from the predicted pose succeed, find a coarse pose only now and then, as a check."
    )
    tracking_check_period: int = option(
        10, "With tracking: every so many frames a coarse pose is found all the same.", low=2, high=1000
    )
    first_fix: bool = option(True, "Search the map's reference views when there is no pose to align from.")
    loaded_submaps: int = option(4, "Submaps of a place kept in memory (a place is several maps).", low=2, high=1000)
    num_references: int = option(3, "Reference views that a pose is aligned with.", low=1, high=20)
    alignment_heads: str = option(
        "", "File of alignment heads that `kfloc train heads` made; empty: features as the trunk makes them."
    )
    max_gap_s: float = option(
        0.5, "A longer gap between frames resets the filter and the motion model.", low=0.01, high=60.0
    )
    nis_mode: str = option(
        NisMode.SURER.value,
        "Where prior and measurement of a cell contradict each other: off fuses them all the same, output_only emits "
        "the measurement, state also goes on from it, surer keeps the one with the smaller variance.",
        choices=tuple(mode.value for mode in NisMode),
    )
    nis_threshold: float = option(
        kalman.NIS_THRESHOLD_95,
        "Cells whose normalised innovation squared exceeds this contradict their prior.",
        low=0.1,
        high=1000.0,
    )
    oflownet: str = option(
        FlowKind.LEARNED.value,
        "What reads the flow that carries the belief from the cost volume: learned is the network of this package, "
        "cost_volume a soft-argmax without training, which is what maps calibrated before there was a network take.",
        choices=tuple(kind.value for kind in FlowKind),
    )
    pnp_max_error_px: float = option(10.0, "Inlier threshold of the reprojection error in PnP.", low=0.5, high=100.0)
    pnp_min_inliers: int = option(40, "Fewer PnP inliers than this: no coarse pose.", low=6, high=100_000)


@dataclass(frozen=True, eq=False)
class Observation:
    """A frame after its one pass through the trunk: what all stages look at."""

    features: TrunkFeatures
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Spent on the frame so far, by stage."""


@dataclass(frozen=True, eq=False)
class CoarseResult:
    """What the measure and filter stages hand to the refiner."""

    stamp_ns: int
    pose: CoarsePose
    filter: FilterReport
    timings_ms: Mapping[str, float]
    features: TrunkFeatures
    scene_coordinates: SceneCoordinates | None = None
    measurement: SceneCoordinates | None = None
    """What this frame alone says, before the filter."""
    filtered: Filtered | None = None
    """What the filter did, cell by cell; ``scene_coordinates`` is its posterior."""


class CoarseStage:
    """Trunk, SCoordNet head, Kalman filter, RANSAC-PnP.

    Args:
        scene_map: of the place.
        config: options.
        trunk: to share with other stages; made here by default.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig, trunk: Trunk | None = None) -> None:
        device = choose_device(config.device)
        calibration = scene_map.calibration
        self._trunk = trunk or Trunk(device=device)
        self._head = scene_map.head.to(device)
        self._variance_scale = calibration.measurement_variance_scale
        self._camera = scene_map.camera
        self._use_filter = config.filter
        self._passed_by: tuple[int, TrunkFeatures] | None = None
        chosen = choose_flow(FlowKind(config.oflownet), calibration, device)
        self.note = chosen.note if config.filter else ""
        """What of the configuration could not be had, in a sentence; empty if all could."""
        self._filter = SceneCoordinateFilter(
            FilterSettings(
                flow_temperature=calibration.flow_temperature,
                process_scale=chosen.process_scale,
                process_floor_m2=chosen.process_floor_m2,
                nis_threshold=config.nis_threshold,
                nis_mode=NisMode(config.nis_mode),
                max_gap_s=config.max_gap_s,
            ),
            chosen.flow,
        )
        self._pnp = PnpSettings(
            max_error_px=config.pnp_max_error_px,
            min_inliers=config.pnp_min_inliers,
            covariance_scale=calibration.coarse_covariance_scale,
        )

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have (``ImageAdapter`` brings images to it)."""
        return self._camera

    def observe(self, frame: Frame) -> Observation:
        """Run the trunk.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        return observe(frame, self._camera, self._trunk)

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """Measure, filter, and solve for the coarse pose.

        A frame that was passed by just before is filtered first, so that the belief is one frame old and a bad picture,
        for which alone a track mostly ends, does not meet an older one or none.

        Args:
            frame: to localize.
            observation: of the frame, if the trunk has run.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        observation = observation or self.observe(frame)
        features, timings = observation.features, observation.timings_ms
        if self._passed_by is not None and self._use_filter:
            with timed(timings, "filter"), torch.inference_mode():
                stamp_ns, before = self._passed_by
                self._filtered(stamp_ns, before, self._head.measure(before, self._variance_scale))
        self._passed_by = None
        with timed(timings, "measure"):
            measurement = self._head.measure(features, self._variance_scale)
        with timed(timings, "filter"), torch.inference_mode():
            filtered = self._filtered(frame.stamp_ns, features, measurement)
        with timed(timings, "pnp"):
            pose = solve_pnp(filtered.posterior, self._camera, self._pnp)
        self._filter.judge(pose)
        return CoarseResult(
            frame.stamp_ns, pose, filtered.report, timings, features, filtered.posterior, measurement, filtered
        )

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose."""
        self._passed_by = (stamp_ns, observation.features)

    def _filtered(self, stamp_ns: int, features: TrunkFeatures, measurement: SceneCoordinates) -> Filtered:
        if not self._use_filter:
            return Filtered(measurement, FilterReport("the filter is off", 0.0, NO_PRIOR, 0.0))
        return self._filter.step(stamp_ns, features.coarse[0], measurement)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        self._filter.reset(reason)
        self._passed_by = None


class RefineStage:
    """Reference selection, feature-metric alignment, motion model, state and covariance."""

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig) -> None:
        calibration = scene_map.calibration
        self._device = choose_device(config.device)
        references = scene_map.references.to(self._device)
        self._first_fix = FirstFix(references, scene_map.camera) if config.first_fix else None
        self._refiner = Refiner(
            references,
            scene_map.camera,
            RefinerSettings(
                num_references=config.num_references,
                max_cost=min(calibration.max_alignment_cost, UNRELATED_COST),
                covariance_scale=calibration.refined_covariance_scale,
            ),
            load_heads(Path(config.alignment_heads)).to(self._device) if config.alignment_heads else None,
        )
        self._config = config
        self._camera = scene_map.camera
        self._motion = ConstantVelocity(config.max_gap_s)
        self._track = Track(TrackSettings(check_period=config.tracking_check_period))
        self._tracks = config.tracking and config.refine
        self._had_pose = False
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
        alignment: Alignment | None = None
        if self._config.refine:
            features = coarse.features.to(self._device)
            suggested, self._suggested = self._suggested, ()
            starts = [T for T in (coarse.pose.T_map_camera, predicted, *suggested) if T is not None]
            with timed(timings, "refine"):
                alignment = self._refiner.align(features, starts)
                if self._tracks:
                    alignment = self._checked(alignment, coarse.pose, features)
            if not alignment.success and self._first_fix is not None:
                with timed(timings, "first_fix"):
                    alignment = self._search(features, alignment)
        return self._finish(self._judge(coarse, alignment), timings)

    def _checked(self, alignment: Alignment, coarse: CoarsePose, features: TrunkFeatures) -> Alignment:
        """The alignment if it agrees with the coarse pose, else the better of it and one from the coarse pose."""
        if self._track.check(alignment, coarse) or coarse.T_map_camera is None:
            return alignment
        other = self._refiner.align(features, [coarse.T_map_camera])
        if not other.success or (alignment.success and alignment.final_cost <= other.final_cost):
            return alignment
        self._track.check(other, coarse)
        return other

    def _finish(self, estimate: PoseEstimate, timings: dict[str, float]) -> PoseEstimate:
        timings["total"] = sum(timings.values())
        if estimate.T_map_camera is not None:
            self._motion.observe(estimate.stamp_ns, estimate.T_map_camera)
            self._had_pose = True
        return replace(estimate, timings_ms=timings)

    def _search(self, features: TrunkFeatures, failed: Alignment) -> Alignment:
        """The alignment found without any prior, or the failed one with what the search says about it."""
        assert self._first_fix is not None
        found = self._first_fix.find(features, lambda starts: self._refiner.align(features, starts))
        return found if found.success else replace(failed, reason=f"{failed.reason}; searched the map: {found.reason}")

    def _judge(self, coarse: CoarseResult, alignment: Alignment | None) -> PoseEstimate:
        stamp_ns, had_pose = coarse.stamp_ns, self._had_pose
        return judge(stamp_ns, coarse.pose, coarse.filter, alignment, had_pose=had_pose, settings=self._judgement)

    def reset(self, reason: str) -> None:
        """Forget the motion; the next frame stands on its coarse pose alone."""
        del reason
        self._motion.forget()
        self._track.end()


class CoarseSteps(Protocol):
    """What finds coarse poses: :class:`CoarseStage`, or that of the submap a camera is in."""

    @property
    def note(self) -> str:
        """What of the configuration could not be had, in a sentence; empty if all could."""
        ...

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have."""
        ...

    def observe(self, frame: Frame) -> Observation:
        """Run the trunk. Raises FrameError."""
        ...

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """Find the coarse pose. Raises FrameError."""
        ...

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose."""
        ...

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        ...


class RefineSteps(Protocol):
    """What refines coarse poses: :class:`RefineStage`, or that of the submap a camera is in."""

    @property
    def references(self) -> ReferenceViews:
        """What poses are aligned with."""
        ...

    def suggest(self, starts: Sequence[Matrix]) -> None:
        """Have the next frame try further poses ``T_map_camera`` to start from; any thread."""
        ...

    def track(self, frame: Frame, observation: Observation) -> PoseEstimate | None:
        """Align from the predicted pose alone, while a track holds; None if the frame needs a coarse pose."""
        ...

    def process(self, frame: Frame, coarse: CoarseResult) -> PoseEstimate:
        """Refine a coarse pose. Raises FrameError."""
        ...

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        ...


class Pipeline:
    """Both stages, one after the other: frames to poses."""

    coarse: CoarseSteps
    refine: RefineSteps

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have."""
        return self.coarse.camera

    def process(self, frame: Frame) -> PoseEstimate:
        """Localize one frame.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        observation = self.coarse.observe(frame)
        tracked = self.refine.track(frame, observation)
        if tracked is not None:
            self.coarse.pass_by(frame.stamp_ns, observation)
            return tracked
        return self.refine.process(frame, self.coarse.process(frame, observation))

    def reset(self, reason: str) -> None:
        """Forget all earlier frames."""
        self.coarse.reset(reason)
        self.refine.reset(reason)


class Localizer(Pipeline):
    """Both stages for one map.

    Args:
        scene_map: of the place.
        config: options; the defaults are meant to be right.
    """

    coarse: CoarseStage
    refine: RefineStage

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig | None = None) -> None:
        config = config or LocalizerConfig()
        self.coarse = CoarseStage(scene_map, config)
        self.refine = RefineStage(scene_map, config)


def observe(frame: Frame, camera: Camera, trunk: Trunk) -> Observation:
    """Run the trunk on a frame.

    Raises:
        FrameError: the image does not have the size of the map's camera.
    """
    check_frame(frame, camera)
    timings: dict[str, float] = {}
    with timed(timings, "trunk"):
        features = trunk.extract(frame.image)
    return Observation(features, timings)


def check_frame(frame: Frame, camera: Camera) -> None:
    """Refuse an image that does not belong to the map's camera.

    Raises:
        FrameError: wrong size, type or channels.
    """
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise FrameError(f"A frame's image must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}.")
    if image.shape[:2] != (camera.height, camera.width):
        raise FrameError(
            f"The image is {image.shape[1]}x{image.shape[0]}, but the map's camera is {camera.width}x{camera.height}; "
            "bring it there with an ImageAdapter."
        )


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
