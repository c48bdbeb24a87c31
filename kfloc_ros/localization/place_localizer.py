# SPDX-License-Identifier: Apache-2.0
"""Localizer of a place of several submaps: chooses the submap that the camera is in, and calls its localizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.fusion import NO_PRIOR
from kfloc_ros.localization.coarse import extract_features
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import JudgementSettings, judge
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.place_guide import GuideSettings, PlaceGuide
from kfloc_ros.localization.place_search import PlaceSearchSettings
from kfloc_ros.localization.results import CoarseResult, Localization, StageTimes
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix


class PlaceLocalizer:
    """Poses of a camera in a place; they are in its frame.

    Args:
        place: where the camera is.
        config: options; the defaults are meant to be right.
        search: how a submap is found.
        settings: when another one takes over.
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
        """The pinhole camera that every frame must have."""
        return self.guide.place.camera

    @property
    def references(self) -> ReferenceViews:
        """The reference views of the present submap or, without one, those of the whole place, from afar."""
        active = self.guide.active
        return self.guide.place.references if active is None else active.localizer.references

    @property
    def note(self) -> str:
        """Sentence on what of the configuration the present submap cannot give; empty if nothing."""
        return "" if self.guide.active is None else self.guide.active.localizer.note

    @property
    def submap(self) -> str:
        """Name of the submap that the camera is in, or nothing."""
        active = self.guide.active
        return "" if active is None else self.guide.place.submaps[active.number].name

    def process(self, frame: Frame, hints: Sequence[Matrix] = (), *, correct: bool = True) -> Localization:
        """Localize one frame in the submap that the camera is in; without a pose, with the reason, if that is unknown.

        Args:
            frame: of the place's camera.
            hints: poses ``T_place_camera`` (4, 4) at which the camera may be, such as an operator's guess.
            correct: whether a pose that stands corrects the belief now; see :meth:`Localizer.process`.

        Raises:
            FrameError: the image does not have the size of the place's camera.
            MapError: a submap cannot be loaded.
        """
        guide, times = self.guide, StageTimes()
        features = extract_features(frame, self.camera, guide.backbone, times)
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
        predicted = guide.predict(frame.stamp_ns)
        localization = choice.submap.localizer.process(
            frame, choice.hints, features=features, times=times, correct=False
        )
        estimate = guide.follow(frame.stamp_ns, features, localization.estimate, predicted)
        if correct:
            self.correct_belief(frame.stamp_ns, estimate.refined_pose)
        return replace(localization, estimate=estimate)

    def correct_belief(self, stamp_ns: int, T_place_camera: Matrix | None) -> None:
        """Correct the present submap's belief by the refined pose of one of the last frames; None changes nothing."""
        if self.guide.active is not None:
            self.guide.active.localizer.correct_belief(stamp_ns, T_place_camera)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames, and which submap it was."""
        del reason
        self.guide.forget()

    def _nowhere(self, frame: Frame, coarse: CoarseResult) -> Localization:
        """Result for a frame whose submap is not known."""
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
    """Return what localizes in a map or in a place of several."""
    return PlaceLocalizer(known, config) if isinstance(known, Place) else Localizer(known, config)
