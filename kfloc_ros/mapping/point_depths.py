# SPDX-License-Identifier: Apache-2.0
"""Depths of reference points by other views of the recording: a point's patch fits all of them at one depth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.pixloc.cost import NEAR_M
from kfloc_ros.pixloc.patch_kernels import PATCH_RADIUS, PATCH_SIDE, WARP_LIMITS, normalised_patches, window_of
from kfloc_ros.pixloc.patches import PatchSettings
from kfloc_ros.pixloc.references import ReferencePoints, view_distances

LOG = logging.getLogger(__name__)


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


Curve = NDArray[np.float32]
"""Dissimilarity (N, S) of N patches in one image at S depths; -1 out of view."""


class DepthUse(Enum):
    """What the depths found by all views of a map are good for."""

    FOUND = "points move to the depths found"
    GIVEN = "the given depths stay: halves of the views do not agree"
    NO_PATCHES = "patches are left out: hardly any view agrees with them at any depth"


@dataclass(frozen=True, eq=False)
class PointDepths:
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
    def nothing(cls, count: int) -> PointDepths:
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


def use_of(found: Sequence[PointDepths], settings: DepthSettings) -> DepthUse:
    """Return what the depths found for all views of a map are good for.

    Patches that hardly any other view agrees with, at any depth, are of a map whose poses are off by pixels.
    """
    s, seen = settings, sum(int(depths.seen.sum()) for depths in found)
    share = sum(int(depths.agreeing.sum()) for depths in found) / max(seen, 1)
    if seen >= s.min_points and share < s.min_share:
        LOG.warning("Only %.0f %% of the patches fit other views: poses are off. Try --adjust-poses.", 100 * share)
        return DepthUse.NO_PATCHES
    halves = np.concatenate([depths.halves[depths.told_twice] for depths in found]) if found else np.empty((0, 2))
    ranks = halves.argsort(axis=0).argsort(axis=0)
    correlation = float(np.corrcoef(*ranks.T)[0, 1]) if len(halves) >= s.min_points else 0.0
    LOG.info("patches fit %.0f %% of the views, depths by halves correlate by %.2f", 100 * share, correlation)
    return DepthUse.FOUND if correlation >= s.min_correlation else DepthUse.GIVEN


class DepthSearch:
    """Search of the depths of reference points in other views.

    Args:
        camera: camera of the views.
        settings: None: the defaults.
    """

    def __init__(self, camera: Camera, settings: DepthSettings | None = None) -> None:
        self.camera, self.settings = camera, settings or DepthSettings()
        s = self.settings
        self._logs = np.linspace(-s.range_log, s.range_log, s.steps)

    def searched(
        self, poses: NDArray[np.float64], T_map_camera: Matrix, allowed: NDArray[np.bool_] | None = None
    ) -> list[int]:
        """Return the views to search for the points of a view, by number: the nearest that are apart.

        Args:
            poses: (K, 4, 4) of the views.
            T_map_camera: pose of the points' view.
            allowed: (K,) views to choose from; None: all.
        """
        s, distances = self.settings, view_distances(poses, T_map_camera)
        if allowed is not None:
            distances = np.where(allowed, distances, np.inf)
        centres, chosen = poses[:, :3, 3], list[int]()
        baselines = np.linalg.norm(centres - T_map_camera[:3, 3], axis=1)
        for n in np.argsort(distances, kind="stable"):
            if len(chosen) == s.per_reference or distances[n] > s.farthest_m:
                break
            between = np.linalg.norm(centres[chosen] - centres[n], axis=1)
            if baselines[n] > s.least_baseline_m and (between > s.spacing_m).all():
                chosen.append(int(n))
        return chosen

    def curve(self, view: ReferencePoints, T_map_camera: Matrix, grey: NDArray[np.uint8], T_map_image: Matrix) -> Curve:
        """Return the dissimilarity (N, S) of the points' patches in an image at all depths; -1 out of view."""
        assert view.patches is not None
        local = (view.points.double().cpu().numpy() - T_map_camera[:3, 3]) @ T_map_camera[:3, :3]
        patches, _ = normalised_patches(view.patches.cpu().numpy())
        return self._dissimilarity(local, patches, grey, inverse_pose(T_map_image) @ T_map_camera)

    def told(self, view: ReferencePoints, curve_of: Callable[[int], Curve], chosen: Sequence[int]) -> PointDepths:
        """Return what the chosen images tell of the depths of one view's points, by the curve of each."""
        s, logs = self.settings, self._logs
        if len(chosen) < s.min_agreeing or view.patches is None:
            return PointDepths.nothing(len(view))
        curves = np.stack([curve_of(n) for n in chosen])
        textured = normalised_patches(view.patches.cpu().numpy())[1]
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
        return PointDepths(np.where(told, change, 0.0), seen, agreeing * textured, np.stack(parts, axis=1), twice)

    def _dissimilarity(
        self,
        local: NDArray[np.float64],
        patches: NDArray[np.float32],
        grey: NDArray[np.uint8],
        T: Matrix,
    ) -> Curve:
        """Return the dissimilarity (N, S) of patches (N, side^2) in another image at S changes of the log depth.

        It is -1 out of view. ``local`` (N, 3) are the points in the camera of their view, and ``T`` leads from there to
        the image's camera.
        """
        camera, logs = self.camera, self._logs
        offsets = (np.arange(PATCH_SIDE) - PATCH_RADIUS).astype(np.float32)
        across, down = (grid.reshape(-1) for grid in np.meshgrid(offsets, offsets))
        window = window_of(PatchSettings().window_sigma_px)
        height, width = grey.shape
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
            sampled = cv2.remap(grey, *at, cv2.INTER_LINEAR).astype(np.float32)
            sampled -= sampled.mean(axis=1, keepdims=True)
            deviation = np.sqrt(np.einsum("ij,ij->i", sampled, sampled) / sampled.shape[1])
            sampled /= np.maximum(deviation, 1.0)[:, None]
            sampled -= patches if seen.all() else patches[seen]
            found[seen, k] = np.square(sampled, out=sampled) @ window
        return found


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
