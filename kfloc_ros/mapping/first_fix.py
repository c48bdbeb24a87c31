# SPDX-License-Identifier: Apache-2.0
"""A pose with no prior: retrieve reference views, match their points, solve, align, and ask the matches again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import poselib
import torch

from kfloc_ros.features.lighterglue import LighterGlue
from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.fix_choice import FirstFixSettings, apart, choose, cost_of, is_near, settled
from kfloc_ros.mapping.retrieval import ReferenceIndex
from kfloc_ros.mapping.view_matching import ImageMatches, Matches
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.types import Alignment

JUDGING_VIEWS = 3
"""Reference views whose matches a found pose is judged by."""

SURE_M = 0.05
"""Standard deviation in the worst direction below which an alignment is fixed well."""


@dataclass(frozen=True, eq=False)
class _Supported:
    """A pose and how many cells of the image agree with it."""

    T_map_camera: Matrix
    support: int


class FirstFix:
    """Finds where an image was taken from nothing but the image; the index is made when it is first asked."""

    def __init__(self, references: ReferenceViews, camera: Camera, settings: FirstFixSettings | None = None) -> None:
        self._references, self._camera, self.settings = references, camera, settings or FirstFixSettings()
        self._index: ReferenceIndex | None = None
        self._matcher: LighterGlue | None = None
        self._matches: ImageMatches | None = None
        """Of the last image: a doubted pose's are used again by the search that follows."""

    def find(
        self, features: TrunkFeatures, align: Callable[[Sequence[Matrix]], Alignment], expected: Matrix | None = None
    ) -> Alignment:
        """The alignment at the one place that the image shows; failed, with the reason, if there is none or several.

        Args:
            features: of the image.
            align: refines starting poses and judges the result.
            expected: where the camera should be, if anything is known; the whole map is searched all the same, but a
                place elsewhere has to be beyond doubt.
        """
        found = self.alignments(features, align, self._retrieve(features, expected), expected)
        return choose(found, self.settings, expected=expected)

    @torch.inference_mode()
    def doubt(self, features: TrunkFeatures, alignment: Alignment, expected: Matrix | None = None) -> str:
        """What speaks against an alignment that nothing but its cost speaks for, or nothing."""
        s = self.settings
        agreement = self._agreement(self.matches(features), alignment)
        if agreement < s.near_agreement:
            return f"only {100 * agreement:.0f} % of the image's matches agree with the alignment"
        assert alignment.T_map_camera is not None
        if expected is not None and apart(alignment.T_map_camera, expected, s.plausible_m, s.plausible_deg):
            return "the alignment is not where the camera was going"
        return ""

    @torch.inference_mode()
    def alignments(
        self,
        features: TrunkFeatures,
        align: Callable[[Sequence[Matrix]], Alignment],
        retrieved: Sequence[int] | None = None,
        expected: Matrix | None = None,
    ) -> list[Alignment]:
        """Alignments at all places that the image may show; those that its matches contradict have failed.

        First the matches are made one by one, which is fast. Only if that finds no place beyond doubt, the likeliest
        views are matched in context, too.

        Args:
            features: of the image.
            align: refines starting poses and judges the result.
            retrieved: the views that it may show, the likeliest first, if somebody else has looked for them; else they
                are looked for in all of the map's.
            expected: where the camera should be, if anything is known.
        """
        s = self.settings
        positions = self._retrieve(features) if retrieved is None else list(retrieved)
        matches = self.matches(features)
        starts = self._starts({k: matches.one_by_one(k).alike(s.min_similarity) for k in positions}, s.min_inliers)
        found = [settled(align, align([start])) for start in starts]
        possible = [self._verified(matches, r, s.sure_agreement / 2, in_context=False) for r in found]
        if self._is_sure(matches, possible):
            return possible
        likeliest = positions[: s.matched + (s.near if expected is not None else 0)]
        in_context = {k: matches.in_context(k) for k in likeliest}
        # right more often than one by one: views from all around, if they show one place, fix a pose best
        together = self._solve(list(in_context.values()), s.min_matched_inliers)
        further = [] if together is None else [together.T_map_camera]
        further += self._starts(in_context, s.min_matched_inliers)
        for start in further:
            if all(apart(start, T, s.same_start_m, s.same_start_deg) for T in starts):
                starts.append(start)
                found.append(settled(align, align([start])))
        verified = [self._verified(matches, r, self._needed(r, expected), in_context=True) for r in found]
        return self._best_supported(matches, verified, expected)

    def _is_sure(self, matches: ImageMatches, alignments: Sequence[Alignment]) -> bool:
        """Whether the likeliest place is beyond doubt: many matches agree, and they fix it in every direction."""
        best = min((r for r in alignments if r.success), key=cost_of, default=None)
        if best is None or best.final_cost > self.settings.max_cost or best.covariance is None:
            return False
        largest_m2 = float(np.linalg.eigvalsh(best.covariance[:3, :3])[-1])
        return largest_m2 < SURE_M**2 and self._agreement(matches, best) >= self.settings.sure_agreement

    def _best_supported(
        self, matches: ImageMatches, alignments: Sequence[Alignment], expected: Matrix | None
    ) -> list[Alignment]:
        """Without those that clearly fewer of the matches in context speak for than for another.

        Where the camera was expected, the frames before speak, too.
        """
        support = [0 if r.T_map_camera is None else matches.support(r.T_map_camera) for r in alignments]
        most = max((n for n, r in zip(support, alignments, strict=True) if r.success), default=0)
        return [
            replace(r, success=False, reason="more of the matches speak for another place")
            if r.success and self.settings.clear_margin * n < most and not self._is_expected(r, expected)
            else r
            for n, r in zip(support, alignments, strict=True)
        ]

    def _is_expected(self, alignment: Alignment, expected: Matrix | None) -> bool:
        return expected is not None and is_near(alignment, expected, self.settings)

    def _needed(self, alignment: Alignment, expected: Matrix | None) -> float:
        """Share of matches that have to agree with a pose."""
        s = self.settings
        if expected is None:
            return s.min_agreement
        return s.near_agreement if self._is_expected(alignment, expected) else s.far_agreement

    def matches(self, features: TrunkFeatures) -> ImageMatches:
        """Of an image with the map's views."""
        if self._matches is None or self._matches.features is not features:
            self._matches = ImageMatches(self._references, self._camera, features, self._context_matcher)
        return self._matches

    def _retrieve(self, features: TrunkFeatures, expected: Matrix | None = None) -> list[int]:
        """Positions of the views that an image may show, the likeliest first."""
        if self._index is None:
            self._index = ReferenceIndex(self._references)
        retrieved = [item.position for item in self._index.search(features, self.settings.retrieved)]
        if expected is None:
            return retrieved
        near = self._references.overlapping(expected, self._camera, self.settings.near)[: self.settings.near]
        return near + [k for k in retrieved if k not in near]

    def _context_matcher(self) -> LighterGlue:
        if self._matcher is None:
            self._matcher = LighterGlue(device=self._references.views[0].points.device)
        return self._matcher

    def _starts(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """Poses that the matches of views, the likeliest first, speak for, the best supported first."""
        chosen: list[Matrix] = []
        for place in sorted(self._supported(matches, min_inliers), key=lambda place: -place.support):
            near = (self.settings.same_start_m, self.settings.same_start_deg)
            if all(apart(place.T_map_camera, T, *near) for T in chosen):
                chosen.append(place.T_map_camera)
        return chosen[: self.settings.places]

    def _agreement(self, matches: ImageMatches, alignment: Alignment) -> float:
        """Of matches one by one with a pose."""
        assert alignment.T_map_camera is not None
        return matches.agreement(alignment.T_map_camera, self._compared(alignment))

    def _verified(
        self, matches: ImageMatches, alignment: Alignment, min_agreement: float, *, in_context: bool
    ) -> Alignment:
        """The alignment, failed if the matches contradict it."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        agreement = self._agreement(matches, alignment)
        if in_context:
            other = matches.agreement_in_context(alignment.T_map_camera, self._compared(alignment))
            agreement = (agreement + other) / 2
        if agreement >= min_agreement:
            return alignment
        return replace(alignment, success=False, reason=f"only {100 * agreement:.0f} % of the matches agree with it")

    def _compared(self, alignment: Alignment) -> list[int]:
        """Views that a pose is judged by: the best of those that it was aligned with."""
        assert alignment.T_map_camera is not None
        return self._references.overlapping(alignment.T_map_camera, self._camera, JUDGING_VIEWS)[:JUDGING_VIEWS]

    def _supported(self, matches: Mapping[int, Matches], min_inliers: int) -> Iterator[_Supported]:
        """Poses from the views, in order: each view that is in no earlier group by its group, and by itself.

        A group's views see one place and support each other; but where one view alone shows what the image shows, the
        others' matches, all wrong, drown it.
        """
        centres = self._references.T_map_camera[:, :3, 3]
        left = list(matches)
        for _ in range(self.settings.groups):
            if not left:
                return
            away_m = np.linalg.norm(centres - centres[left[0]], axis=1)
            group = [k for k in matches if away_m[k] <= self.settings.group_radius_m]
            for views in (group, left[:1])[: 1 if len(group) == 1 else 2]:
                place = self._solve([matches[k] for k in views], min_inliers)
                if place is not None:
                    yield place
            left = [k for k in left if k not in group]

    def _solve(self, parts: Sequence[Matches], min_inliers: int) -> _Supported | None:
        pixels = np.concatenate([m.pixels for m in parts])
        points = np.concatenate([m.points for m in parts])
        if len(pixels) < min_inliers:
            return None
        camera = {"model": "PINHOLE", "width": self._camera.width, "height": self._camera.height}
        camera["params"] = [self._camera.fx, self._camera.fy, self._camera.cx, self._camera.cy]
        ransac = {"max_reproj_error": self.settings.max_error_px, "max_iterations": 3000, "seed": 0}
        # RANSAC near the group: a map may lie kilometres from its own origin
        origin = points.mean(axis=0)
        pose, info = poselib.estimate_absolute_pose(pixels, points - origin, camera, ransac, {})
        inlier_cells = {tuple(p) for p in pixels[np.asarray(info["inliers"], dtype=bool)]}
        if len(inlier_cells) < min_inliers:
            return None
        T_map_camera = inverse_pose(make_pose(pose.R, pose.t))
        T_map_camera[:3, 3] += origin
        return _Supported(T_map_camera, len(inlier_cells))
