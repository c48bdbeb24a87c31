# SPDX-License-Identifier: Apache-2.0
"""Which submap of a place the camera is in: found from an image, kept while it holds, left where another is nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.localization.coarse import CoarseStage
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_memory import PlaceMemory
from kfloc_ros.localization.place_search import LoadedSubmap, PlaceSearch, PlaceSearchSettings
from kfloc_ros.localization.refine import RefineStage
from kfloc_ros.localization.stages import timed
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
class ActiveSubmap:
    """The submap that the camera is in."""

    number: int
    loaded: LoadedSubmap

    @property
    def coarse(self) -> CoarseStage:
        """What finds coarse poses in it."""
        return self.loaded.coarse

    @property
    def refine(self) -> RefineStage:
        """What refines them."""
        return self.loaded.refine


class PlaceGuide:
    """Has a submap ready for every frame, and follows the poses from one to the next; what both stages share.

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
        own = replace(config, relocalize=False)  # in a submap alone; the whole place is searched here
        self.place, self.backbone = place, Backbone(device=choose_device(config.device))
        self.active: ActiveSubmap | None = None
        self.cache = SubmapCache(
            lambda number: LoadedSubmap.of(place.load_submap(number), own, self.backbone), config.loaded_submaps
        )
        self._search = PlaceSearch(place, self.cache, search) if config.relocalize else None
        self._settings = settings or GuideSettings()
        self._motion = ConstantVelocity(config.max_gap_s)
        self._suggested: tuple[Matrix, ...] = ()
        self._start_from_motion = False
        self._pause = 0
        self._had_pose = False
        self._memory = PlaceMemory()

    def suggest(self, starts: Sequence[Matrix]) -> None:
        """Have the next frame try poses in the place's frame before anything else; any thread."""
        self._suggested = tuple(starts)

    @property
    def has_suggestions(self) -> bool:
        return bool(self._suggested)

    def predict(self, stamp_ns: int) -> Matrix | None:
        """The pose at a time as the motion goes on, or None without a recent one."""
        return self._motion.predict(stamp_ns)

    def begin(self, stamp_ns: int, features: BackboneFeatures) -> str:
        """Have a submap for a frame; says why there is none, or nothing.

        Raises:
            MapError: a submap cannot be loaded.
        """
        predicted = self.predict(stamp_ns)
        if predicted is None:
            self.active = None
        suggested, self._suggested = self._suggested, ()
        if suggested and self._try_suggested(suggested, features):
            return ""
        if self.active is not None:
            if self._start_from_motion and predicted is not None:
                self.active.refine.suggest([predicted])
            self._start_from_motion = False
            return ""
        if self._search is None:
            return "which submap this is was not searched for, since the search (relocalize) is off"
        found = self._search.find(features, self._memory.reach(stamp_ns))
        alignment = self._memory.confirm(stamp_ns, found)
        if not alignment.success or alignment.T_map_camera is None:
            return alignment.reason
        self._enter(found.submap, alignment.T_map_camera)
        return ""

    def follow(
        self, stamp_ns: int, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None
    ) -> PoseEstimate:
        """What a frame's estimate is worth in the place; another submap may take over.

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
            self._had_pose = True
            if self.active is not None:
                self._memory.observe(stamp_ns, estimate.T_map_camera, self.active.number)
        elif self._had_pose:  # a submap's stage does not know of poses in others
            estimate = replace(estimate, state=TrackingState.LOST)
        return estimate

    def forget(self) -> None:
        """Have the next frame search the whole place."""
        self.active = None
        self._motion.forget()
        self._memory.forget()
        self._pause = 0

    @property
    def had_pose(self) -> bool:
        """Whether some frame before had a pose."""
        return self._had_pose

    def _enter(self, number: int, T_place_camera: Matrix) -> None:
        """Make a submap the active one, whose first frame starts from a pose."""
        loaded = self.cache.get(number)
        loaded.begin_anew()
        self.active = ActiveSubmap(number, loaded)
        loaded.refine.suggest([T_place_camera])
        self._pause = self._settings.pause_frames

    def _try_suggested(self, starts: Sequence[Matrix], features: BackboneFeatures) -> bool:
        """Go where somebody says that the camera is, if the image fits there; a guess decides between rooms alike."""
        by_submap: dict[int, list[Matrix]] = {}
        for start in starts:
            by_submap.setdefault(int(np.argmin(self.place.index.distances(start))), []).append(start)
        ranked = sorted(by_submap, key=lambda number: -len(by_submap[number]))[: self._settings.hinted_submaps]
        tried = [(n, self.cache.get(n).align(features, by_submap[n])) for n in ranked]
        fitting = [item for item in tried if item[1].success]
        if not fitting:
            return False
        number, alignment = min(fitting, key=lambda item: item[1].final_cost)
        assert alignment.T_map_camera is not None
        self._motion.forget()  # where the camera was said to be before is no reason against it
        self._memory.forget()
        self._enter(number, alignment.T_map_camera)
        return True

    def _find_again(self, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None) -> PoseEstimate:
        """The estimate, or, where it has no pose, that of a search around where the camera must be."""
        if self.active is None or self._search is None or predicted is None or estimate.T_map_camera is not None:
            return estimate
        spent: dict[str, float] = {}
        number, loaded = self.active.number, self.active.loaded
        with timed(spent, "relocalize"):
            found = self._search.find_again(features, number, loaded, lambda T: not self._jump(predicted, T))
        estimate = _with_time(estimate, spent)
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
        spent: dict[str, float] = {}
        self._pause = s.pause_frames
        with timed(spent, "change_over"):
            alignment = submap.align(features, [at])
        if self._is_better(alignment, estimate, weak=weak) and alignment.T_map_camera is not None:
            self._enter(number, alignment.T_map_camera)
            self._start_from_motion = True
            if weak:
                estimate = _found_at(estimate, alignment)
        return _with_time(estimate, spent)

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


def _with_time(estimate: PoseEstimate, spent_ms: Mapping[str, float]) -> PoseEstimate:
    """An estimate that took longer, by stage."""
    timings = {**estimate.timings_ms, **spent_ms}
    timings["total"] = timings.pop("total", 0.0) + sum(spent_ms.values())
    return replace(estimate, timings_ms=timings)
