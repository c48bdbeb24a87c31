# SPDX-License-Identifier: Apache-2.0
"""Evidence of other views for the reference points of a map: their depths, and less confidence if found elsewhere.

A depth camera is off by one or two percent, differently near and far. Other views tell depths, see
:mod:`kfloc_ros.mapping.point_depths`. If two halves of the views do not agree on the depths, these stay: the poses are
at fault.

A corner where the edge of a near surface crosses a line of a far one is no point of the scene; nor are reflections, or
points whose depth is wrong. One view does not tell them from others. In other views of the recording they are found
beside the place where the map says they are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.mapping.point_depths import Curve, DepthSearch, DepthSettings, DepthUse, PointDepths, use_of
from kfloc_ros.mapping.views import DEPTH_AGREES, DEPTH_AGREES_M, View
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.point_matching import fit_pose, search_points
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, view_distances

Item = TypeVar("Item")


@dataclass(frozen=True)
class EvidenceSettings:
    """Choice of the views, and the weight of what they show."""

    max_views: int = 512
    """Views whose features are kept (0.8 MB each); of longer recordings, every second, fourth and so on."""
    per_reference: int = 8
    """Views in which the points of a reference view are searched: the nearest of the others."""
    least_distance_m: float = 0.08
    """Smallest distance of these views, see ``view_distances``: an apparent corner stays in place without parallax."""
    scale_px: float = 4.0
    """Error of a match at which it counts a quarter."""
    prior_found: float = 1.5
    prior_agreeing: float = 1.0
    """Matches, and agreeing ones among them, that every point is taken to have had."""
    spread: int = 48
    """Views all over the recording that are kept, to be aligned without what is near them; at most twice as many."""


class Thinned(Generic[Item]):
    """Items evenly over a sequence of unknown length: all, every second, fourth and so on.

    Args:
        limit: largest number of items.
    """

    def __init__(self, limit: int) -> None:
        self.items: list[Item] = []
        self._limit, self._seen, self.step = limit, 0, 1

    def wants_next(self) -> bool:
        """Return True if the next item of the sequence is to be kept."""
        self._seen += 1
        return (self._seen - 1) % self.step == 0

    def keep(self, item: Item) -> None:
        """Keep the item that was wanted."""
        self.items.append(item)
        if len(self.items) > self._limit:
            self.items, self.step = self.items[::2], 2 * self.step


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most so many of the items, evenly."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


@dataclass(frozen=True, eq=False)
class _Image:
    T_map_camera: Matrix
    grey: NDArray[np.uint8]
    """(H, W)"""
    coarse: torch.Tensor
    """(h, w, 64) int8, of unit features"""
    fine: torch.Tensor
    """(2 h, 2 w, 24) int8"""
    farthest_m: NDArray[np.float32]
    """(h, w) largest depth in and around each cell; infinite where it is not known."""

    def levels(self) -> tuple[FeatureImage, FeatureImage]:
        """Return the features as they are sampled."""
        return _level(self.coarse, COARSE_STRIDE), _level(self.fine, FINE_STRIDE)


class PointEvidence:
    """Views of a recording that are searched for the reference points of its map.

    Args:
        camera: camera of the map.
        settings: choice of the views; None: the defaults.
        depths: search of the points' depths; None: the defaults.
    """

    def __init__(
        self, camera: Camera, settings: EvidenceSettings | None = None, depths: DepthSettings | None = None
    ) -> None:
        self.camera, self._settings, self._search = camera, settings or EvidenceSettings(), DepthSearch(camera, depths)
        self._images = Thinned[_Image](self._settings.max_views)
        self._spread = Thinned[View](2 * self._settings.spread)

    def add(self, view: View, features: BackboneFeatures) -> None:
        """Keep a view, thinned over the recording."""
        if self._spread.wants_next():
            self._spread.keep(view)
        if self._images.wants_next():
            coarse, fine = (_stored(maps[0]) for maps in (features.coarse, features.fine))
            grey = np.asarray(cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY))
            self._images.keep(_Image(view.T_map_camera, grey, coarse, fine, _farthest(view.depth_m)))

    @property
    def spread(self) -> list[View]:
        """Views evenly over the recording."""
        return evenly(self._spread.items, self._settings.spread)

    @property
    def _poses(self) -> NDArray[np.float64]:
        """Poses of the images, (K, 4, 4)."""
        return np.array([image.T_map_camera for image in self._images.items]).reshape(-1, 4, 4)

    def placed(self, references: ReferenceViews) -> ReferenceViews:
        """Return the views with their points at the depths at which the points' patches fit the other views best.

        Patches that hardly any other view agrees with, at any depth, are left out; all of them, if that is so for the
        map as a whole, since its poses are then off by pixels. Depths stay if halves of the other views do not agree.
        """
        return self.placed_and_use(references)[0]

    def placed_and_use(self, references: ReferenceViews) -> tuple[ReferenceViews, DepthUse]:
        """Return the placed views, and what the depths found are good for in this map."""
        poses, search = self._poses, self._search

        def told(view: ReferencePoints, T: Matrix) -> PointDepths:
            return search.told(view, lambda n: self.curve(view, T, n), search.searched(poses, T))

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "depths") as pool:
            found = list(pool.map(told, references.views, references.T_map_camera))
        use = use_of(found, search.settings)
        if use is DepthUse.GIVEN:
            return references, use
        items = zip(found, references.views, references.T_map_camera, strict=True)
        return replace(references, views=tuple(self._placed(*item, use) for item in items)), use

    def curve(self, view: ReferencePoints, T_map_camera: Matrix, n: int) -> Curve:
        """Return the dissimilarity of a view's patches in one image at all depths."""
        image = self._images.items[n]
        return self._search.curve(view, T_map_camera, image.grey, image.T_map_camera)

    def _placed(
        self, depths: PointDepths, view: ReferencePoints, T_map_camera: Matrix, use: DepthUse
    ) -> ReferencePoints:
        """Return the points of one view at depths that were found, if these are of use."""
        if use is DepthUse.NO_PATCHES:
            return replace(view, patches=None)
        return depths.applied(view, T_map_camera, self._search.settings) if use is DepthUse.FOUND else view

    def searched_away(
        self, T_map_camera: Matrix, T_map_place: Matrix, least_m: float
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the images for the depths of a view's points, and for their matches, without those near a place."""
        poses = self._poses
        allowed = view_distances(poses, T_map_place) >= least_m
        depths = self._search.searched(poses, T_map_camera, allowed)
        return tuple(depths), tuple(self._searched(poses, T_map_camera, allowed))

    def checked_by(
        self,
        view: ReferencePoints,
        T_map_camera: Matrix,
        use: DepthUse,
        curve_of: Callable[[int], Curve],
        images: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> ReferencePoints:
        """Return the points of one view, placed and weighed by some images alone, see :meth:`searched_away`."""
        for_depths, for_matches = images
        if use is not DepthUse.GIVEN:
            depths = self._search.told(view, curve_of, for_depths if use is DepthUse.FOUND else ())
            view = self._placed(depths, view, T_map_camera, use)
        found, agreeing = torch.zeros(len(view)), torch.zeros(len(view))
        for n in for_matches:
            was_found, agrees = self._matches(view, self._images.items[n])
            found, agreeing = found + was_found, agreeing + agrees
        return self._with_share(view, found, agreeing)

    def weighed(self, references: ReferenceViews) -> ReferenceViews:
        """Return the views with the confidence of each point times the squared share of its matches that agree."""
        if not self._images.items:
            return references
        poses = self._poses
        found, agreeing = ([torch.zeros(len(view)) for view in references.views] for _ in range(2))
        views_of: dict[int, list[int]] = {}
        for k, T in enumerate(references.T_map_camera):
            for n in self._searched(poses, T):
                views_of.setdefault(n, []).append(k)

        def search(item: tuple[int, list[int]]) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
            image = self._images.items[item[0]]
            levels = image.levels()
            return [(k, *self._matches(references.views[k], image, levels)) for k in item[1]]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "evidence") as pool:
            for results in pool.map(search, views_of.items()):
                for k, was_found, agrees in results:
                    found[k] += was_found
                    agreeing[k] += agrees
        items = zip(references.views, found, agreeing, strict=True)
        return replace(references, views=tuple(self._with_share(*item) for item in items))

    def _with_share(self, view: ReferencePoints, found: torch.Tensor, agreeing: torch.Tensor) -> ReferencePoints:
        """Return the points of a view with less confidence where few of the matches that were found agree, (N,)."""
        share = (agreeing + self._settings.prior_agreeing) / (found + self._settings.prior_found)
        return replace(view, confidence=view.confidence * share**2)

    def _searched(
        self, poses: NDArray[np.float64], T_map_camera: Matrix, allowed: NDArray[np.bool_] | None = None
    ) -> list[int]:
        distances = view_distances(poses, T_map_camera)
        others = distances > self._settings.least_distance_m
        if allowed is not None:
            others &= allowed
        nearest = (int(n) for n in np.argsort(distances, kind="stable") if others[n])
        return list(itertools.islice(nearest, self._settings.per_reference))

    @torch.inference_mode()
    def _matches(
        self, points: ReferencePoints, image: _Image, levels: tuple[FeatureImage, FeatureImage] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each point (N,) whether it was found in an image, and how far the match agrees, 0 to 1."""
        levels = levels or image.levels()
        s, camera, T = self._settings, self.camera, image.T_map_camera
        nothing = torch.zeros(len(points)), torch.zeros(len(points))
        # coordinates relative to the camera: float32 is not exact enough far from the map's origin
        local = points.points - torch.from_numpy(T[:3, 3]).to(points.points)
        pose = make_pose(T[:3, :3].T, np.zeros(3))
        visible = self._visible(local, pose, image)
        confidence = torch.where(visible, points.confidence.clamp(min=1e-3), 0.0)
        matches = search_points(levels, local, (points.coarse, points.fine), confidence, pose, camera)
        # poses of views have errors of their own, which would count against all points
        fit = fit_pose(matches, local, pose, camera)
        if fit is None:
            return nothing
        at, _, in_front = project(local, torch.from_numpy(fit.T_camera_local).to(local), camera, 1.0)
        was_found = in_front & (matches.weights > 0)
        squared = ((matches.pixels - at) ** 2).sum(dim=1)
        return was_found.float(), torch.where(was_found, 1 / (1 + squared / s.scale_px**2) ** 2, 0.0)

    def _visible(self, local: torch.Tensor, pose: Matrix, image: _Image) -> torch.Tensor:
        """Return (N,) bool: the view's depth shows nothing in front of a point."""
        at, P, in_front = project(local, torch.from_numpy(pose).to(local), self.camera, COARSE_STRIDE)
        h, w = image.farthest_m.shape
        column, row = (at[:, k].round().long().clamp(0, side - 1) for k, side in ((0, w), (1, h)))
        limit = torch.from_numpy(image.farthest_m)[row, column]
        return in_front & (P[:, 2] < (1 + DEPTH_AGREES) * limit + DEPTH_AGREES_M)


def _stored(features: torch.Tensor) -> torch.Tensor:
    """Return unit features (C, h, w) as (h, w, C) int8."""
    return (127 * features.permute(1, 2, 0).float()).round().to(torch.int8).cpu().contiguous()


def _level(stored: torch.Tensor, stride: int) -> FeatureImage:
    h, w = stored.shape[:2]
    return FeatureImage(stored.float() / 127, torch.ones(h, w), float(stride))


def _farthest(depth_m: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (h, w) the largest depth in and around each cell, metres; infinite where none is known around it."""
    h, w = (side // COARSE_STRIDE for side in depth_m.shape)
    cells = depth_m[: h * COARSE_STRIDE, : w * COARSE_STRIDE].reshape(h, COARSE_STRIDE, w, COARSE_STRIDE).max((1, 3))
    padded = np.pad(cells, 1)
    around = np.max([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)
    return np.where(around > 0, around, np.inf).astype(np.float32)
