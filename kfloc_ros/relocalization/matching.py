# SPDX-License-Identifier: Apache-2.0
"""Matches of an image with reference views, and the share of them that agrees with a pose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import linear
from kfloc_ros.features.backbone import COARSE_STRIDE, BackboneFeatures
from kfloc_ros.features.lighterglue import LighterGlue, OwnContext, PointSet
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.pixloc.cost import project
from kfloc_ros.pixloc.references import ReferenceViews, query_points

QUERY_POINTS = 800
"""Points of the image that LightGlue matches."""
AGREEING_PX = 12.0
"""Largest reprojection error of a match that agrees with a pose; one and a half cells."""
SUPPORTING_PX = 6.0
"""Largest reprojection error of a match that supports a pose, where poses are compared with each other."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Pixels of an image with the map points that look most like them."""

    pixels: NDArray[np.float64]
    """(N, 2)"""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame."""
    similarity: NDArray[np.float64]
    """(N,) cosines of the features of point and pixel."""

    def similar(self, min_similarity: float) -> Matches:
        """Return the matches above a similarity."""
        kept = self.similarity > min_similarity
        return Matches(self.pixels[kept], self.points[kept], self.similarity[kept])

    @classmethod
    def concatenate(cls, parts: Sequence[Matches]) -> Matches:
        """Return the matches of several views as one set."""
        return cls(
            np.concatenate([m.pixels for m in parts]),
            np.concatenate([m.points for m in parts]),
            np.concatenate([m.similarity for m in parts]),
        )


class ImageMatches:
    """Matches of one image with reference views; each set is computed on first use and kept.

    Args:
        references: the views.
        camera: pinhole camera of the image.
        features: backbone features of the image.
        matcher: returns the LightGlue network; called only if LightGlue matches are needed.
    """

    def __init__(
        self,
        references: ReferenceViews,
        camera: Camera,
        features: BackboneFeatures,
        matcher: Callable[[], LighterGlue],
    ) -> None:
        self._references, self._camera, self.features, self._matcher = references, camera, features, matcher
        self._mutual_nearest: dict[int, Matches] = {}
        self._lightglue: dict[int, Matches] = {}
        self._query: PointSet | None = None
        self._query_context: OwnContext | None = None

    @torch.inference_mode()
    def mutual_nearest(self, position: int) -> Matches:
        """Return the mutual nearest neighbours between a view's points and the image's cells."""
        if position not in self._mutual_nearest:
            view, grid = self._references.views[position], self.features.coarse[0].float()
            cell, value, kept = mutual_nearest(view.coarse, grid)
            pixels = cell_centres(cell[kept], grid.shape[2])
            points = view.points[kept.to(view.points.device)].cpu().double().numpy()
            self._mutual_nearest[position] = Matches(pixels, points, value[kept].cpu().double().numpy())
        return self._mutual_nearest[position]

    @torch.inference_mode()
    def lightglue(self, position: int) -> Matches:
        """Return the LightGlue matches with a view."""
        if position not in self._lightglue:
            width, height = self._camera.width, self._camera.height
            if self._query is None:
                self._query = PointSet(*query_points(self.features, QUERY_POINTS), width, height)
            view = self._references.views[position]
            seen_from = inverse_pose(self._references.T_map_camera[position])
            points = view.points.cpu().double().numpy()
            pixels, _ = _project(points, seen_from, self._camera)
            query, matcher = self._query, self._matcher()
            if self._query_context is None:
                self._query_context = matcher.own_context(query)
            seen = PointSet(torch.from_numpy(pixels).to(query.pixels), view.coarse.to(query.features), width, height)
            pairs = matcher.match(matcher.own_context(seen), self._query_context).cpu().numpy()
            similarity = (seen.features[pairs[:, 0]] * query.features[pairs[:, 1]]).sum(dim=1)
            self._lightglue[position] = Matches(
                query.pixels.cpu().double().numpy()[pairs[:, 1]],
                points[pairs[:, 0]],
                similarity.cpu().double().numpy(),
            )
        return self._lightglue[position]

    def with_views(self, positions: Sequence[int], min_similarity: float) -> Matches:
        """Return similar mutual nearest neighbours with some views, and all LightGlue matches computed so far."""
        mutual_nearest = [self.mutual_nearest(k).similar(min_similarity) for k in positions]
        return Matches.concatenate([*mutual_nearest, *self._lightglue.values()])

    def agreement(self, T_map_camera: Matrix, positions: Iterable[int]) -> float:
        """Return the share of mutual nearest neighbours, among points in view, that agree with a pose; 0 if there are
        none.

        A chance agreement is rare: one of thousands of cells was chosen, and it must lie within a cell and a half of
        the projected point. The evidence is independent: an alignment does not use the other cells.
        """
        agreeing, seen, _ = self._count((self.mutual_nearest(k) for k in positions), T_map_camera)
        return agreeing / max(seen, 1)

    def lightglue_agreement(self, T_map_camera: Matrix, positions: Iterable[int]) -> float:
        """Return the share of LightGlue matches that agree with a pose; those out of view count against the pose."""
        agreeing, _, made = self._count((self.lightglue(k) for k in positions), T_map_camera)
        return agreeing / max(made, 1)

    def supporting(self, T_map_camera: Matrix) -> NDArray[np.bool_]:
        """Return (M,) bool, true for each LightGlue match so far that supports a pose; for comparing poses of one
        image.
        """
        if not self._lightglue:
            return np.zeros(0, dtype=bool)
        matches = Matches.concatenate(list(self._lightglue.values()))
        pixels, inside = _project(matches.points, inverse_pose(T_map_camera), self._camera)
        return np.asarray(inside & (np.linalg.norm(pixels - matches.pixels, axis=1) < SUPPORTING_PX))

    def _count(self, parts: Iterable[Matches], T_map_camera: Matrix) -> tuple[int, int, int]:
        """Return the numbers of matches that agree with a pose, that are in view, and of all."""
        agreeing = in_view = made = 0
        T_camera_map = inverse_pose(T_map_camera)
        for matches in parts:
            pixels, inside = _project(matches.points, T_camera_map, self._camera)
            agreeing += int((inside & (np.linalg.norm(pixels - matches.pixels, axis=1) < AGREEING_PX)).sum())
            in_view += int(inside.sum())
            made += len(inside)
        return agreeing, in_view, made


def mutual_nearest(features: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the most similar cell of each point, and whether no other point is more similar to that cell.

    Args:
        features: (N, C) unit features of the points.
        grid: (C, h, w) unit features of an image.

    Returns:
        Indices (N,) of cells, row by row; cosines (N,); and (N,) bool, true for mutual nearest neighbours.
    """
    similarity = linear(features.to(grid), grid.reshape(len(grid), -1).t())
    if similarity.device.type == "cpu":  # a tenth of the time of torch's
        cell = torch.from_numpy(similarity.numpy().argmax(axis=1))
    else:
        cell = similarity.argmax(dim=1)
    best_point = similarity[:, cell].argmax(dim=0)
    kept = best_point == torch.arange(len(cell), device=cell.device)
    return cell, similarity.gather(1, cell[:, None])[:, 0], kept


def similar_cells(
    rows: torch.Tensor, features: BackboneFeatures, min_similarity: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the pixels (M, 2) of an image's cells that are similar mutual nearest neighbours of points, and (N,) bool,
    true for their points.

    Args:
        rows: (N, 64) coarse unit features of the points.
        features: backbone features of the image.
        min_similarity: smallest cosine.
    """
    grid = features.coarse[0].float()
    cell, value, kept = mutual_nearest(rows, grid)
    kept &= value > min_similarity
    return cell_centres(cell[kept], grid.shape[2]), kept.cpu().numpy()


def cell_centres(cells: torch.Tensor, width: int) -> NDArray[np.float64]:
    """Return the pixels (N, 2) at the centres of cells (N,) of a grid with so many columns."""
    chosen = cells.cpu().numpy()
    return np.stack([chosen % width, chosen // width], axis=1) * COARSE_STRIDE + (COARSE_STRIDE - 1) / 2


def _project(
    points: NDArray[np.float64], T_camera_map: Matrix, camera: Camera
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return pixels (N, 2) of map points, and (N,) bool, true for points in view."""
    at, _, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_map), camera, 1.0)
    pixels = at.numpy()
    inside = np.all((pixels > 0) & (pixels < [camera.width - 1, camera.height - 1]), axis=1)
    return pixels, inside & in_front.numpy()
