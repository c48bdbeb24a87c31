# SPDX-License-Identifier: Apache-2.0
"""What one image's matches say about alignments: whether they are right, and where exactly they should end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.fix_choice import FirstFixSettings, cost_of, settled
from kfloc_ros.mapping.view_matching import ImageMatches, Matches
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.solvers.weak_directions import pose_by_matches, with_matches
from kfloc_ros.types import Alignment

Align = Callable[[Sequence[Matrix]], Alignment]
"""Refines starting poses of one image and judges the result."""

JUDGING_VIEWS = 3
"""Reference views whose matches a found pose is judged by."""
DRAWING_VIEWS = 6
"""Reference views whose matches a pose is drawn by."""

SURE_M = 0.05
"""Standard deviation in the worst direction below which an alignment is fixed well."""


class Evidence:
    """The matches of one image, asked about alignments of it.

    Args:
        references: of the map.
        camera: of the image.
        settings: when a place counts as found.
        matches: of the image.
        align: aligns the image.
    """

    def __init__(
        self,
        references: ReferenceViews,
        camera: Camera,
        settings: FirstFixSettings,
        matches: ImageMatches,
        align: Align,
    ) -> None:
        self._references, self._camera, self._settings = references, camera, settings
        self._matches, self._align = matches, align

    def aligned(self, start: Matrix) -> Alignment:
        """From a pose that the matches gave, repeated from where it ends and from where they then say."""
        first = settled(self._align, self._align([start]))
        return self.improved(first) if first.success else first

    def improved(self, alignment: Alignment) -> Alignment:
        """The alignment, or one from the pose near it that most matches agree with, if that costs less.

        An alignment sees a few pixels around each point and stops in the nearest valley; the matches see the whole
        image.
        """
        if alignment.T_map_camera is None:
            return alignment
        drawing = self._drawing(alignment.T_map_camera)
        start = pose_by_matches(drawing.pixels, drawing.points, self._camera, alignment.T_map_camera)
        if start is None:
            return alignment
        other = self._align([start])
        better = other.success and (not alignment.success or other.final_cost < alignment.final_cost)
        return other if better else alignment

    def improvements(self, alignments: Sequence[Alignment]) -> list[Alignment]:
        """Those better than one of the alignments; they do not replace it, since they may be elsewhere."""
        better = ((r, self.improved(r)) for r in alignments)
        return [new for old, new in better if new is not old]

    def fixed(self, alignment: Alignment) -> Alignment:
        """The alignment with the matches' say in directions that it leaves open."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        drawing = self._drawing(alignment.T_map_camera)
        return with_matches(alignment, drawing.pixels, drawing.points, self._camera)

    def agreement(self, alignment: Alignment) -> float:
        """Share of the matches one by one that agree with it."""
        assert alignment.T_map_camera is not None
        return self._matches.agreement(alignment.T_map_camera, self._judging(alignment))

    def verified(self, alignment: Alignment, min_agreement: float, *, in_context: bool) -> Alignment:
        """The alignment, failed if the matches contradict it."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        agreement = self.agreement(alignment)
        if in_context:
            other = self._matches.agreement_in_context(alignment.T_map_camera, self._judging(alignment))
            agreement = (agreement + other) / 2
        if agreement >= min_agreement:
            return alignment
        return replace(alignment, success=False, reason=f"only {100 * agreement:.0f} % of the matches agree with it")

    def is_sure(self, alignments: Sequence[Alignment]) -> bool:
        """Whether the likeliest place is beyond doubt: many matches agree, and they fix it in every direction."""
        best = min((r for r in alignments if r.success), key=cost_of, default=None)
        if best is None or best.final_cost > self._settings.max_cost or best.covariance is None:
            return False
        largest_m2 = float(np.linalg.eigvalsh(best.covariance[:3, :3])[-1])
        return largest_m2 < SURE_M**2 and self.agreement(best) >= self._settings.sure_agreement

    def _judging(self, alignment: Alignment) -> list[int]:
        """Views that a pose is judged by: the best of those that it was aligned with."""
        assert alignment.T_map_camera is not None
        return self._references.best_overlapping(alignment.T_map_camera, self._camera, JUDGING_VIEWS)

    def _drawing(self, T_map_camera: Matrix) -> Matches:
        views = self._references.best_overlapping(T_map_camera, self._camera, DRAWING_VIEWS)
        return self._matches.with_views(views, self._settings.min_similarity)
