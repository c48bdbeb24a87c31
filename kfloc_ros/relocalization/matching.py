# SPDX-License-Identifier: Apache-2.0
"""Which map points an image shows: its matches with reference views, and how many of them agree with a pose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, BackboneFeatures
from kfloc_ros.features.lighterglue import LighterGlue, PointSet
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.pixloc.cost import project
from kfloc_ros.pixloc.references import ReferenceViews, query_points

QUERY_POINTS = 800
"""Points of the image that are matched in context."""
AGREEING_PX = 12.0
"""A match agrees with a pose that shows its point within this of its pixel; half as much again as a cell."""
SUPPORTING_PX = 6.0
"""The same where poses are compared with each other."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Pixels of an image with the map points that look most like them."""

    pixels: NDArray[np.float64]
    """(N, 2)"""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame."""
    similarity: NDArray[np.float64]
    """(N,) cosines of their features."""

    def alike(self, min_similarity: float) -> Matches:
        """Those that look alike."""
        kept = self.similarity > min_similarity
        return Matches(self.pixels[kept], self.points[kept], self.similarity[kept])

    @classmethod
    def concatenate(cls, parts: Sequence[Matches]) -> Matches:
        return cls(
            np.concatenate([m.pixels for m in parts]),
            np.concatenate([m.points for m in parts]),
            np.concatenate([m.similarity for m in parts]),
        )


class ImageMatches:
    """One image's matches with reference views, each made when it is first asked for.

    Args:
        references: the views.
        camera: of the image.
        features: of the image.
        matcher: gives the network that matches in context; asked only where that is wanted.
    """

    def __init__(
        self,
        references: ReferenceViews,
        camera: Camera,
        features: BackboneFeatures,
        matcher: Callable[[], LighterGlue],
    ) -> None:
        self._references, self._camera, self.features, self._matcher = references, camera, features, matcher
        self._one_by_one: dict[int, Matches] = {}
        self._in_context: dict[int, Matches] = {}
        self._query: PointSet | None = None

    @torch.inference_mode()
    def one_by_one(self, position: int) -> Matches:
        """Mutual nearest neighbours between a view's points and the image's cells."""
        if position not in self._one_by_one:
            view, grid = self._references.views[position], self.features.coarse[0].float()
            w = grid.shape[2]
            similarity = view.coarse.to(grid) @ grid.reshape(len(grid), -1)
            value, cell = similarity.max(dim=1)
            best_point = similarity[:, cell].argmax(dim=0)
            kept = best_point == torch.arange(len(cell), device=cell.device)
            chosen = cell[kept].cpu().numpy()
            pixels = np.stack([chosen % w, chosen // w], axis=1) * COARSE_STRIDE + (COARSE_STRIDE - 1) / 2
            points = view.points[kept.to(view.points.device)].cpu().double().numpy()
            self._one_by_one[position] = Matches(pixels.astype(np.float64), points, value[kept].cpu().double().numpy())
        return self._one_by_one[position]

    @torch.inference_mode()
    def in_context(self, position: int) -> Matches:
        """Matches with a view that were judged with their surroundings."""
        if position not in self._in_context:
            width, height = self._camera.width, self._camera.height
            if self._query is None:
                self._query = PointSet(*query_points(self.features, QUERY_POINTS), width, height)
            view = self._references.views[position]
            seen_from = inverse_pose(self._references.T_map_camera[position])
            points = view.points.cpu().double().numpy()
            pixels, _ = _project(points, seen_from, self._camera)
            query = self._query
            seen = PointSet(torch.from_numpy(pixels).to(query.pixels), view.coarse.to(query.features), width, height)
            pairs = self._matcher().match(seen, query).cpu().numpy()
            similarity = (seen.features[pairs[:, 0]] * query.features[pairs[:, 1]]).sum(dim=1)
            self._in_context[position] = Matches(
                query.pixels.cpu().double().numpy()[pairs[:, 1]],
                points[pairs[:, 0]],
                similarity.cpu().double().numpy(),
            )
        return self._in_context[position]

    def with_views(self, positions: Sequence[int], min_similarity: float) -> Matches:
        """Those one by one with some views that look alike, and all in context that were made so far."""
        one_by_one = [self.one_by_one(k).alike(min_similarity) for k in positions]
        return Matches.concatenate([*one_by_one, *self._in_context.values()])

    def agreement(self, T_map_camera: Matrix, positions: Iterable[int]) -> float:
        """Share of the matches, one by one, of points in view that agree with a pose; 0 if there are none.

        Chance hardly ever agrees: one of thousands of cells was chosen, and lies within a cell and a half of where the
        pose shows the point. A pose found by alignment has not seen the other cells.
        """
        agreeing, seen, _ = self._count((self.one_by_one(k) for k in positions), T_map_camera)
        return agreeing / max(seen, 1)

    def agreement_in_context(self, T_map_camera: Matrix, positions: Iterable[int]) -> float:
        """The same of the matches in context, of which those out of view speak against the pose."""
        agreeing, _, made = self._count((self.in_context(k) for k in positions), T_map_camera)
        return agreeing / max(made, 1)

    def supporting(self, T_map_camera: Matrix) -> NDArray[np.bool_]:
        """Which of all matches in context that were made so far speak for a pose; compares poses of one image."""
        if not self._in_context:
            return np.zeros(0, dtype=bool)
        matches = Matches.concatenate(list(self._in_context.values()))
        pixels, inside = _project(matches.points, inverse_pose(T_map_camera), self._camera)
        return np.asarray(inside & (np.linalg.norm(pixels - matches.pixels, axis=1) < SUPPORTING_PX))

    def _count(self, parts: Iterable[Matches], T_map_camera: Matrix) -> tuple[int, int, int]:
        """Matches that agree with a pose, those in view, and all."""
        agreeing = in_view = made = 0
        T_camera_map = inverse_pose(T_map_camera)
        for matches in parts:
            pixels, inside = _project(matches.points, T_camera_map, self._camera)
            agreeing += int((inside & (np.linalg.norm(pixels - matches.pixels, axis=1) < AGREEING_PX)).sum())
            in_view += int(inside.sum())
            made += len(inside)
        return agreeing, in_view, made


def _project(
    points: NDArray[np.float64], T_camera_map: Matrix, camera: Camera
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Pixels (N, 2) of map points, and whether they are in view."""
    at, _, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_map), camera, 1.0)
    pixels = at.numpy()
    inside = np.all((pixels > 0) & (pixels < [camera.width - 1, camera.height - 1]), axis=1)
    return pixels, inside & in_front.numpy()
