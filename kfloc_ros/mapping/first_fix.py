# SPDX-License-Identifier: Apache-2.0
"""A pose with no prior: retrieve reference views, match their points, solve, and let the alignment be the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import poselib
import torch
from numpy.typing import NDArray

from kfloc_ros.features.lighterglue import LighterGlue, PointSet
from kfloc_ros.features.trunk import COARSE_STRIDE, TrunkFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg
from kfloc_ros.mapping.retrieval import ReferenceIndex, Retrieved
from kfloc_ros.pixloc.cost import project
from kfloc_ros.pixloc.references import ReferenceViews, query_points
from kfloc_ros.pixloc.refiner import failed_alignment
from kfloc_ros.types import Alignment

UNRELATED_COST = 0.26
"""Alignment cost above which no pose is believed, however lax the limit that a map was calibrated with.

The features are the same in every map, and so is the cost of unrelated images: in an office (hololens_office) and in a
mirrored kitchen (RedKitchen) wrong places cost 0.26 and more, right ones at most 0.25. The search believes up to here,
however strict the map's own limit: it is calibrated on views from near the mapped ones, and right poses from further
away cost more; and matched points have said independently of the cost where to align from.
"""


@dataclass(frozen=True)
class FirstFixSettings:
    """How far the search goes and when a place counts as found."""

    retrieved: int = 20
    """Reference views whose points may be matched."""
    matched: int = 0
    """Of these, views whose points are matched in context (LighterGlue) before all are matched one by one: 6 find more
    of the places in an office, and claim more wrong ones, which is the worse fault; so none unless asked for."""
    query_points: int = 800
    min_matched_inliers: int = 10
    """Of matches in context, which are few and mostly right."""
    groups: int = 10
    """Groups of views that are solved for a pose at most."""
    group_radius_m: float = 1.0
    """Views from nearer than this to the best of a group join it: they see one place."""
    places: int = 3
    """Starting poses aligned at most, those that most cells agree with."""
    same_start_m: float = 0.3
    same_start_deg: float = 10.0
    """Starts nearer to each other than both would be aligned to the same pose."""
    min_similarity: float = 0.7
    """Cosine of two features below which they do not match."""
    max_error_px: float = 8.0
    min_inliers: int = 20
    max_cost: float = UNRELATED_COST
    distinct_m: float = 0.5
    distinct_deg: float = 20.0
    """Two poses further apart than either of these are different places."""
    clear_margin: float = 1.15
    """The second place's alignment must cost more than the best one's by this factor, or nothing is claimed."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Pixels of an image with the map points they show."""

    pixels: NDArray[np.float64]
    """(N, 2)"""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame."""


@dataclass(frozen=True, eq=False)
class _Supported:
    """A pose and how many cells of the image agree with it."""

    T_map_camera: Matrix
    support: int


class FirstFix:
    """Finds where an image was taken from nothing but the image; the index is made when it is first asked."""

    def __init__(self, references: ReferenceViews, camera: Camera, settings: FirstFixSettings | None = None) -> None:
        self._references, self._camera, self._settings = references, camera, settings or FirstFixSettings()
        self._index: ReferenceIndex | None = None
        self._matcher: LighterGlue | None = None

    @torch.inference_mode()
    def starts(self, features: TrunkFeatures, retrieved: Sequence[Retrieved] | None = None) -> list[Matrix]:
        """Poses ``T_map_camera`` that the image may have, the best supported first; possibly none.

        Args:
            features: of the image.
            retrieved: the views that it may show, the likeliest first, if somebody else has looked for them; else they
                are looked for in all of the map's.
        """
        if retrieved is None:
            if self._index is None:
                self._index = ReferenceIndex(self._references)
            retrieved = self._index.search(features, self._settings.retrieved)
        in_context = [item.position for item in retrieved[: self._settings.matched]]
        matches = self._match_in_context(features, in_context) if in_context else {}
        found = list(self._supported(matches, self._settings.min_matched_inliers))
        if not found:
            matches = {item.position: self._match(features, item.position) for item in retrieved}
            found = list(self._supported(matches, self._settings.min_inliers))
        found.sort(key=lambda place: -place.support)
        chosen: list[Matrix] = []
        for place in found:
            near = (self._settings.same_start_m, self._settings.same_start_deg)
            if all(apart(place.T_map_camera, T, *near) for T in chosen):
                chosen.append(place.T_map_camera)
        return chosen[: self._settings.places]

    def _supported(self, matches: Mapping[int, Matches], min_inliers: int) -> Iterator[_Supported]:
        """Poses from the views, in order: each view that is in no earlier group by its group, and by itself.

        A group's views see one place and support each other; but where one view alone shows what the image shows, the
        others' matches, all wrong, drown it.
        """
        centres = self._references.T_map_camera[:, :3, 3]
        left = list(matches)
        for _ in range(self._settings.groups):
            if not left:
                return
            away_m = np.linalg.norm(centres - centres[left[0]], axis=1)
            group = [k for k in matches if away_m[k] <= self._settings.group_radius_m]
            for views in (group, left[:1])[: 1 if len(group) == 1 else 2]:
                place = self._solve([matches[k] for k in views], min_inliers)
                if place is not None:
                    yield place
            left = [k for k in left if k not in group]

    def find(self, features: TrunkFeatures, align: Callable[[Sequence[Matrix]], Alignment]) -> Alignment:
        """The alignment at the one place that the image shows; failed, with the reason, if there is none or several.

        Args:
            features: of the image.
            align: refines starting poses and judges the result.
        """
        return choose([align([start]) for start in self.starts(features)], self._settings)

    def _match_in_context(self, features: TrunkFeatures, positions: Sequence[int]) -> dict[int, Matches]:
        """Matches that were judged with their surroundings."""
        if self._matcher is None:
            self._matcher = LighterGlue(device=features.coarse.device)
        width, height = self._camera.width, self._camera.height
        query = PointSet(*query_points(features, self._settings.query_points), width, height)
        pixels = query.pixels.cpu().double().numpy()
        found = {}
        for position in positions:
            view = self._references.views[position]
            uv, _, _ = project(
                view.points.double(),
                torch.from_numpy(inverse_pose(self._references.T_map_camera[position])).to(view.points.device),
                self._camera,
                1.0,
            )
            seen = PointSet(uv.to(query.pixels), view.coarse.to(query.features), width, height)
            pairs = self._matcher.match(seen, query).cpu()
            points = view.points.cpu().double().numpy()[pairs[:, 0].numpy()]
            found[position] = Matches(pixels[pairs[:, 1].numpy()], points)
        return found

    def _match(self, features: TrunkFeatures, position: int) -> Matches:
        """Mutual nearest neighbours between a view's points and the image's cells."""
        view, grid = self._references.views[position], features.coarse[0].float()
        w = grid.shape[2]
        similarity = view.coarse.to(grid) @ grid.reshape(len(grid), -1)
        value, cell = similarity.max(dim=1)
        best_point = similarity[:, cell].argmax(dim=0)
        kept = (best_point == torch.arange(len(cell), device=cell.device)) & (value > self._settings.min_similarity)
        chosen = cell[kept].cpu().numpy()
        pixels = np.stack([chosen % w, chosen // w], axis=1) * COARSE_STRIDE + (COARSE_STRIDE - 1) / 2
        return Matches(pixels.astype(np.float64), view.points[kept.to(view.points.device)].cpu().double().numpy())

    def _solve(self, parts: Sequence[Matches], min_inliers: int) -> _Supported | None:
        pixels = np.concatenate([m.pixels for m in parts])
        points = np.concatenate([m.points for m in parts])
        if len(pixels) < min_inliers:
            return None
        camera = {"model": "PINHOLE", "width": self._camera.width, "height": self._camera.height}
        camera["params"] = [self._camera.fx, self._camera.fy, self._camera.cx, self._camera.cy]
        ransac = {"max_reproj_error": self._settings.max_error_px, "max_iterations": 3000, "seed": 0}
        # RANSAC near the group: a map may lie kilometres from its own origin
        origin = points.mean(axis=0)
        pose, info = poselib.estimate_absolute_pose(pixels, points - origin, camera, ransac, {})
        inlier_cells = {tuple(p) for p in pixels[np.asarray(info["inliers"], dtype=bool)]}
        if len(inlier_cells) < min_inliers:
            return None
        T_map_camera = inverse_pose(make_pose(pose.R, pose.t))
        T_map_camera[:3, 3] += origin
        return _Supported(T_map_camera, len(inlier_cells))


def choose(
    results: Sequence[Alignment],
    settings: FirstFixSettings,
    place: Callable[[Alignment], str] | None = None,
) -> Alignment:
    """The one of several alignments that is where the image was taken; failed, with the reason, if that is not clear.

    Args:
        results: of alignments from different starts.
        settings: when a place counts as found.
        place: says in words where an alignment is.
    """
    place = place or _place
    if not results:
        return failed_alignment("no reference view shows what the image shows")
    good = sorted((r for r in results if r.success and r.final_cost <= settings.max_cost), key=_cost)
    if not good:
        best = min(results, key=_cost)
        reason = best.reason or f"the image hardly looks like the map at {place(best)} (cost {best.final_cost:.2f})"
        return replace(best, success=False, reason=reason)
    rival = next((r for r in good[1:] if distinct(good[0], r, settings)), None)
    if rival is None or rival.final_cost > settings.clear_margin * good[0].final_cost:
        return good[0]
    return replace(good[0], success=False, reason=f"two places look alike: {place(good[0])} and {place(rival)}")


def distinct(a: Alignment, b: Alignment, settings: FirstFixSettings) -> bool:
    """Whether two alignments, which have poses, are of different places."""
    assert a.T_map_camera is not None and b.T_map_camera is not None
    return apart(a.T_map_camera, b.T_map_camera, settings.distinct_m, settings.distinct_deg)


def apart(a: Matrix, b: Matrix, limit_m: float, limit_deg: float) -> bool:
    """Whether two poses are further apart than either limit."""
    return (
        float(np.linalg.norm(a[:3, 3] - b[:3, 3])) > limit_m or rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) > limit_deg
    )


def _cost(alignment: Alignment) -> float:
    return alignment.final_cost


def _place(alignment: Alignment) -> str:
    assert alignment.T_map_camera is not None
    x, y, z = alignment.T_map_camera[:3, 3]
    return f"({x:.1f}, {y:.1f}, {z:.1f}) m"
