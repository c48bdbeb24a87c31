# SPDX-License-Identifier: Apache-2.0
"""Evidence of other views for the reference points of a map: points that are found elsewhere lose confidence.

A corner where the edge of a near surface crosses a line of a far one is no point of the scene; nor are reflections, or
points whose depth is wrong. One view does not tell them from others. In other views of the recording they are found
beside the place where the map says they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.mapping.views import DEPTH_AGREES, DEPTH_AGREES_M, View
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.point_matching import fit_pose, search_points
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, view_distances


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


@dataclass(frozen=True, eq=False)
class _Image:
    T_map_camera: Matrix
    coarse: torch.Tensor
    """(h, w, 64) int8, of unit features"""
    fine: torch.Tensor
    """(2 h, 2 w, 24) int8"""
    farthest_m: NDArray[np.float32]
    """(h, w) largest depth in and around each cell; infinite where it is not known."""


class PointEvidence:
    """Views of a recording that are searched for the reference points of its map.

    Args:
        camera: camera of the map.
        settings: choice of the views; None: the defaults.
    """

    def __init__(self, camera: Camera, settings: EvidenceSettings | None = None) -> None:
        self._camera, self._settings = camera, settings or EvidenceSettings()
        self._images: list[_Image] = []
        self._seen, self._step = 0, 1

    def add(self, view: View, features: BackboneFeatures) -> None:
        """Keep a view, thinned over the recording."""
        self._seen += 1
        if (self._seen - 1) % self._step:
            return
        coarse, fine = (_stored(maps[0]) for maps in (features.coarse, features.fine))
        self._images.append(_Image(view.T_map_camera, coarse, fine, _farthest(view.depth_m)))
        if len(self._images) > self._settings.max_views:
            self._images, self._step = self._images[::2], 2 * self._step

    def weighed(self, references: ReferenceViews) -> ReferenceViews:
        """Return the views with the confidence of each point times the squared share of its matches that agree."""
        if not self._images:
            return references
        poses = np.stack([image.T_map_camera for image in self._images])
        found, agreeing = ([torch.zeros(len(view)) for view in references.views] for _ in range(2))
        views_of: dict[int, list[int]] = {}
        for k, T in enumerate(references.T_map_camera):
            for n in self._searched(poses, T):
                views_of.setdefault(n, []).append(k)

        def search(item: tuple[int, list[int]]) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
            image = self._images[item[0]]
            levels = (_level(image.coarse, COARSE_STRIDE), _level(image.fine, FINE_STRIDE))
            return [(k, *self._matches(references.views[k], image, levels)) for k in item[1]]

        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "evidence") as pool:
            for results in pool.map(search, views_of.items()):
                for k, was_found, agrees in results:
                    found[k] += was_found
                    agreeing[k] += agrees
        s = self._settings
        shares = [(a + s.prior_agreeing) / (f + s.prior_found) for f, a in zip(found, agreeing, strict=True)]
        views = zip(references.views, shares, strict=True)
        return replace(references, views=tuple(replace(v, confidence=v.confidence * share**2) for v, share in views))

    def _searched(self, poses: NDArray[np.float64], T_map_camera: Matrix) -> list[int]:
        distances = view_distances(poses, T_map_camera)
        others = [
            int(n) for n in np.argsort(distances, kind="stable") if distances[n] > self._settings.least_distance_m
        ]
        return others[: self._settings.per_reference]

    @torch.inference_mode()
    def _matches(
        self, points: ReferencePoints, image: _Image, levels: tuple[FeatureImage, FeatureImage]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each point (N,) whether it was found in an image, and how far the match agrees, 0 to 1."""
        s, camera, T = self._settings, self._camera, image.T_map_camera
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
        at, P, in_front = project(local, torch.from_numpy(pose).to(local), self._camera, COARSE_STRIDE)
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
