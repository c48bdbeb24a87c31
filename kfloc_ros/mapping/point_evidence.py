# SPDX-License-Identifier: Apache-2.0
"""Evidence of other views for the reference points of a map: their depths, and less confidence if found elsewhere.

A depth camera is off by one or two percent, differently near and far. Other views tell depths: a point's patch fits all
of them at one depth. If two halves of the views do not agree on the depths, these stay: the poses are at fault.

A corner where the edge of a near surface crosses a line of a far one is no point of the scene; nor are reflections, or
points whose depth is wrong. One view does not tell them from others. In other views of the recording they are found
beside the place where the map says they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.views import DEPTH_AGREES, DEPTH_AGREES_M, View
from kfloc_ros.pixloc.cost import NEAR_M, FeatureImage, project
from kfloc_ros.pixloc.patch_kernels import PATCH_RADIUS, PATCH_SIDE, WARP_LIMITS, normalised_patches, window_of
from kfloc_ros.pixloc.patches import PatchSettings
from kfloc_ros.pixloc.point_matching import fit_pose, search_points
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, view_distances

LOG = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class DepthSettings:
    """Search of the depths of reference points in other views of the recording."""

    range_log: float = 0.08
    steps: int = 17
    """Largest change of the logarithm of a depth, and number of depths that are compared."""
    per_reference: int = 10
    """Views in which the points of a reference view are searched, the nearest that are apart."""
    least_baseline_m: float = 0.08
    spacing_m: float = 0.05
    farthest_m: float = 0.8
    """Smallest distances of these views from the reference view and from each other, and largest ``view_distances``."""
    sigma_log: float = 0.1
    """Width of the weak preference for the given depth."""
    min_agreeing: int = 3
    """Views that must agree on a depth."""
    min_share: float = 0.15
    """Smallest share of the views with a patch in view that agree with it, of each patch and of all: 51 to 66 % with
    good poses, 23 % with RedKitchen's drifting ones, and 10 % on d435_office."""
    min_correlation: float = 0.4
    """Rank correlation of the changes by two halves of the views from which they count: 0.54 to 0.62 with poses by
    structure from motion or a HoloLens, 0.16 with a tracking camera that drifts, 0.24 with exact depths."""
    min_points: int = 200
    """Fewest points for these two."""


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
        self._camera, self._settings, self._depths = camera, settings or EvidenceSettings(), depths or DepthSettings()
        self._images: list[_Image] = []
        self._seen, self._step = 0, 1

    def add(self, view: View, features: BackboneFeatures) -> None:
        """Keep a view, thinned over the recording."""
        self._seen += 1
        if (self._seen - 1) % self._step:
            return
        coarse, fine = (_stored(maps[0]) for maps in (features.coarse, features.fine))
        grey = np.asarray(cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY))
        self._images.append(_Image(view.T_map_camera, grey, coarse, fine, _farthest(view.depth_m)))
        if len(self._images) > self._settings.max_views:
            self._images, self._step = self._images[::2], 2 * self._step

    def placed(self, references: ReferenceViews) -> ReferenceViews:
        """Return the views with their points at the depths at which the points' patches fit the other views best.

        Patches that hardly any other view agrees with, at any depth, are left out; all of them, if that is so for the
        map as a whole, since its poses are then off by pixels. Depths stay if halves of the other views do not agree.
        """
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "depths") as pool:
            found = list(pool.map(self._depths_of, references.views, references.T_map_camera))
        s, seen = self._depths, sum(int(depths.seen.sum()) for depths in found)
        share = sum(int(depths.agreeing.sum()) for depths in found) / max(seen, 1)
        if seen >= s.min_points and share < s.min_share:
            LOG.warning("Only %.0f %% of the patches fit other views: poses are off. Try --adjust-poses.", 100 * share)
            return replace(references, views=tuple(replace(view, patches=None) for view in references.views))
        halves = np.concatenate([depths.halves[depths.told_twice] for depths in found]) if found else np.empty((0, 2))
        ranks = halves.argsort(axis=0).argsort(axis=0)
        correlation = float(np.corrcoef(*ranks.T)[0, 1]) if len(halves) >= s.min_points else 0.0
        LOG.info("patches fit %.0f %% of the views, depths by halves correlate by %.2f", 100 * share, correlation)
        if correlation < s.min_correlation:
            return references
        items = zip(found, references.views, references.T_map_camera, strict=True)
        return replace(references, views=tuple(depths.applied(view, T, s) for depths, view, T in items))

    def _depths_of(self, view: ReferencePoints, T_map_camera: Matrix) -> _Depths:
        """Return what the other views tell of the depths of one view's points."""
        s, chosen = self._depths, self._apart(T_map_camera)
        if len(chosen) < s.min_agreeing or view.patches is None:
            return _Depths.nothing(len(view))
        logs = np.linspace(-s.range_log, s.range_log, s.steps)
        local = (view.points.double().cpu().numpy() - T_map_camera[:3, 3]) @ T_map_camera[:3, :3]
        patches, textured = normalised_patches(view.patches.cpu().numpy())
        curves = np.stack([self._dissimilarity(local, patches, self._images[n], T_map_camera, logs) for n in chosen])
        in_view = np.asarray((curves >= 0).all(axis=2))
        scale, alike = PatchSettings().loss_scale, PatchSettings().agreeing
        scores = np.where(in_view[:, :, None], 1 / (1 + curves / (2 * scale**2)), 0.0)
        fits = in_view & (curves.min(axis=2) < alike)
        change, inside = _best(scores.sum(axis=0), logs, s.sigma_log)
        nearest = np.rint((change - logs[0]) / (logs[1] - logs[0])).astype(np.int64)
        there = np.take_along_axis(curves, nearest[None, :, None], axis=2)[:, :, 0]
        agreeing = (in_view & (there < alike)).sum(axis=0)
        parts, twice = [], textured.copy()
        for first in (0, 1):
            part, part_inside = _best(scores[first::2].sum(axis=0), logs, s.sigma_log)
            parts.append(part)
            twice &= part_inside & (fits[first::2].sum(axis=0) >= 2)
        told = textured & inside & (agreeing >= s.min_agreeing)
        seen = np.where(textured, in_view.sum(axis=0), 0)
        return _Depths(np.where(told, change, 0.0), seen, agreeing * textured, np.stack(parts, axis=1), twice)

    def _apart(self, T_map_camera: Matrix) -> list[int]:
        """Return the views to search for depths, by number."""
        if not self._images:
            return []
        s, poses = self._depths, np.stack([image.T_map_camera for image in self._images])
        distances = view_distances(poses, T_map_camera)
        centres, chosen = poses[:, :3, 3], list[int]()
        baselines = np.linalg.norm(centres - T_map_camera[:3, 3], axis=1)
        for n in np.argsort(distances, kind="stable"):
            if len(chosen) == s.per_reference or distances[n] > s.farthest_m:
                break
            between = np.linalg.norm(centres[chosen] - centres[n], axis=1)
            if baselines[n] > s.least_baseline_m and (between > s.spacing_m).all():
                chosen.append(int(n))
        return chosen

    def _dissimilarity(
        self,
        local: NDArray[np.float64],
        patches: NDArray[np.float32],
        image: _Image,
        T_map_view: Matrix,
        logs: NDArray[np.float64],
    ) -> NDArray[np.float32]:
        """Return the dissimilarity (N, S) of patches (N, side^2) in another image at S changes of the log depth.

        It is -1 out of view. ``local`` (N, 3) are the points in the camera of their view, of pose ``T_map_view``.
        """
        camera, T = self._camera, inverse_pose(image.T_map_camera) @ T_map_view
        offsets = (np.arange(PATCH_SIDE) - PATCH_RADIUS).astype(np.float32)
        across, down = (grid.reshape(-1) for grid in np.meshgrid(offsets, offsets))
        window = window_of(PatchSettings().window_sigma_px)
        height, width = image.grey.shape
        found = np.full((len(local), len(logs)), -1.0, dtype=np.float32)
        for k, log in enumerate(logs):
            points = local * np.exp(log)
            P = points @ T[:3, :3].T + T[:3, 3]
            z = np.maximum(P[:, 2], NEAR_M)
            x, y = P[:, 0] / z, P[:, 1] / z
            u, v, per_px = camera.fx * x + camera.cx, camera.fy * y + camera.cy, points[:, 2] / z
            # derivatives of (u, v) by the pixels of the view: the surface is taken to face it
            a, b = (camera.fx / f * per_px * (T[0, i] - x * T[2, i]) for i, f in ((0, camera.fx), (1, camera.fy)))
            c, d = (camera.fy / f * per_px * (T[1, i] - y * T[2, i]) for i, f in ((0, camera.fx), (1, camera.fy)))
            reach_u, reach_v = ((PATCH_RADIUS + 1) * (abs(p) + abs(q)) for p, q in ((a, b), (c, d)))
            area = a * d - b * c
            seen = (P[:, 2] > NEAR_M) & (area > WARP_LIMITS[0]) & (area < WARP_LIMITS[1])
            seen &= (u > reach_u) & (v > reach_v) & (u < width - 1.0 - reach_u) & (v < height - 1.0 - reach_v)
            if not seen.any():
                continue
            u, v, a, b, c, d = (values[seen, None].astype(np.float32) for values in (u, v, a, b, c, d))
            at = u + a * across + b * down, v + c * across + d * down
            sampled = cv2.remap(image.grey, *at, cv2.INTER_LINEAR).astype(np.float32)
            sampled -= sampled.mean(axis=1, keepdims=True)
            sampled /= np.maximum(sampled.std(axis=1, keepdims=True), 1.0)
            found[seen, k] = (sampled - patches[seen]) ** 2 @ window
        return found

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


@dataclass(frozen=True, eq=False)
class _Depths:
    """What other views tell of the depths of one view's points."""

    change: NDArray[np.float64]
    """(N,) change of the logarithm of the depth; 0 where it is not told."""
    seen: NDArray[np.int64]
    agreeing: NDArray[np.int64]
    """(N,) numbers of views with the patch in view, and of those that agree with it at the depth."""
    halves: NDArray[np.float64]
    told_twice: NDArray[np.bool_]
    """(N, 2) the same change by each half of the views, and (N,) where both tell it."""

    @classmethod
    def nothing(cls, count: int) -> _Depths:
        """Return that of views that tell nothing."""
        none = np.zeros(count, np.int64)
        return cls(np.zeros(count), none, none, np.zeros((count, 2)), none > 0)

    def applied(self, view: ReferencePoints, T_map_camera: Matrix, settings: DepthSettings) -> ReferencePoints:
        """Return the points at these depths, with flat patches, which are not compared, for contradicted ones."""
        centre = torch.from_numpy(T_map_camera[:3, 3])
        points = centre + (view.points.double() - centre) * torch.from_numpy(np.exp(self.change))[:, None]
        contradicted = (self.seen >= settings.min_agreeing) & (self.agreeing < settings.min_share * self.seen)
        flat = torch.from_numpy(contradicted)[:, None]
        patches = None if view.patches is None else view.patches.masked_fill(flat, 0)
        return replace(view, points=points.to(view.points), patches=patches)


def _best(
    scores: NDArray[np.float64], logs: NDArray[np.float64], sigma_log: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the change (N,) of the depth with the largest score of (N, S), and where it lies inside the range."""
    preferred = scores - 0.5 * (logs / sigma_log) ** 2
    best = preferred.argmax(axis=1)
    inside = (best > 0) & (best < len(logs) - 1)
    middle, row = np.clip(best, 1, len(logs) - 2), np.arange(len(scores))
    before, at, after = (preferred[row, middle + k] for k in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = np.where(bend < -1e-9, 0.5 * (before - after) / np.where(bend < -1e-9, bend, 1.0), 0.0)
    return logs[middle] + (logs[1] - logs[0]) * np.clip(shift, -1.0, 1.0), inside


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
