# SPDX-License-Identifier: Apache-2.0
"""Which submap of a place the camera is in: found from an image, kept while it holds, left where another is nearer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_memory import PlaceMemory
from kfloc_ros.localization.place_search import LoadedSubmap, PlaceSearch, PlaceSearchSettings
from kfloc_ros.localization.results import StageTimes
from kfloc_ros.localization.submap_cache import SubmapCache
from kfloc_ros.localization.tracking import ConstantVelocity
from kfloc_ros.maps.place import Place
from kfloc_ros.types import Alignment, PoseEstimate, TrackingState


@dataclass(frozen=True)
class GuideSettings:
    """When another submap takes over."""

    max_jump_m: float = 0.5
    max_jump_deg: float = 25.0
    """A pose further from the predicted one than either is a new fix, and needs a search of the whole place."""
    reach_m: float = 1.5
    """Submaps with a view within this of a pose (a degree counts as 2 cm) are its neighbours."""
    nearer_ratio: float = 0.6
    own_reach_m: float = 0.3
    """A neighbour takes over where its nearest view is nearer by this factor and the own submap's is this far."""
    pause_frames: int = 8
    """Between two looks at a neighbour, each of which costs an alignment."""
    hinted_submaps: int = 2
    """Submaps in which somebody's guess of a pose is tried."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Submap chosen for a frame."""

    submap: LoadedSubmap | None
    """None if it is not known which."""
    hints: tuple[Matrix, ...] = ()
    """Poses that the frame may start from besides, in the place's frame."""
    reason: str = ""
    """Why there is none."""


class PlaceGuide:
    """Chooses a submap for every frame, and follows the poses from one submap to the next.

    All poses are in the place's frame, so that the motion goes on from one submap into another.

    Args:
        place: where the camera is.
        config: options of the localizer.
        search: how a submap is found.
        settings: when another one takes over.
    """

    def __init__(
        self,
        place: Place,
        config: LocalizerConfig,
        search: PlaceSearchSettings | None = None,
        settings: GuideSettings | None = None,
    ) -> None:
        self.place, self.backbone = place, Backbone(device=choose_device(config.device))
        self.active: LoadedSubmap | None = None
        """The submap that the camera is in."""
        self.cache = SubmapCache(
            lambda number: LoadedSubmap.of(number, place.load_submap(number), config, self.backbone),
            config.loaded_submaps,
        )
        self._search = PlaceSearch(place, self.cache, search) if config.relocalize else None
        self._settings = settings or GuideSettings()
        self._motion = ConstantVelocity(config.max_gap_s)
        self._start_from_motion = False
        self._pause = 0
        self.had_pose = False
        """Whether some frame before had a pose."""
        self._memory = PlaceMemory()

    def predict(self, stamp_ns: int) -> Matrix | None:
        """Return the pose at a time as the motion goes on, or None without a recent one."""
        return self._motion.predict(stamp_ns)

    def choose(self, stamp_ns: int, features: BackboneFeatures, hints: Sequence[Matrix], times: StageTimes) -> Choice:
        """Choose a submap for a frame.

        Args:
            stamp_ns: of the frame.
            features: of the frame.
            hints: poses at which the camera may be. A hint that the image fits is taken, also where other submaps look
                the same.
            times: spent on the frame so far.

        Raises:
            MapError: a submap cannot be loaded.
        """
        predicted = self.predict(stamp_ns)
        if predicted is None:
            self.active = None
        if hints:
            with times.stage("relocalize"):
                choice = self._try_hints(hints, features)
            if choice is not None:
                return choice
        if self.active is not None:
            from_motion, self._start_from_motion = self._start_from_motion, False
            return Choice(self.active, (predicted,) if from_motion and predicted is not None else ())
        if self._search is None:
            return Choice(None, reason="the submap was not searched for, since the search (relocalize) is off")
        with times.stage("relocalize"):
            found = self._search.find(features, self._memory.reach(stamp_ns))
            alignment = self._memory.confirm(stamp_ns, found)
        if not alignment.success or alignment.T_map_camera is None:
            return Choice(None, reason=alignment.reason)
        return Choice(self._enter(found.submap), (alignment.T_map_camera,))

    def follow(
        self, stamp_ns: int, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None
    ) -> PoseEstimate:
        """Judge a frame's estimate by the motion in the place; another submap may take over.

        Args:
            stamp_ns: of the frame.
            features: of the frame.
            estimate: from the active submap, or without a pose.
            predicted: the pose that was expected before the frame was worked on.
        """
        if self.active is not None and estimate.T_map_camera is not None and predicted is not None:
            jump = self._jump(predicted, estimate.T_map_camera)
            if jump:
                self._start_from_motion = True
                estimate = replace(estimate, state=TrackingState.LOST, reason=jump, T_map_camera=None, covariance=None)
        if self.active is not None:
            estimate = self._find_again(features, estimate, predicted)
            estimate = self._look_around(features, estimate, predicted)
        if estimate.T_map_camera is not None:
            self._motion.observe(stamp_ns, estimate.T_map_camera)
            self.had_pose = True
            if self.active is not None:
                self._memory.observe(stamp_ns, estimate.T_map_camera, self.active.number)
        elif self.had_pose:  # a submap's stage does not know of poses in others
            estimate = replace(estimate, state=TrackingState.LOST)
        return estimate

    def forget(self) -> None:
        """Have the next frame search the whole place."""
        self.active = None
        self._motion.forget()
        self._memory.forget()
        self._pause = 0

    def _enter(self, number: int) -> LoadedSubmap:
        """Make a submap the active one."""
        submap = self.cache.get(number)
        submap.enter()
        self.active = submap
        self._pause = self._settings.pause_frames
        return submap

    def _try_hints(self, hints: Sequence[Matrix], features: BackboneFeatures) -> Choice | None:
        """Enter the submap of the hint that the image fits best; None if it fits none."""
        by_submap: dict[int, list[Matrix]] = {}
        for hint in hints:
            by_submap.setdefault(int(np.argmin(self.place.index.distances(hint))), []).append(hint)
        ranked = sorted(by_submap, key=lambda number: -len(by_submap[number]))[: self._settings.hinted_submaps]
        tried = [(n, self.cache.get(n).align(features, by_submap[n])) for n in ranked]
        fitting = [item for item in tried if item[1].success]
        if not fitting:
            return None
        number, alignment = min(fitting, key=lambda item: item[1].final_cost)
        assert alignment.T_map_camera is not None
        self._motion.forget()  # where the camera was said to be before is no reason against it
        self._memory.forget()
        return Choice(self._enter(number), (alignment.T_map_camera,))

    def _find_again(self, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None) -> PoseEstimate:
        """The estimate, or, where it has no pose, that of a search around where the camera must be."""
        if self.active is None or self._search is None or predicted is None or estimate.T_map_camera is not None:
            return estimate
        times = StageTimes(estimate.timings_ms)
        with times.stage("relocalize"):
            found = self._search.find_again(features, self.active, lambda T: not self._jump(predicted, T))
        estimate = replace(estimate, timings_ms=times.with_total())
        if not found.success or found.T_map_camera is None or self._jump(predicted, found.T_map_camera):
            return estimate
        self._start_from_motion = True
        return _found_at(estimate, found)

    def _look_around(
        self, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None
    ) -> PoseEstimate:
        """The estimate, or a better one from a neighbour, which then takes over."""
        assert self.active is not None
        at = estimate.T_map_camera if estimate.T_map_camera is not None else predicted
        if at is None:
            return estimate
        s, away = self._settings, self.place.index.distances(at)
        own = float(away[self.active.number])
        away[self.active.number] = np.inf
        number = int(np.argmin(away))
        if away[number] > s.reach_m:
            return estimate
        self.cache.touch(self.active.number)  # in use: others make room for the neighbour
        submap = self.cache.get_if_kept(number)  # loads it ahead
        self._pause -= 1
        weak = estimate.T_map_camera is None or estimate.state is TrackingState.DEGRADED
        nearer = own > s.own_reach_m and away[number] < s.nearer_ratio * own
        if submap is None or self._pause > 0 or not (weak or nearer):
            return estimate
        times = StageTimes(estimate.timings_ms)
        self._pause = s.pause_frames
        with times.stage("change_over"):
            alignment = submap.align(features, [at])
        estimate = replace(estimate, timings_ms=times.with_total())
        if self._is_better(alignment, estimate, weak=weak) and alignment.T_map_camera is not None:
            self._enter(number)
            self._start_from_motion = True
            if weak:
                estimate = _found_at(estimate, alignment)
        return estimate

    def _is_better(self, alignment: Alignment, estimate: PoseEstimate, *, weak: bool) -> bool:
        if not alignment.success or alignment.covariance is None:
            return False
        own = estimate.alignment
        return weak or own is None or alignment.final_cost <= own.final_cost

    def _jump(self, predicted: Matrix, T_place_camera: Matrix) -> str:
        """How a pose cannot be where the motion leads, or nothing."""
        s = self._settings
        moved = inverse_pose(predicted) @ T_place_camera
        moved_m, moved_deg = float(np.linalg.norm(moved[:3, 3])), rotation_angle_deg(moved[:3, :3])
        if moved_m <= s.max_jump_m and moved_deg <= s.max_jump_deg:
            return ""
        return f"the pose jumped by {moved_m:.2f} m and {moved_deg:.0f} deg; other submaps may look like this one"


def _found_at(estimate: PoseEstimate, alignment: Alignment) -> PoseEstimate:
    """An estimate that takes the pose of a successful alignment."""
    return replace(
        estimate,
        state=TrackingState.TRACKING,
        reason="",
        T_map_camera=alignment.T_map_camera,
        covariance=alignment.covariance,
        alignment=alignment,
    )
