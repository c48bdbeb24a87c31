# SPDX-License-Identifier: Apache-2.0
"""Relocalization of one image: retrieve reference views, match their points, solve PnP, align, verify by the
matches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.features.lighterglue import LighterGlue
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, is_farther
from kfloc_ros.kfnet.pnp import absolute_pose
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.relocalization.decision import RelocalizationSettings, choose, distinct, has_more_support, is_near
from kfloc_ros.relocalization.evidence import VERIFYING_VIEWS, Align, Evidence
from kfloc_ros.relocalization.matching import ImageMatches, Matches
from kfloc_ros.relocalization.retrieval import ReferenceIndex, Retrieved
from kfloc_ros.types import Alignment


class Relocalizer:
    """Search for the pose of an image from the image alone; the retrieval index is built on first use.

    Args:
        references: reference views of the map.
        camera: pinhole camera of the images.
        settings: extent of the search, and conditions for accepting a pose.
    """

    def __init__(
        self, references: ReferenceViews, camera: Camera, settings: RelocalizationSettings | None = None
    ) -> None:
        self._references, self._camera, self.settings = references, camera, settings or RelocalizationSettings()
        self._starts = StartingPoses(references, camera, self.settings)
        self._index: ReferenceIndex | None = None
        self._matcher: LighterGlue | None = None
        self._matches: ImageMatches | None = None
        """Matches of the last image, shared by :meth:`examine` and a search that follows."""

    def find(
        self,
        features: BackboneFeatures,
        align: Align,
        expected: Matrix | None = None,
        likely: Sequence[Matrix] = (),
        among: Sequence[int] | None = None,
    ) -> Alignment:
        """Find the pose of an image in the whole map, or among some of its views.

        Args:
            features: backbone features of the image.
            align: aligner of the image.
            expected: expected pose ``T_map_camera`` (4, 4), if any. The search still covers the whole map, but a pose
                elsewhere needs more evidence.
            likely: further starting poses, such as the end of a rejected alignment.
            among: positions of the views to search; None: all.

        Returns:
            The alignment; a failed one, with the reason, if the image fits no place or several.
        """
        found = self.alignments(features, align, self._retrieve(features, expected, among), expected, likely)
        return self._evidence(features, align).constrained(choose(found, self.settings, expected=expected))

    @torch.inference_mode()
    def agrees(self, features: BackboneFeatures, T_map_camera: Matrix) -> bool:
        """Return true if as many matches agree with a pose as are needed near the expected pose."""
        views = self._references.best_overlapping(T_map_camera, self._camera, VERIFYING_VIEWS)
        return self.matches(features).agreement(T_map_camera, views) >= self.settings.near_agreement

    @torch.inference_mode()
    def examine(
        self,
        features: BackboneFeatures,
        align: Align,
        alignment: Alignment,
        expected: Matrix | None = None,
    ) -> Alignment:
        """Check an alignment that only its cost supports; it fails if the image's matches or the motion contradict it.

        Args:
            features: backbone features of the image.
            align: aligner of the image.
            alignment: a successful one.
            expected: expected pose ``T_map_camera`` (4, 4), if any.
        """
        evidence = self._evidence(features, align)
        best = evidence.improved(alignment)
        reason = self._contradiction(evidence, best, expected)
        return replace(best, success=False, reason=reason) if reason else evidence.constrained(best)

    def _contradiction(self, evidence: Evidence, alignment: Alignment, expected: Matrix | None) -> str:
        """Return the reason against an alignment, or an empty string."""
        s = self.settings
        agreement = evidence.agreement(alignment)
        if agreement < (s.certain_agreement if expected is None else s.near_agreement):
            return f"only {100 * agreement:.0f} % of the image's matches agree with the alignment"
        assert alignment.T_map_camera is not None
        if expected is not None and is_farther(alignment.T_map_camera, expected, s.plausible_m, s.plausible_deg):
            return "the alignment is too far from the predicted pose"
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
        """Return alignments at all places that the image may show; those that its matches contradict have failed.

        Mutual nearest neighbours come first, since they are fast. Only if they give no certain pose, LightGlue matches
        the views nearest to it and, if that is not certain either, the best-ranked views.

        Args:
            features: backbone features of the image.
            align: aligner of the image.
            retrieved: positions of views that the image may show, best first; None: retrieve them from the whole map.
            expected: expected pose ``T_map_camera`` (4, 4), if any.
            likely: further starting poses.
        """
        s = self.settings
        positions = self._retrieve(features) if retrieved is None else list(retrieved)
        matches = self.matches(features)
        evidence = self._evidence(features, align)
        mutual_nearest = {k: matches.mutual_nearest(k).similar(s.min_similarity) for k in positions}
        starts = self._starts.from_views(mutual_nearest, s.min_inliers)
        near = [align([T]) for T in likely]
        found = evidence.improvements(near) + [evidence.aligned(start) for start in starts]
        possible = [evidence.verified(r, s.certain_agreement / 2, with_lightglue=False) for r in near + found]
        if evidence.is_certain(possible) or evidence.is_certain(possible, with_lightglue=True):
            return possible
        likeliest = positions[: s.matched + (s.near if expected is not None else 0)]
        lightglue = {k: matches.lightglue(k) for k in likeliest}
        # LightGlue matches are right more often: if views from all around show one place, a joint PnP is the best one
        further = self._starts.from_all_views(lightglue, s.min_matched_inliers)
        for start in further + self._starts.from_views(lightglue, s.min_matched_inliers):
            if all(is_farther(start, T, s.same_start_m, s.same_start_deg) for T in starts):
                starts.append(start)
                found.append(evidence.aligned(start))
        near += evidence.improvements(near)  # LightGlue has added matches
        verified = [
            evidence.verified(r, self._required_agreement(r, expected), with_lightglue=True) for r in near + found
        ]
        return self._best_supported(matches, verified, expected)

    def _best_supported(
        self, matches: ImageMatches, alignments: Sequence[Alignment], expected: Matrix | None
    ) -> list[Alignment]:
        """Return the alignments; those fail that have significantly fewer LightGlue inliers than another.

        Near the expected pose the previous frames decide the place, and the matches decide between alignments of that
        place: an alignment can slide along a direction that few points constrain.
        """
        support = [matches.supporting(r.T_map_camera) for r in alignments if r.T_map_camera is not None and r.success]
        possible = [r for r in alignments if r.T_map_camera is not None and r.success]

        def is_outvoted(own: NDArray[np.bool_], alignment: Alignment) -> bool:
            everywhere = not self._is_expected(alignment, expected)
            return any(
                has_more_support(other, own, self.settings)
                for other, r in zip(support, possible, strict=True)
                if everywhere or not distinct(r, alignment, self.settings)
            )

        reason = "more matches support another place"
        worse = {id(r) for own, r in zip(support, possible, strict=True) if is_outvoted(own, r)}
        return [replace(r, success=False, reason=reason) if id(r) in worse else r for r in alignments]

    def _is_expected(self, alignment: Alignment, expected: Matrix | None) -> bool:
        return expected is not None and is_near(alignment, expected, self.settings)

    def _required_agreement(self, alignment: Alignment, expected: Matrix | None) -> float:
        """Return the share of matches that must agree with a pose."""
        s = self.settings
        if expected is None:
            return s.min_agreement
        return s.near_agreement if self._is_expected(alignment, expected) else s.far_agreement

    def matches(self, features: BackboneFeatures) -> ImageMatches:
        """Return the matches of an image with the map's views, shared by all calls for the same image."""
        if self._matches is None or self._matches.features is not features:
            self._matches = ImageMatches(self._references, self._camera, features, self._lightglue_matcher)
        return self._matches

    def _evidence(self, features: BackboneFeatures, align: Align) -> Evidence:
        return Evidence(self._references, self._camera, self.settings, self.matches(features), align)

    @torch.inference_mode()
    def likeness(self, features: BackboneFeatures) -> tuple[float, int]:
        """Return how much an image resembles the most similar views of the map, and the position of the first of them.

        The likeness is the sum of their votes: near 0 for an image without texture, or of what no view shows.
        """
        retrieved = self._views_like(features, None)
        return sum(item.votes for item in retrieved), retrieved[0].position

    def _views_like(self, features: BackboneFeatures, among: Sequence[int] | None) -> list[Retrieved]:
        if self._index is None:
            self._index = ReferenceIndex(self._references)
        return self._index.search(features, self.settings.retrieved, among)

    def _retrieve(
        self, features: BackboneFeatures, expected: Matrix | None = None, among: Sequence[int] | None = None
    ) -> list[int]:
        """Return positions of the views that an image may show, best first."""
        retrieved = [item.position for item in self._views_like(features, among)]
        if expected is None:
            return retrieved
        near = self._references.best_overlapping(expected, self._camera, self.settings.near)
        return near + [k for k in retrieved if k not in near]

    def _lightglue_matcher(self) -> LighterGlue:
        if self._matcher is None:
            self._matcher = LighterGlue(device=self._references.views[0].points.device)
        return self._matcher


@dataclass(frozen=True, eq=False)
class _Hypothesis:
    """Pose hypothesis with the number of image cells that support it."""

    T_map_camera: Matrix
    support: int


class StartingPoses:
    """Solver of PnP for matches with a map's reference views."""

    def __init__(self, references: ReferenceViews, camera: Camera, settings: RelocalizationSettings) -> None:
        self._references, self._camera, self._settings = references, camera, settings

    def from_views(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """Return poses from the matches of views, given best first; the best supported pose comes first."""
        chosen: list[Matrix] = []
        for place in sorted(self._hypotheses(matches, min_inliers), key=lambda place: -place.support):
            near = (self._settings.same_start_m, self._settings.same_start_deg)
            if all(is_farther(place.T_map_camera, T, *near) for T in chosen):
                chosen.append(place.T_map_camera)
        return chosen[: self._settings.places]

    def from_all_views(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """Return the one pose from the matches of all views together; empty if there is none."""
        place = self._solve(list(matches.values()), min_inliers)
        return [] if place is None else [place.T_map_camera]

    def _hypotheses(self, matches: Mapping[int, Matches], min_inliers: int) -> Iterator[_Hypothesis]:
        """Solve for each view that is in no earlier group: once with its group, once alone.

        The views of a group see one place and support each other. If one view alone shows what the image shows, the
        wrong matches of the others would outnumber its matches.
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

    def _solve(self, parts: Sequence[Matches], min_inliers: int) -> _Hypothesis | None:
        pixels = np.concatenate([m.pixels for m in parts])
        points = np.concatenate([m.points for m in parts])
        if len(pixels) < min_inliers:
            return None
        # RANSAC near the group, for precision: a map may lie kilometres from its own origin
        origin = points.mean(axis=0)
        limit_px = self._settings.max_error_px
        T_camera_local, inliers = absolute_pose(pixels, points - origin, self._camera, limit_px, max_iterations=3000)
        inlier_cells = {tuple(p) for p in pixels[inliers]}
        if len(inlier_cells) < min_inliers:
            return None
        T_map_camera = inverse_pose(T_camera_local)
        T_map_camera[:3, 3] += origin
        return _Hypothesis(T_map_camera, len(inlier_cells))
