# SPDX-License-Identifier: Apache-2.0
"""Reference views with the evidence of a recording's images, of all of them or without those near a place.

A pose near the recorded images profits from their evidence: its image resembles those that the points were checked
with. How large errors are away from all images, only references tell that were checked without the images near the
pose.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.point_depths import Curve, DepthUse
from kfloc_ros.mapping.point_evidence import PointEvidence, evenly
from kfloc_ros.mapping.views import View
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.patches import PatchSettings
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, view_distances

_KEPT_CURVES, _KEPT_POINTS = 2048, 512
"""Curves (20 kB each) and checked views that stay for the next pose, as neighbouring poses need mostly the same."""


class CheckedReferences:
    """Reference views checked with all images of their recording, and with those alone that are away from a place.

    Args:
        evidence: images of the recording.
        given: views as they were taken.
        views: the same, checked with all images.
        use: what the depths found are good for in this map.
        spread: views evenly over the recording, to be aligned without what is near them.
    """

    def __init__(
        self,
        evidence: PointEvidence,
        given: ReferenceViews,
        views: ReferenceViews,
        use: DepthUse,
        spread: Sequence[View],
    ) -> None:
        self.views, self.spread, self._evidence, self._given, self._use = views, spread, evidence, given, use
        self._curve = lru_cache(_KEPT_CURVES)(self._curve_of)
        self._points = lru_cache(_KEPT_POINTS)(self._points_by)

    @classmethod
    def of(cls, evidence: PointEvidence, given: ReferenceViews) -> CheckedReferences:
        """Check views with all images."""
        placed, use = evidence.placed_and_use(given)
        return cls(evidence, given, evidence.weighed(placed), use, evidence.spread)

    def first(self, count: int) -> CheckedReferences:
        """Return the first of the views."""
        given, views = (part.selected(range(count)) for part in (self._given, self.views))
        return CheckedReferences(self._evidence, given, views, self._use, self.spread)

    def with_spread(self, count: int) -> CheckedReferences:
        """Return the same with at most so many views over the recording, for lack of time."""
        return CheckedReferences(self._evidence, self._given, self.views, self._use, evenly(self.spread, count))

    def away_from(self, T_map_camera: Matrix, least_m: float) -> ReferenceViews | None:
        """Return the views that a camera is aligned with if no image were within a distance; None without any.

        Args:
            T_map_camera: pose of the camera, (4, 4).
            least_m: smallest distance (``view_distances``) of reference views, and of the images they are checked with.
        """
        far = np.flatnonzero(view_distances(self.views.T_map_camera, T_map_camera) >= least_m)
        if not len(far):
            return None
        others, camera, patches = self._given.selected([int(k) for k in far]), self._evidence.camera, PatchSettings()
        used = set(others.overlapping(T_map_camera, camera, RefinerSettings().num_references))
        if least_m < patches.farthest_m:
            used |= set(others.nearest(T_map_camera, patches.max_views))
        numbers = [int(far[k]) for k in sorted(used)]

        def points(k: int) -> ReferencePoints:
            return self._points(k, self._evidence.searched_away(self._given.T_map_camera[k], T_map_camera, least_m))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "evidence") as pool:
            return replace(self._given.selected(numbers), views=tuple(pool.map(points, numbers)))

    def _curve_of(self, k: int, n: int) -> Curve:
        return self._evidence.curve(self._given.views[k], self._given.T_map_camera[k], n)

    def _points_by(self, k: int, images: tuple[tuple[int, ...], tuple[int, ...]]) -> ReferencePoints:
        view, T = self._given.views[k], self._given.T_map_camera[k]
        return self._evidence.checked_by(view, T, self._use, partial(self._curve, k), images)
