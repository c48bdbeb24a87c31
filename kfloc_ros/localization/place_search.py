# SPDX-License-Identifier: Apache-2.0
"""Search of a place for the submap and the pose of an image: retrieval proposes, alignment decides, memory confirms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, is_farther
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.submap_cache import SubmapCache
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.place_index import SubmapCandidate
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.refiner import Refiner, failed_alignment
from kfloc_ros.relocalization.decision import RelocalizationSettings, choose
from kfloc_ros.relocalization.search import Relocalizer
from kfloc_ros.types import Alignment

VIEW_REACH_M = 1.5
"""Largest distance between a view and an image of the same scene."""


@dataclass(frozen=True)
class PlaceSearchSettings:
    """Extent of the search, and the conditions under which a submap is accepted."""

    submaps: int = 4
    """Largest number of submaps that are tried, whatever the size of the place."""
    clear_vote: float = 1.5
    """Factor by which the accepted submap must have more votes than any submap that was not tried."""
    min_vote: float = 0.1
    """Smallest number of votes of the accepted submap. If no image shows what distinguishes the submaps, the choice of
    those tried is chance. Where measured, the right room had 0.13 where it was distinguishable, and wrong ones at most
    0.09."""
    clear_margin: float = 1.25
    """Factor by which an alignment in another submap must cost more than the best one. Of two similar rooms, one costs
    up to 1.2 times as much as the other at the same pose by chance, because one of them has a nearer view."""
    tentative_margin: float = 1.15
    """Margin from which the best place is tentative; two images from different views with the same tentative place
    suffice."""
    relocalization: RelocalizationSettings = field(default_factory=RelocalizationSettings)


@dataclass(frozen=True, eq=False)
class Reach:
    """Region that a camera can have reached since its last pose."""

    centre: NDArray[np.float64]
    """(3,) place frame."""
    limit_m: float

    def contains(self, alignment: Alignment) -> bool:
        """Return true if the pose of an alignment lies in the region."""
        T = alignment.T_map_camera
        return T is not None and float(np.linalg.norm(T[:3, 3] - self.centre)) <= self.limit_m


@dataclass(frozen=True, eq=False)
class LoadedSubmap:
    """Submap in memory, with its localizer."""

    number: int
    localizer: Localizer
    refiner: Refiner
    relocalizer: Relocalizer

    @classmethod
    def of(cls, number: int, scene_map: SceneMap, config: LocalizerConfig, backbone: Backbone) -> LoadedSubmap:
        """Return a submap in the place's frame; all share one backbone, and only the place is searched as a whole."""
        localizer = Localizer(scene_map, replace(config, relocalize=False), backbone)
        return cls(number, localizer, localizer.refiner, Relocalizer(localizer.references, scene_map.camera))

    def align(self, features: BackboneFeatures, starts: Sequence[Matrix]) -> Alignment:
        """Refine the most promising of several poses; see :meth:`Refiner.align`."""
        return self.refiner.align(features, starts)

    def aligner(self, features: BackboneFeatures) -> Callable[[Sequence[Matrix]], Alignment]:
        """Return the aligner of one image."""
        return lambda starts: self.align(features, starts)

    def enter(self) -> None:
        """Reset the localizer, since the camera comes from another submap."""
        self.localizer.reset("the camera came from elsewhere")


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of a search."""

    alignment: Alignment
    """Best alignment; failed, with the reason, if no place or several places fit."""
    submap: int = -1
    tried: tuple[int, ...] = ()
    """Submaps that the image was compared with."""
    tentative: Alignment | None = None
    """Alignment at the tentative place, in ``submap``, if no place was accepted."""
    rivals: tuple[tuple[int, Alignment], ...] = ()
    """Best alignment in every other submap that fits the image too, if a place was accepted."""


class PlaceSearch:
    """Search for the submap and the pose of an image, from the image alone."""

    def __init__(
        self, place: Place, cache: SubmapCache[LoadedSubmap], settings: PlaceSearchSettings | None = None
    ) -> None:
        self._place, self._cache, self._settings = place, cache, settings or PlaceSearchSettings()

    def find(self, features: BackboneFeatures, reach: Reach | None = None) -> SearchResult:
        """Search the whole place; the cost depends on ``submaps``, not on the size of the place.

        Args:
            features: backbone features of the image.
            reach: region that the camera can have reached since its last pose. It decides between places that look
                alike; a place that looks like no other is accepted anywhere.

        Raises:
            MapError: a submap cannot be loaded.
        """
        s = self._settings
        ranked = self._place.index.search(features, s.submaps, s.relocalization.retrieved)
        near = set(range(len(self._place.submaps))) if reach is None else self._near(reach)
        ranked.sort(key=lambda item: item.submap not in near)  # stable
        tried = ranked[: s.submaps]
        results = [(item, alignment) for item in tried for alignment in self._try(features, item)]
        numbers, rest = tuple(item.submap for item in tried), ranked[s.submaps :]
        chosen = self._clear(results, tried, rest, s.clear_margin)
        if not chosen.success and reach is not None:
            within = [(item, alignment) for item, alignment in results if reach.contains(alignment)]
            nearer = self._clear(within, tried, [item for item in rest if item.submap in near], s.clear_margin)
            chosen = nearer if nearer.success else chosen
        tentative = chosen if chosen.success else self._clear(results, tried, rest, s.tentative_margin)
        if not tentative.success:
            return SearchResult(chosen, tried=numbers)
        submap = next(item.submap for item, alignment in results if alignment is tentative)
        if not chosen.success:
            return SearchResult(chosen, submap, numbers, tentative)
        rivals: dict[int, Alignment] = {}
        for item, alignment in sorted(results, key=lambda result: -result[1].final_cost):
            if alignment.success and item.submap != submap:
                rivals[item.submap] = alignment
        return SearchResult(chosen, submap, numbers, rivals=tuple(rivals.items()))

    def search_submap(
        self, features: BackboneFeatures, submap: LoadedSubmap, allowed: Callable[[Matrix], bool]
    ) -> Alignment:
        """Search the submap that the camera is known to be in.

        Args:
            features: backbone features of the image.
            submap: the submap.
            allowed: returns true for a pose that the camera can have.

        Returns:
            The alignment; a failed one, with the reason, if no pose was accepted.
        """
        retrieved = self._place.index.views_of(submap.number, features, self._settings.relocalization.retrieved)
        found = submap.relocalizer.alignments(features, submap.aligner(features), [view.position for view in retrieved])
        here = [r for r in found if r.T_map_camera is not None and allowed(r.T_map_camera)]
        return choose(here, self._settings.relocalization)

    def _clear(
        self,
        results: Sequence[tuple[SubmapCandidate, Alignment]],
        tried: Sequence[SubmapCandidate],
        rest: Sequence[SubmapCandidate],
        margin: float,
    ) -> Alignment:
        """Return the best alignment; it fails unless it beats other places by cost and untried submaps by votes."""
        chosen = self._choose(results, tried, margin)
        rival = max(rest, key=lambda item: item.votes, default=None)
        if not chosen.success or rival is None:
            return chosen
        winner = next(item for item, alignment in results if alignment is chosen)
        if winner.votes >= max(self._settings.min_vote, self._settings.clear_vote * rival.votes):
            return chosen
        reason = f"more than {self._settings.submaps} submaps look alike: {self._names([*tried, rival])}"
        return replace(chosen, success=False, reason=reason)

    def _near(self, reach: Reach) -> set[int]:
        """Return the submaps with a view in reach."""
        away_m = np.linalg.norm(self._place.index.T_place_camera[:, :3, 3] - reach.centre, axis=1)
        return set(self._place.index.submap[away_m <= reach.limit_m + VIEW_REACH_M].tolist())

    def _try(self, features: BackboneFeatures, item: SubmapCandidate) -> list[Alignment]:
        submap = self._cache.get(item.submap)
        positions = [view.position for view in item.retrieved]
        return submap.relocalizer.alignments(features, submap.aligner(features), positions)

    def _choose(
        self, results: Sequence[tuple[SubmapCandidate, Alignment]], tried: Sequence[SubmapCandidate], margin: float
    ) -> Alignment:
        if not results:
            return failed_alignment(f"no view of the place shows what the image shows; tried {self._names(tried)}")
        owner = {id(alignment): item.submap for item, alignment in results}

        def place(alignment: Alignment) -> str:
            x, y, z = alignment.T_map_camera[:3, 3] if alignment.T_map_camera is not None else (0.0, 0.0, 0.0)
            return f"({x:.1f}, {y:.1f}, {z:.1f}) m in '{self._place.submaps[owner[id(alignment)]].name}'"

        return choose(
            [alignment for _, alignment in results], replace(self._settings.relocalization, clear_margin=margin), place
        )

    def _names(self, items: Sequence[SubmapCandidate]) -> str:
        return ", ".join(f"'{self._place.submaps[item.submap].name}'" for item in items)


@dataclass(frozen=True)
class MemorySettings:
    """Limits of the camera's motion, and the conditions under which two images confirm each other."""

    max_speed_m_s: float = 2.0
    max_speed_ratio: float = 2.0
    """The camera's speed limit is the larger of ``max_speed_m_s`` and its last speed times this ratio. After a gap,
    places beyond reach do not compete with places within reach."""
    margin_m: float = 0.5
    """Added to the distance that the camera can have moved."""
    confirm_s: float = 10.0
    confirm_apart_m: float = 1.5
    confirm_apart_deg: float = 60.0
    """Two tentative images of one place within ``confirm_s`` confirm each other if they are further apart than either
    limit, so that they show almost nothing in common. With turns of up to 35 degrees in front of a wall without
    posters, both images were tentative for the same wrong room."""


@dataclass(frozen=True, eq=False)
class _PoseRecord:
    """Accepted or tentative pose of an image."""

    stamp_ns: int
    T_place_camera: Matrix
    submap: int


class PlaceMemory:
    """Memory of the last two poses, however old, and of the last tentative place."""

    def __init__(self, settings: MemorySettings | None = None) -> None:
        self._settings = settings or MemorySettings()
        self._poses: list[_PoseRecord] = []
        self._tentative: _PoseRecord | None = None

    def observe(self, stamp_ns: int, T_place_camera: Matrix, submap: int) -> None:
        """Remember an accepted pose; it supersedes the tentative place."""
        self._poses = [*self._poses[-1:], _PoseRecord(stamp_ns, T_place_camera, submap)]
        self._tentative = None

    def reset(self) -> None:
        """Drop the poses and the tentative place."""
        self._poses, self._tentative = [], None

    def reach(self, stamp_ns: int) -> Reach | None:
        """Return the region that the camera can have reached since its last pose; None if there was none."""
        if not self._poses or stamp_ns <= self._poses[-1].stamp_ns:
            return None
        s, last = self._settings, self._poses[-1]
        speed_m_s = s.max_speed_m_s
        if len(self._poses) == 2 and last.stamp_ns > self._poses[0].stamp_ns:
            step_s = 1e-9 * (last.stamp_ns - self._poses[0].stamp_ns)
            step_m = _distance_m(self._poses[0].T_place_camera, last.T_place_camera)
            speed_m_s = max(speed_m_s, s.max_speed_ratio * step_m / step_s)
        limit_m = s.margin_m + speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        return Reach(last.T_place_camera[:3, 3], limit_m)

    def confirm(self, stamp_ns: int, result: SearchResult) -> Alignment:
        """Return the search's alignment, or the tentative one if an earlier image was tentative for the same place.

        Two images from about the same view share the same ambiguity, so they do not confirm each other. The camera must
        have moved or turned between them, and no further than it can.
        """
        tentative, s = result.tentative, self._settings
        if tentative is None or tentative.T_map_camera is None:
            return result.alignment
        last, now = self._tentative, _PoseRecord(stamp_ns, tentative.T_map_camera, result.submap)
        if last is None or last.submap != now.submap or not 0 < stamp_ns - last.stamp_ns <= s.confirm_s * 1e9:
            self._tentative = now
            return result.alignment
        limit_m = s.margin_m + s.max_speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        if _distance_m(last.T_place_camera, now.T_place_camera) > limit_m:
            self._tentative = None  # not both can be right
            return result.alignment
        if is_farther(last.T_place_camera, now.T_place_camera, s.confirm_apart_m, s.confirm_apart_deg):
            return tentative
        return result.alignment  # the older one stays: the camera has moved further since


def _distance_m(a: Matrix, b: Matrix) -> float:
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3]))
