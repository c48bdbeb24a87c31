# SPDX-License-Identifier: Apache-2.0
"""Localizer of a place of several submaps: chooses the submap that the camera is in and calls its localizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.fusion import NO_PRIOR
from kfloc_ros.localization.coarse import extract_features
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.localizer import Localizer, noise
from kfloc_ros.localization.place_guide import GuideSettings, PlaceGuide
from kfloc_ros.localization.place_search import PlaceSearchSettings
from kfloc_ros.localization.results import Ahead, CoarseResult, Localization, StageTimes
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix


class PlaceLocalizer:
    """Localizer of a camera in a place; poses are in the place's frame.

    Args:
        place: the place of the camera.
        config: options; None: the defaults.
        search: settings of the search for a submap.
        settings: conditions for changing the submap.
    """

    def __init__(
        self,
        place: Place,
        config: LocalizerConfig | None = None,
        search: PlaceSearchSettings | None = None,
        settings: GuideSettings | None = None,
    ) -> None:
        self.guide = PlaceGuide(place, config or LocalizerConfig(), search, settings)

    @property
    def camera(self) -> Camera:
        """Pinhole camera that every frame must have."""
        return self.guide.place.camera

    @property
    def references(self) -> ReferenceViews:
        """Reference views of the present submap; without one, a coarse set of the whole place."""
        active = self.guide.active
        return self.guide.place.references if active is None else active.localizer.references

    @property
    def runtime_note(self) -> str:
        """Run-time of the backbone with the reason for it; empty on a GPU."""
        return self.guide.backbone.runtime_note

    @property
    def camera_note(self) -> str:
        """Sentence on a camera that does not fit the images of the present submap; empty if it fits."""
        return "" if self.guide.active is None else self.guide.active.localizer.camera_note

    @property
    def submap(self) -> str:
        """Name of the submap that the camera is in, or an empty string."""
        active = self.guide.active
        return "" if active is None else self.guide.place.submaps[active.number].name

    @property
    def on_cpu(self) -> bool:
        """True if the networks run on the processor."""
        return self.guide.backbone.device.type == "cpu"

    def prepare(self, frame: Frame) -> Ahead:
        """Compute the features of a later frame for :meth:`process`, in another thread, while this one is processed.

        Its scene coordinates depend on the submap, which is not known yet.

        Raises:
            FrameError: the image does not have the size of the place's camera.
        """
        times = StageTimes()
        return Ahead(times, extract_features(frame, self.camera, self.guide.backbone, times))

    def process(
        self,
        frame: Frame,
        hints: Sequence[Matrix] = (),
        *,
        predicted: Matrix | None = None,
        ahead: Ahead | None = None,
        correct: bool = True,
    ) -> Localization:
        """Localize one frame in the submap that the camera is in.

        Args:
            frame: image of the place's camera.
            hints: likely poses ``T_place_camera`` (4, 4), such as an operator's guess.
            predicted: pose (4, 4) predicted by odometry; None: constant velocity predicts it.
            ahead: what :meth:`prepare` returned for the frame; the result is the same without.
            correct: correct the belief by an accepted pose at once; see :meth:`Localizer.process`.

        Returns:
            The localization; without a pose, with the reason, if the submap is not known.

        Raises:
            FrameError: the image does not have the size of the place's camera.
            MapError: a submap cannot be loaded.
        """
        guide, ahead = self.guide, self.prepare(frame) if ahead is None else ahead
        times, features = ahead.times, ahead.features
        choice = guide.choose(frame.stamp_ns, features, hints, times)
        if choice.submap is None:
            return self._nowhere(
                frame,
                CoarseResult(
                    frame.stamp_ns,
                    CoarsePose(False, choice.reason, None, None, 0, 0.0),
                    FilterReport("the camera is in no submap", 0.0, NO_PRIOR, 0.0),
                    times.with_total(),
                    features,
                ),
            )
        # Between submaps, constant velocity tells jumps; within one, odometry is the better start.
        expected = guide.predict(frame.stamp_ns)
        localization = choice.submap.localizer.process(
            frame, choice.hints, predicted=predicted, ahead=ahead, correct=False
        )
        estimate = guide.update(frame.stamp_ns, features, localization.estimate, expected)
        if correct:
            self.correct_belief(frame.stamp_ns, estimate.refined_pose)
        return replace(localization, estimate=estimate)

    def correct_belief(self, stamp_ns: int, T_place_camera: Matrix | None) -> None:
        """Correct the present submap's belief by the refined pose of one of the last frames; None changes nothing."""
        if self.guide.active is not None:
            self.guide.active.localizer.correct_belief(stamp_ns, T_place_camera)

    def warm_up(self) -> None:
        """Run everything once, on noise, and reset, so that no image waits for it."""
        self.process(noise(self.camera), list(self.references.T_map_camera[:1]))
        if self.guide.active is not None:
            self.guide.active.localizer.warm_up()
        self.reset("warm-up")

    def reset(self, reason: str) -> None:
        """Reset all that was carried over from earlier frames, and the choice of the submap."""
        del reason
        self.guide.reset()

    def _nowhere(self, frame: Frame, coarse: CoarseResult) -> Localization:
        """Return the result for a frame whose submap is not known."""
        estimate = judge(
            frame.stamp_ns,
            coarse.pose,
            coarse.filter,
            None,
            had_pose=self.guide.had_pose,
            settings=JudgementSettings(),
        )
        return Localization(frame, coarse.features, replace(estimate, timings_ms=coarse.timings_ms), coarse)


AnyLocalizer = Localizer | PlaceLocalizer


def localizer_for(known: SceneMap | Place, config: LocalizerConfig | None = None) -> AnyLocalizer:
    """Return the localizer of a map or of a place."""
    return PlaceLocalizer(known, config) if isinstance(known, Place) else Localizer(known, config)


Prepare = Callable[[Frame], Ahead | None]
"""See :meth:`Localizer.prepare`."""


def preparer(localizer: AnyLocalizer, ahead: bool | None = None) -> Prepare | None:
    """Return what prepares the next frame while one is processed; None where that does not pay.

    Args:
        localizer: localizer of a map or of a place.
        ahead: prepare frames; None: on a processor with a second core.
    """
    if ahead is None:
        ahead = len(os.sched_getaffinity(0)) > 1
    return localizer.prepare if ahead and localizer.on_cpu else None
