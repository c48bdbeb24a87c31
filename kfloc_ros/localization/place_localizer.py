# SPDX-License-Identifier: Apache-2.0
"""The pipeline in a place of several submaps: each frame goes through the stages of the submap the camera is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.fusion import NO_PRIOR
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.localizer import Localizer, Pipeline
from kfloc_ros.localization.place_guide import GuideSettings, PlaceGuide
from kfloc_ros.localization.place_search import PlaceSearchSettings
from kfloc_ros.localization.stages import CoarseResult, Observation, check_frame, observe, timed
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix, PoseEstimate


class PlaceCoarseStage:
    """Finds the submap where there is none, and the coarse pose in it."""

    def __init__(self, guide: PlaceGuide) -> None:
        self._guide = guide

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have."""
        return self._guide.place.camera

    @property
    def note(self) -> str:
        """What of the configuration could not be had in the present submap, in a sentence; empty if all could."""
        return "" if self._guide.active is None else self._guide.active.coarse.note

    def observe(self, frame: Frame) -> Observation:
        """Run the backbone; once a frame, whatever it is compared with.

        Raises:
            FrameError: the image does not have the size of the place's camera.
        """
        return observe(frame, self.camera, self._guide.backbone)

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """The coarse pose in the submap that the camera is in; failed, with the reason, if that is not known.

        Raises:
            FrameError: the image does not have the size of the place's camera.
            MapError: a submap cannot be loaded.
        """
        observation = observation or self.observe(frame)
        spent: dict[str, float] = {}
        before = self._guide.active
        with timed(spent, "relocalize"):
            reason = self._guide.begin(frame.stamp_ns, observation.features)
        active = self._guide.active
        if active is None or active is not before:
            observation.timings_ms.update(spent)
        if active is not None:
            return active.coarse.process(frame, observation)
        return CoarseResult(
            frame.stamp_ns,
            CoarsePose(False, reason, None, None, 0, 0.0),
            FilterReport("the camera is in no submap", 0.0, NO_PRIOR, 0.0),
            observation.timings_ms,
            observation.features,
        )

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose."""
        if self._guide.active is not None:
            self._guide.active.coarse.pass_by(stamp_ns, observation)

    def learn(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Take the refined pose of one of the last frames into account; it must be beyond doubt."""
        if self._guide.active is not None:
            self._guide.active.coarse.learn(stamp_ns, T_map_camera)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames, and which submap it was."""
        del reason
        self._guide.forget()


class PlaceRefineStage:
    """Refines the coarse pose in the submap that the camera is in, and lets a neighbour take over."""

    def __init__(self, guide: PlaceGuide) -> None:
        self._guide = guide

    @property
    def references(self) -> ReferenceViews:
        """Of the present submap, or, where there is none, of the whole place from afar."""
        active = self._guide.active
        return self._guide.place.references if active is None else active.refine.references

    def suggest(self, starts: Sequence[Matrix]) -> None:
        """Have the next frame try poses ``T_place_camera``, such as a user's guess; any thread.

        A pose that the image fits is taken, also where other submaps look the same.
        """
        self._guide.suggest(starts)

    def track(self, frame: Frame, observation: Observation) -> PoseEstimate | None:
        """Align from the predicted pose alone, while a track holds; None if the frame needs a coarse pose."""
        active = self._guide.active
        predicted = self._guide.predict(frame.stamp_ns)
        if active is None or predicted is None or self._guide.has_suggestions:
            return None
        estimate = active.refine.track(frame, observation)
        if estimate is None:
            return None
        return self._guide.follow(frame.stamp_ns, observation.features, estimate, predicted)

    def process(self, frame: Frame, coarse: CoarseResult) -> PoseEstimate:
        """Refine a coarse pose; says in ``state`` and ``reason`` what the result is worth.

        Raises:
            FrameError: the image does not have the size of the place's camera.
        """
        check_frame(frame, self._guide.place.camera)
        active = self._guide.active
        predicted = self._guide.predict(frame.stamp_ns)
        if active is not None:
            return self._guide.follow(frame.stamp_ns, coarse.features, active.refine.process(frame, coarse), predicted)
        estimate = judge(
            frame.stamp_ns,
            coarse.pose,
            coarse.filter,
            None,
            had_pose=self._guide.had_pose,
            settings=JudgementSettings(),
        )
        timings = {**coarse.timings_ms, "total": sum(coarse.timings_ms.values())}
        return replace(estimate, timings_ms=timings)

    def reset(self, reason: str) -> None:
        """Forget the motion, and which submap it was in."""
        del reason
        self._guide.forget()


class PlaceLocalizer(Pipeline):
    """Both stages for a place; poses are in its frame.

    Args:
        place: where the camera is.
        config: options; the defaults are meant to be right.
        search: how a submap is found.
        settings: when another one takes over.
    """

    coarse: PlaceCoarseStage
    refine: PlaceRefineStage

    def __init__(
        self,
        place: Place,
        config: LocalizerConfig | None = None,
        search: PlaceSearchSettings | None = None,
        settings: GuideSettings | None = None,
    ) -> None:
        self.guide = PlaceGuide(place, config or LocalizerConfig(), search, settings)
        self.coarse, self.refine = PlaceCoarseStage(self.guide), PlaceRefineStage(self.guide)

    @property
    def submap(self) -> str:
        """Name of the submap that the camera is in, or nothing."""
        active = self.guide.active
        return "" if active is None else self.guide.place.submaps[active.number].name


def localizer_for(known: SceneMap | Place, config: LocalizerConfig | None = None) -> Localizer | PlaceLocalizer:
    """What localizes in a map or in a place of several."""
    return PlaceLocalizer(known, config) if isinstance(known, Place) else Localizer(known, config)
