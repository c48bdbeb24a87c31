# SPDX-License-Identifier: Apache-2.0
"""Which submap of a place an image was taken in, and where: retrieval proposes, alignment decides, doubt is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.mapping.first_fix import UNRELATED_COST, FirstFix, FirstFixSettings, choose
from kfloc_ros.mapping.place import Place
from kfloc_ros.mapping.place_index import SubmapCandidate
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.mapping.submap_cache import SubmapCache
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings, failed_alignment
from kfloc_ros.types import Alignment


@dataclass(frozen=True)
class PlaceSearchSettings:
    """How far the search goes and when a submap counts as found."""

    submaps: int = 4
    """Tried at most, whatever the size of the place."""
    untried_margin: float = 0.05
    """A submap that was not tried must resemble the image less than the one found, by this cosine."""
    fix: FirstFixSettings = field(default_factory=FirstFixSettings)


@dataclass(frozen=True, eq=False)
class LoadedSubmap:
    """A submap in memory, with what aligns images to it."""

    scene_map: SceneMap
    refiner: Refiner
    first_fix: FirstFix

    @classmethod
    def of(cls, scene_map: SceneMap, num_references: int, device: torch.device) -> LoadedSubmap:
        """A submap in the place's frame."""
        references = scene_map.references.to(device)
        settings = RefinerSettings(
            num_references=num_references,
            max_cost=min(scene_map.calibration.max_alignment_cost, UNRELATED_COST),
            covariance_scale=scene_map.calibration.refined_covariance_scale,
        )
        first_fix = FirstFix(references, scene_map.camera)
        return cls(scene_map, Refiner(references, scene_map.camera, settings), first_fix)


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search ended."""

    alignment: Alignment
    """Failed, with the reason, if the image was not found or could be of several places."""
    submap: int = -1
    tried: tuple[int, ...] = ()
    """Submaps that the image was compared with."""


class PlaceSearch:
    """Finds the submap and the pose of an image from nothing but the image, and aligns images near a known pose."""

    def __init__(
        self, place: Place, cache: SubmapCache[LoadedSubmap], settings: PlaceSearchSettings | None = None
    ) -> None:
        self._place, self._cache, self._settings = place, cache, settings or PlaceSearchSettings()

    def find(self, features: TrunkFeatures) -> Found:
        """Search the whole place; its cost depends on ``submaps``, and not on how many there are.

        Raises:
            MapError: a submap cannot be loaded.
        """
        s = self._settings
        ranked = self._place.index.search(features, s.submaps + 1, s.fix.retrieved)
        tried = ranked[: s.submaps]
        results = [(item, alignment) for item in tried for alignment in self._try(features, item)]
        chosen = self._choose(results, tried)
        numbers = tuple(item.submap for item in tried)
        if not chosen.success:
            return Found(chosen, tried=numbers)
        winner = next(item for item, alignment in results if alignment is chosen)
        rest = ranked[s.submaps :]
        if rest and rest[0].similarity > winner.similarity - s.untried_margin:
            reason = f"more than {s.submaps} submaps look alike: {self._names([*tried, *rest])}"
            return Found(replace(chosen, success=False, reason=reason), tried=numbers)
        return Found(chosen, winner.submap, numbers)

    def _try(self, features: TrunkFeatures, item: SubmapCandidate) -> list[Alignment]:
        submap = self._cache.get(item.submap)
        starts = submap.first_fix.starts(features, item.retrieved)
        return [submap.refiner.align(features, [start]) for start in starts]

    def _choose(
        self, results: Sequence[tuple[SubmapCandidate, Alignment]], tried: Sequence[SubmapCandidate]
    ) -> Alignment:
        if not results:
            return failed_alignment(f"no view of the place shows what the image shows; tried {self._names(tried)}")
        owner = {id(alignment): item.submap for item, alignment in results}

        def place(alignment: Alignment) -> str:
            x, y, z = alignment.T_map_camera[:3, 3] if alignment.T_map_camera is not None else (0.0, 0.0, 0.0)
            return f"({x:.1f}, {y:.1f}, {z:.1f}) m in '{self._place.submaps[owner[id(alignment)]].name}'"

        return choose([alignment for _, alignment in results], self._settings.fix, place)

    def _names(self, items: Sequence[SubmapCandidate]) -> str:
        return ", ".join(f"'{self._place.submaps[item.submap].name}'" for item in items)
