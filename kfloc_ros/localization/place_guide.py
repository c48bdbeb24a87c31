# SPDX-License-Identifier: Apache-2.0
"""Choice of a place's submap for each frame: search by image, stay while poses succeed, hand over to a neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_search import LoadedSubmap, PlaceMemory, PlaceSearch, PlaceSearchSettings
from kfloc_ros.localization.results import StageTimes
from kfloc_ros.localization.submap_cache import SubmapCache
from kfloc_ros.localization.tracking import ConstantVelocity, Rivals
from kfloc_ros.maps.place import Place
from kfloc_ros.types import Alignment, PoseEstimate, TrackingState


@dataclass(frozen=True)
class GuideSettings:
    """Conditions for changing the submap."""

    max_jump_m: float = 0.5
    max_jump_deg: float = 25.0
    """A pose further than either limit from the predicted one is a jump, and needs a search of the whole place."""
    reach_m: float = 1.5
    """Submaps with a view closer than this to a pose are its neighbours (a degree counts as 2 cm)."""
    nearer_ratio: float = 0.6
    own_reach_m: float = 0.3
    """A neighbour takes over if its nearest view is nearer by this ratio, and the own submap's is further than this."""
    pause_frames: int = 8
    """Frames between two checks of a neighbour; each check costs an alignment."""
    hinted_submaps: int = 2
    """Largest number of submaps in which hints are tried."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Submap chosen for a frame."""

    submap: LoadedSubmap | None
    """None if the submap is not known."""
    hints: tuple[Matrix, ...] = ()
    """Further starting poses for the frame, in the place's frame."""
    reason: str = ""
    """Reason why there is no submap; empty if there is one."""


class PlaceGuide:
    """Guide that chooses a submap for every frame and follows the poses from one submap to the next.

    All poses are in the place's frame, so the motion model continues from one submap to another.

    Args:
        place: the place of the camera.
        config: options of the localizer.
        search: settings of the search for a submap.
        settings: conditions for changing the submap.
    """

    def __init__(
        self,
        place: Place,
        config: LocalizerConfig,
        search: PlaceSearchSettings | None = None,
        settings: GuideSettings | None = None,
    ) -> None:
        self.place, self.backbone = place, Backbone(device=choose_device(config.device), runtime=config.runtime)
        self.active: LoadedSubmap | None = None
        """Submap that the camera is in; None if it is not known."""
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
        """True if an earlier frame had a pose."""
        self._memory = PlaceMemory()
        self.rivals = Rivals()
        """Submaps that look like the present one, and what the images since the search say of them."""

    def predict(self, stamp_ns: int) -> Matrix | None:
        """Return the pose that the motion model predicts, or None without a recent pose."""
        return self._motion.predict(stamp_ns)

    def choose(self, stamp_ns: int, features: BackboneFeatures, hints: Sequence[Matrix], times: StageTimes) -> Choice:
        """Choose a submap for a frame.

        Args:
            stamp_ns: stamp of the frame.
            features: backbone features of the frame.
            hints: likely poses ``T_place_camera`` (4, 4). A hint that fits the image is taken, even if other submaps
                look alike.
            times: time spent on the frame so far.

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
        choice = Choice(self._enter(found.submap), (alignment.T_map_camera,))
        self.rivals.begin(alignment.T_map_camera, found.rivals)
        return choice

    def update(
        self, stamp_ns: int, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None
    ) -> PoseEstimate:
        """Check a frame's estimate against the motion in the place; hand over to another submap if one is better.

        Args:
            stamp_ns: stamp of the frame.
            features: backbone features of the frame.
            estimate: estimate of the active submap, with or without a pose.
            predicted: pose predicted before the frame was processed.

        Returns:
            The estimate, LOST if its pose is a jump, or that of a search or of a neighbour.
        """
        bridged = estimate if estimate.bridged else None
        if bridged is not None:  # no measurement: a search or a neighbour may have one
            lost = TrackingState.LOST
            estimate = replace(estimate, state=lost, T_map_camera=None, covariance=None, confidence=None, bridged=False)
        if self.active is not None and estimate.T_map_camera is not None and predicted is not None:
            jump = self._jump(predicted, estimate.T_map_camera)
            if jump:
                self._start_from_motion = True
                estimate = replace(estimate, state=TrackingState.LOST, reason=jump, T_map_camera=None, covariance=None)
        if self.active is not None:
            estimate = self._recover(features, estimate, predicted)
            estimate = self._consider_neighbour(features, estimate, predicted)
            estimate = self._weigh_rivals(features, estimate)
        if estimate.T_map_camera is not None:
            self._motion.observe(stamp_ns, estimate.T_map_camera)
            self.had_pose = True
            if self.active is not None:
                self._memory.observe(stamp_ns, estimate.T_map_camera, self.active.number)
        elif bridged is not None:
            estimate = replace(bridged, timings_ms=estimate.timings_ms)
        elif self.had_pose:  # a submap's stage does not know of poses in other submaps
            estimate = replace(estimate, state=TrackingState.LOST)
        return estimate

    def reset(self) -> None:
        """Reset the motion and the memory; the next frame searches the whole place."""
        self.active = None
        self._motion.reset()
        self._memory.reset()
        self.rivals.end()
        self._pause = 0

    def _enter(self, number: int) -> LoadedSubmap:
        """Make a submap the active one."""
        submap = self.cache.get(number)
        submap.enter()
        self.rivals.end()
        self.active = submap
        self._pause = self._settings.pause_frames
        return submap

    def _try_hints(self, hints: Sequence[Matrix], features: BackboneFeatures) -> Choice | None:
        """Enter the submap of the hint that fits the image best; None if no hint fits."""
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
        self._motion.reset()  # earlier poses are no evidence against a hint
        self._memory.reset()
        return Choice(self._enter(number), (alignment.T_map_camera,))

    def _recover(self, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None) -> PoseEstimate:
        """Return the estimate; without a pose, that of a search around the predicted pose."""
        if self.active is None or self._search is None or predicted is None or estimate.T_map_camera is not None:
            return estimate
        times = StageTimes(estimate.timings_ms)
        with times.stage("relocalize"):
            found = self._search.search_submap(features, self.active, lambda T: not self._jump(predicted, T))
        estimate = replace(estimate, timings_ms=times.with_total())
        if not found.success or found.T_map_camera is None or self._jump(predicted, found.T_map_camera):
            return estimate
        self._start_from_motion = True
        return _with_alignment(estimate, found)

    def _consider_neighbour(
        self, features: BackboneFeatures, estimate: PoseEstimate, predicted: Matrix | None
    ) -> PoseEstimate:
        """Return the estimate, or a better one from a neighbour, which then takes over."""
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
        self.cache.touch(self.active.number)  # in use, so not the one to be evicted for the neighbour
        submap = self.cache.get_or_prefetch(number)  # loads it ahead
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
                estimate = _with_alignment(estimate, alignment)
        return estimate

    def _weigh_rivals(self, features: BackboneFeatures, estimate: PoseEstimate) -> PoseEstimate:
        """Return the estimate; DEGRADED while images fit a rival better, whose pose it is once they decide for it."""
        T, own = estimate.T_map_camera, estimate.alignment
        if self.active is None or T is None or own is None or not own.success:
            return estimate
        name, times = self.place.submaps[self.active.number].name, StageTimes(estimate.timings_ms)
        with times.stage("change_over"):
            decided = self.rivals.weigh(T, own.final_cost, lambda n, start: self.cache.get(n).align(features, [start]))
        if decided is not None:
            number, alignment = decided
            self._enter(number)
            self._motion.reset()
            self._memory.reset()
            self._start_from_motion = True
            estimate = _with_alignment(estimate, alignment)
        rival = self.rivals.likelier if decided is None else decided[0]
        if rival is None:
            return replace(estimate, timings_ms=times.with_total())
        other = self.place.submaps[rival].name
        reason = f"the images since the search fit '{other}' better than '{name}'"
        return replace(estimate, state=TrackingState.DEGRADED, reason=reason, timings_ms=times.with_total())

    def _is_better(self, alignment: Alignment, estimate: PoseEstimate, *, weak: bool) -> bool:
        if not alignment.success or alignment.covariance is None:
            return False
        own = estimate.alignment
        return weak or own is None or alignment.final_cost <= own.final_cost

    def _jump(self, predicted: Matrix, T_place_camera: Matrix) -> str:
        """Return the reason why a pose contradicts the motion, or an empty string."""
        s = self._settings
        moved = inverse_pose(predicted) @ T_place_camera
        moved_m, moved_deg = float(np.linalg.norm(moved[:3, 3])), rotation_angle_deg(moved[:3, :3])
        if moved_m <= s.max_jump_m and moved_deg <= s.max_jump_deg:
            return ""
        return f"the pose jumped by {moved_m:.2f} m and {moved_deg:.0f} deg; other submaps may look like this one"


def _with_alignment(estimate: PoseEstimate, alignment: Alignment) -> PoseEstimate:
    """Return an estimate with the pose of a successful alignment."""
    return replace(
        estimate,
        state=TrackingState.TRACKING,
        reason="",
        T_map_camera=alignment.T_map_camera,
        covariance=alignment.covariance,
        alignment=alignment,
    )
