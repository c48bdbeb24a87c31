# SPDX-License-Identifier: Apache-2.0
"""Which submap of a place an image was taken in, and where: retrieval proposes, alignment decides, doubt is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
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
"""How far from a view an image may be that shows what it shows."""


@dataclass(frozen=True)
class PlaceSearchSettings:
    """How far the search goes and when a submap counts as found."""

    submaps: int = 4
    """Tried at most, whatever the size of the place."""
    clear_vote: float = 1.5
    """Where there are more submaps, the one found must have more votes than any that was not tried, by this factor."""
    min_vote: float = 0.1
    """And at least so many: where no image shows what tells submaps apart, chance says which are tried. Where measured,
    the right room had 0.13 where it was told apart, and wrong ones at most 0.09."""
    clear_margin: float = 1.25
    """In a place, another one's alignment must cost more than the best one's by this factor. In rooms alike one costs
    up to 1.2 times as much as another at the same pose by chance, as one of them has a view nearer by."""
    lean_margin: float = 1.15
    """From here on the image leans to a place, and two images from different views that do so will do."""
    fix: RelocalizationSettings = field(default_factory=RelocalizationSettings)


@dataclass(frozen=True, eq=False)
class Reach:
    """Where a camera can be, given where it was."""

    centre: NDArray[np.float64]
    """(3,) place frame."""
    limit_m: float

    def holds(self, alignment: Alignment) -> bool:
        """Whether the camera can be where an image was aligned."""
        T = alignment.T_map_camera
        return T is not None and float(np.linalg.norm(T[:3, 3] - self.centre)) <= self.limit_m


@dataclass(frozen=True, eq=False)
class LoadedSubmap:
    """Submap in memory, with what localizes in it."""

    number: int
    localizer: Localizer
    refiner: Refiner
    relocalizer: Relocalizer

    @classmethod
    def of(cls, number: int, scene_map: SceneMap, config: LocalizerConfig, backbone: Backbone) -> LoadedSubmap:
        """Return a submap in the place's frame; all share one backbone, and the place alone is searched as a whole."""
        localizer = Localizer(scene_map, replace(config, relocalize=False), backbone)
        return cls(number, localizer, localizer.refiner, Relocalizer(localizer.references, scene_map.camera))

    def align(self, features: BackboneFeatures, starts: Sequence[Matrix]) -> Alignment:
        """Refine the most promising of several poses; see :meth:`Refiner.align`."""
        return self.refiner.align(features, starts)

    def aligning(self, features: BackboneFeatures) -> Callable[[Sequence[Matrix]], Alignment]:
        """Return a function that aligns one image."""
        return lambda starts: self.align(features, starts)

    def enter(self) -> None:
        """Forget what is known of a camera that was here before."""
        self.localizer.reset("the camera came from elsewhere")


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search ended."""

    alignment: Alignment
    """Failed, with the reason, if the image was not found or could be of several places."""
    submap: int = -1
    tried: tuple[int, ...] = ()
    """Submaps that the image was compared with."""
    leaning: Alignment | None = None
    """Where the image leans to, in ``submap``, if it was not found."""


class PlaceSearch:
    """Finds the submap and the pose of an image from nothing but the image, and aligns images near a known pose."""

    def __init__(
        self, place: Place, cache: SubmapCache[LoadedSubmap], settings: PlaceSearchSettings | None = None
    ) -> None:
        self._place, self._cache, self._settings = place, cache, settings or PlaceSearchSettings()

    def find(self, features: BackboneFeatures, reach: Reach | None = None) -> Found:
        """Search the whole place; its cost depends on ``submaps``, and not on how many there are.

        Args:
            features: of the image.
            reach: where the camera can have come since it had a pose. Between places that look alike it decides; a
                place that looks like no other is found anywhere.

        Raises:
            MapError: a submap cannot be loaded.
        """
        s = self._settings
        ranked = self._place.index.search(features, s.submaps, s.fix.retrieved)
        near = set(range(len(self._place.submaps))) if reach is None else self._near(reach)
        ranked.sort(key=lambda item: item.submap not in near)  # stable
        tried = ranked[: s.submaps]
        results = [(item, alignment) for item in tried for alignment in self._try(features, item)]
        numbers, rest = tuple(item.submap for item in tried), ranked[s.submaps :]
        chosen = self._clear(results, tried, rest, s.clear_margin)
        if not chosen.success and reach is not None:
            within = [(item, alignment) for item, alignment in results if reach.holds(alignment)]
            nearer = self._clear(within, tried, [item for item in rest if item.submap in near], s.clear_margin)
            chosen = nearer if nearer.success else chosen
        leaning = chosen if chosen.success else self._clear(results, tried, rest, s.lean_margin)
        if not leaning.success:
            return Found(chosen, tried=numbers)
        submap = next(item.submap for item, alignment in results if alignment is leaning)
        return Found(chosen, submap, numbers, None if chosen.success else leaning)

    def find_again(
        self, features: BackboneFeatures, submap: LoadedSubmap, allowed: Callable[[Matrix], bool]
    ) -> Alignment:
        """The alignment in a submap that the camera is known to be in; failed, with the reason, if there is none.

        Args:
            features: of the image.
            submap: the submap.
            allowed: says whether the camera can be at a pose.
        """
        retrieved = self._place.index.views_of(submap.number, features, self._settings.fix.retrieved)
        found = submap.relocalizer.alignments(
            features, submap.aligning(features), [view.position for view in retrieved]
        )
        here = [r for r in found if r.T_map_camera is not None and allowed(r.T_map_camera)]
        return choose(here, self._settings.fix)

    def _clear(
        self,
        results: Sequence[tuple[SubmapCandidate, Alignment]],
        tried: Sequence[SubmapCandidate],
        rest: Sequence[SubmapCandidate],
        margin: float,
    ) -> Alignment:
        """The one alignment that is better than all elsewhere by a margin, and its submap voted for before the rest."""
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
        """Submaps with a view that the camera can have come near to."""
        away_m = np.linalg.norm(self._place.index.T_place_camera[:, :3, 3] - reach.centre, axis=1)
        return set(self._place.index.submap[away_m <= reach.limit_m + VIEW_REACH_M].tolist())

    def _try(self, features: BackboneFeatures, item: SubmapCandidate) -> list[Alignment]:
        submap = self._cache.get(item.submap)
        positions = [view.position for view in item.retrieved]
        return submap.relocalizer.alignments(features, submap.aligning(features), positions)

    def _choose(
        self, results: Sequence[tuple[SubmapCandidate, Alignment]], tried: Sequence[SubmapCandidate], margin: float
    ) -> Alignment:
        if not results:
            return failed_alignment(f"no view of the place shows what the image shows; tried {self._names(tried)}")
        owner = {id(alignment): item.submap for item, alignment in results}

        def place(alignment: Alignment) -> str:
            x, y, z = alignment.T_map_camera[:3, 3] if alignment.T_map_camera is not None else (0.0, 0.0, 0.0)
            return f"({x:.1f}, {y:.1f}, {z:.1f}) m in '{self._place.submaps[owner[id(alignment)]].name}'"

        return choose([alignment for _, alignment in results], replace(self._settings.fix, clear_margin=margin), place)

    def _names(self, items: Sequence[SubmapCandidate]) -> str:
        return ", ".join(f"'{self._place.submaps[item.submap].name}'" for item in items)
