# SPDX-License-Identifier: Apache-2.0
"""A pose with no prior: retrieve reference views, match their points, solve, align, and ask the matches again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import poselib
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.features.lighterglue import LighterGlue
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, is_farther, make_pose
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.relocalization.decision import RelocalizationSettings, choose, distinct, is_near, more_speak_for
from kfloc_ros.relocalization.evidence import JUDGING_VIEWS, Align, Evidence
from kfloc_ros.relocalization.matching import ImageMatches, Matches
from kfloc_ros.relocalization.retrieval import ReferenceIndex
from kfloc_ros.types import Alignment


class Relocalizer:
    """Finds where an image was taken from nothing but the image; the index is made when it is first asked."""

    def __init__(
        self, references: ReferenceViews, camera: Camera, settings: RelocalizationSettings | None = None
    ) -> None:
        self._references, self._camera, self.settings = references, camera, settings or RelocalizationSettings()
        self._starts = StartingPoses(references, camera, self.settings)
        self._index: ReferenceIndex | None = None
        self._matcher: LighterGlue | None = None
        self._matches: ImageMatches | None = None
        """Of the last image: a doubted pose's are used again by the search that follows."""

    def find(
        self,
        features: BackboneFeatures,
        align: Align,
        expected: Matrix | None = None,
        likely: Sequence[Matrix] = (),
    ) -> Alignment:
        """The alignment at the one place that the image shows; failed, with the reason, if there is none or several.

        Args:
            features: of the image.
            align: refines starting poses and judges the result.
            expected: where the camera should be, if anything is known; the whole map is searched all the same, but a
                place elsewhere has to be beyond doubt.
            likely: poses to start from besides those that the matches give, such as where a doubted alignment ended.
        """
        found = self.alignments(features, align, self._retrieve(features, expected), expected, likely)
        return self._evidence(features, align).fixed(choose(found, self.settings, expected=expected))

    @torch.inference_mode()
    def agrees(self, features: BackboneFeatures, T_map_camera: Matrix) -> bool:
        """Whether as many of the image's matches agree with a pose as where the camera was expected."""
        views = self._references.best_overlapping(T_map_camera, self._camera, JUDGING_VIEWS)
        return self.matches(features).agreement(T_map_camera, views) >= self.settings.near_agreement

    @torch.inference_mode()
    def examine(
        self,
        features: BackboneFeatures,
        align: Align,
        alignment: Alignment,
        expected: Matrix | None = None,
    ) -> Alignment:
        """An alignment that nothing but its cost speaks for, failed if the image's matches or the motion contradict it.

        Args:
            features: of the image.
            align: refines starting poses and judges the result.
            alignment: that succeeded.
            expected: where the camera should be, if anything is known.
        """
        evidence = self._evidence(features, align)
        best = evidence.improved(alignment)
        doubt = self._doubt(evidence, best, expected)
        return replace(best, success=False, reason=doubt) if doubt else evidence.fixed(best)

    def _doubt(self, evidence: Evidence, alignment: Alignment, expected: Matrix | None) -> str:
        """What speaks against an alignment, or nothing."""
        s = self.settings
        agreement = evidence.agreement(alignment)
        if agreement < (s.sure_agreement if expected is None else s.near_agreement):
            return f"only {100 * agreement:.0f} % of the image's matches agree with the alignment"
        assert alignment.T_map_camera is not None
        if expected is not None and is_farther(alignment.T_map_camera, expected, s.plausible_m, s.plausible_deg):
            return "the alignment is not where the camera was going"
        return ""

    @torch.inference_mode()
    def alignments(
        self,
        features: BackboneFeatures,
        align: Align,
        retrieved: Sequence[int] | None = None,
        expected: Matrix | None = None,
        likely: Sequence[Matrix] = (),
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
            likely: poses to start from besides those that the matches give.
        """
        s = self.settings
        positions = self._retrieve(features) if retrieved is None else list(retrieved)
        matches = self.matches(features)
        evidence = self._evidence(features, align)
        one_by_one = {k: matches.one_by_one(k).alike(s.min_similarity) for k in positions}
        starts = self._starts.of(one_by_one, s.min_inliers)
        near = [align([T]) for T in likely]
        found = evidence.improvements(near) + [evidence.aligned(start) for start in starts]
        possible = [evidence.verified(r, s.sure_agreement / 2, in_context=False) for r in near + found]
        if evidence.is_sure(possible):
            return possible
        likeliest = positions[: s.matched + (s.near if expected is not None else 0)]
        in_context = {k: matches.in_context(k) for k in likeliest}
        # right more often than one by one: views from all around, if they show one place, fix a pose best
        further = self._starts.together(in_context, s.min_matched_inliers)
        for start in further + self._starts.of(in_context, s.min_matched_inliers):
            if all(is_farther(start, T, s.same_start_m, s.same_start_deg) for T in starts):
                starts.append(start)
                found.append(evidence.aligned(start))
        near += evidence.improvements(near)  # now that there are more matches
        verified = [evidence.verified(r, self._needed(r, expected), in_context=True) for r in near + found]
        return self._best_supported(matches, verified, expected)

    def _best_supported(
        self, matches: ImageMatches, alignments: Sequence[Alignment], expected: Matrix | None
    ) -> list[Alignment]:
        """Without those that clearly fewer of the matches in context speak for than for another.

        Where the camera was expected, the frames before speak, too, but only for the place: which of the alignments
        there is right, when they slid along a direction that few points fix, is for the matches to say.
        """
        support = [matches.supporting(r.T_map_camera) for r in alignments if r.T_map_camera is not None and r.success]
        possible = [r for r in alignments if r.T_map_camera is not None and r.success]

        def outdone(own: NDArray[np.bool_], alignment: Alignment) -> bool:
            everywhere = not self._is_expected(alignment, expected)
            return any(
                more_speak_for(other, own, self.settings)
                for other, r in zip(support, possible, strict=True)
                if everywhere or not distinct(r, alignment, self.settings)
            )

        reason = "more of the matches speak for another place"
        worse = {id(r) for own, r in zip(support, possible, strict=True) if outdone(own, r)}
        return [replace(r, success=False, reason=reason) if id(r) in worse else r for r in alignments]

    def _is_expected(self, alignment: Alignment, expected: Matrix | None) -> bool:
        return expected is not None and is_near(alignment, expected, self.settings)

    def _needed(self, alignment: Alignment, expected: Matrix | None) -> float:
        """Share of matches that have to agree with a pose."""
        s = self.settings
        if expected is None:
            return s.min_agreement
        return s.near_agreement if self._is_expected(alignment, expected) else s.far_agreement

    def matches(self, features: BackboneFeatures) -> ImageMatches:
        """Of an image with the map's views."""
        if self._matches is None or self._matches.features is not features:
            self._matches = ImageMatches(self._references, self._camera, features, self._context_matcher)
        return self._matches

    def _evidence(self, features: BackboneFeatures, align: Align) -> Evidence:
        return Evidence(self._references, self._camera, self.settings, self.matches(features), align)

    def _retrieve(self, features: BackboneFeatures, expected: Matrix | None = None) -> list[int]:
        """Positions of the views that an image may show, the likeliest first."""
        if self._index is None:
            self._index = ReferenceIndex(self._references)
        retrieved = [item.position for item in self._index.search(features, self.settings.retrieved)]
        if expected is None:
            return retrieved
        near = self._references.best_overlapping(expected, self._camera, self.settings.near)
        return near + [k for k in retrieved if k not in near]

    def _context_matcher(self) -> LighterGlue:
        if self._matcher is None:
            self._matcher = LighterGlue(device=self._references.views[0].points.device)
        return self._matcher


@dataclass(frozen=True, eq=False)
class _Supported:
    """A pose and how many cells of the image agree with it."""

    T_map_camera: Matrix
    support: int


class StartingPoses:
    """Solves matches with the reference views of a map for poses of a camera."""

    def __init__(self, references: ReferenceViews, camera: Camera, settings: RelocalizationSettings) -> None:
        self._references, self._camera, self._settings = references, camera, settings

    def of(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """Poses that the matches of views, the likeliest first, speak for, the best supported first."""
        chosen: list[Matrix] = []
        for place in sorted(self._supported(matches, min_inliers), key=lambda place: -place.support):
            near = (self._settings.same_start_m, self._settings.same_start_deg)
            if all(is_farther(place.T_map_camera, T, *near) for T in chosen):
                chosen.append(place.T_map_camera)
        return chosen[: self._settings.places]

    def together(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """The one pose that the matches of all views together speak for, if any."""
        place = self._solve(list(matches.values()), min_inliers)
        return [] if place is None else [place.T_map_camera]

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
