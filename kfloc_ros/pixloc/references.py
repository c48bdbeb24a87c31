# SPDX-License-Identifier: Apache-2.0
"""Reference views of a map: their points, the choice of views to align with, and residuals at a pose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.device import has_numba, runs_compiled
from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.pixloc import point_kernels
from kfloc_ros.pixloc.cost import NEAR_M, FeatureImage, project
from kfloc_ros.pixloc.point_matching import SEARCH_CELLS, best_cells

METRES_PER_RADIAN = 1.2
"""Weight of a change of direction against a change of place when views are compared (about 2 cm a degree)."""
NEARNESS_FLOOR_M = 0.02
"""Distance, the noise of a coarse pose, below which views count as equally near."""

MIN_IN_VIEW = 0.3
"""Smallest share of a view's points that a camera must have in view for the view to be preferred."""
CONSIDERED_VIEWS = 16
"""Nearest views among which those with enough points in view are chosen."""
ENOUGH_IN_VIEW = 450
"""Points in view that constrain a pose well in every direction; with fewer, further views add theirs."""
MAX_VIEWS = 10
"""Largest number of views, further ones included."""
LIKENESS_POINTS = 64
"""Points of a view that are compared with the image to tell how much it looks like the view's session."""
LESS_ALIKE = 0.02
"""Difference of mean cosines from which a session is clearly less similar to an image than another. Measured in the
simulated room: 0.05 between day and night, 0.03 where all prints are others, 0.01 between the nearest views and farther
ones of one session."""

CANDIDATE_STEP_PX = 4
BORDER_PX = 12
BUCKET_PX = 32
"""Side of the buckets over which points are spread: coverage of the image constrains the pose, not the best corner."""


@dataclass(frozen=True, eq=False)
class ReferencePoints:
    """Points of one or several reference views, ready for alignment."""

    points: torch.Tensor
    """(N, 3) metres, map frame."""
    coarse: torch.Tensor
    """(N, 64) unit features at stride 8."""
    fine: torch.Tensor
    """(N, 24) unit features at stride 4."""
    confidence: torch.Tensor
    """(N,)"""
    patches: torch.Tensor | None = None
    """(N, side^2) uint8 grey values of the view around each point, as :mod:`kfloc_ros.pixloc.patches` has them."""

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device) -> ReferencePoints:
        """Return the points on another device; the patches stay, since the processor compares them."""
        return replace(ReferencePoints(*(values.to(device) for values in self.tensors())), patches=self.patches)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return points, coarse and fine features, and confidences."""
        return self.points, self.coarse, self.fine, self.confidence

    def selected(self, chosen: torch.Tensor) -> ReferencePoints:
        """Return the points of a mask (N,) or of indices."""
        patches = None if self.patches is None else self.patches[chosen.to(self.patches.device)]
        return replace(ReferencePoints(*(values[chosen] for values in self.tensors())), patches=patches)

    @classmethod
    def concatenate(cls, parts: Sequence[ReferencePoints]) -> ReferencePoints:
        """Return the points of several views as one set, without their patches, which belong to single views."""
        return cls(*(torch.cat(values) for values in zip(*(p.tensors() for p in parts), strict=True)))


@dataclass(frozen=True, eq=False)
class ReferenceViews:
    """All reference views of a map."""

    ids: tuple[int, ...]
    """Frame index of each view in the mapping source."""
    T_map_camera: NDArray[np.float64]
    """(K, 4, 4)"""
    views: tuple[ReferencePoints, ...]
    sessions: tuple[int, ...] = ()
    """Session in which each view was recorded, counted from 0; empty if all are of one session."""

    def session_of(self, position: int) -> int:
        """Return the session of a view."""
        return self.sessions[position] if self.sessions else 0

    def selected(self, positions: Sequence[int]) -> ReferenceViews:
        """Return some of the views."""
        ids, views = tuple(self.ids[k] for k in positions), tuple(self.views[k] for k in positions)
        sessions = tuple(self.sessions[k] for k in positions) if self.sessions else ()
        return ReferenceViews(ids, self.T_map_camera[list(positions)], views, sessions)

    def to(self, device: torch.device) -> ReferenceViews:
        """Return the views with their points on another device."""
        return replace(self, views=tuple(view.to(device) for view in self.views))

    def nearest(self, T_map_camera: Matrix, count: int) -> list[int]:
        """Return positions of the views nearest to a pose, nearest first."""
        return [int(k) for k in np.argsort(view_distances(self.T_map_camera, T_map_camera), kind="stable")[:count]]

    def overlapping(self, T_map_camera: Matrix, camera: Camera, count: int) -> list[int]:
        """Return positions of the views to align a camera with: :meth:`best_overlapping`, and further ones if needed.

        If it sees few of their points, views beyond ``count`` follow until there are enough points.
        """
        return list(itertools.chain(*self._overlapping(T_map_camera, camera, count)))

    def best_overlapping(self, T_map_camera: Matrix, camera: Camera, count: int) -> list[int]:
        """Return positions of the nearest views, at most ``count``, with enough points in a camera's view.

        Far from the mapped path the nearest views may look in another direction than the camera; further views are then
        better. If the nearest have enough points in view, the result is that of :meth:`nearest`.
        """
        return self._overlapping(T_map_camera, camera, count)[0]

    def alike(self, image: FeatureImage, T_map_camera: Matrix, camera: Camera, count: int) -> list[int]:
        """Return the views of :meth:`overlapping`, of the sessions that an image looks like.

        If the nearest views are of one session, the result is that of :meth:`overlapping`. Otherwise, sessions whose
        views are clearly less similar to the image than those of another are left out: they are of another light, or
        of content that has changed.

        Args:
            image: coarse level of the image.
            T_map_camera: pose, (4, 4), as good as a start of an alignment.
            camera: pinhole camera of the image.
            count: number of views.
        """
        near = self.nearest(T_map_camera, max(count, CONSIDERED_VIEWS))
        sessions = [self.session_of(k) for k in near]
        if len(set(sessions)) < 2:
            return list(itertools.chain(*self._overlapping(T_map_camera, camera, count, near)))
        likeness = self._likeness(image, T_map_camera, camera, near)
        mean = {
            session: float(
                np.mean([value for value, s in zip(likeness, sessions, strict=True) if s == session][:count])
            )
            for session in set(sessions)
        }
        alike = {session for session, value in mean.items() if value >= max(mean.values()) - LESS_ALIKE}
        among = [k for k, s in zip(near, sessions, strict=True) if s in alike]
        return list(itertools.chain(*self._overlapping(T_map_camera, camera, count, among)))

    def _likeness(
        self, image: FeatureImage, T_map_camera: Matrix, camera: Camera, positions: Sequence[int]
    ) -> list[float]:
        """Return each view's mean cosine of its points in the image with the most similar cells near them."""
        parts = [self.views[k] for k in positions]
        steps = [max(1, -(-len(p) // LIKENESS_POINTS)) for p in parts]
        parts = [p.selected(torch.arange(0, len(p), n)) for p, n in zip(parts, steps, strict=True)]
        points = ReferencePoints.concatenate(parts)
        local = points.points - torch.from_numpy(T_map_camera[:3, 3].copy()).to(points.points)
        T_camera_local = torch.from_numpy(make_pose(T_map_camera[:3, :3].T, np.zeros(3))).to(local)
        at, _, in_front = project(local, T_camera_local, camera, image.stride)
        inside = in_front & (at > 0).all(1) & (at[:, 0] < image.width - 1) & (at[:, 1] < image.height - 1)
        _, cosine, _ = best_cells(image, points.coarse, torch.where(inside[:, None], at, 0.0), SEARCH_CELLS)
        counts = [len(p) for p in parts]
        sums = [float(part.sum()) for part in torch.split(cosine * inside, counts)]
        numbers = [int(part.sum()) for part in torch.split(inside, counts)]
        return [total / max(number, 1) for total, number in zip(sums, numbers, strict=True)]

    def points_near(self, T_map_camera: Matrix, camera: Camera, count: int) -> ReferencePoints:
        """Return the points of the views to align a camera with; see :meth:`overlapping`."""
        return ReferencePoints.concatenate([self.views[k] for k in self.overlapping(T_map_camera, camera, count)])

    def _overlapping(
        self, T_map_camera: Matrix, camera: Camera, count: int, among: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the best views, and the further views that add points, of some views or of the nearest ones."""
        near = self.nearest(T_map_camera, max(count, CONSIDERED_VIEWS)) if among is None else among
        in_view = self._in_view(T_map_camera, camera, near[:count])
        if all(s >= MIN_IN_VIEW for s in self._shares(near, in_view)) and sum(in_view) >= ENOUGH_IN_VIEW:
            return near[:count], []
        in_view += self._in_view(T_map_camera, camera, near[count:])
        shares = self._shares(near, in_view)
        order = sorted(range(len(near)), key=lambda k: (-min(shares[k], MIN_IN_VIEW), k))
        extra: list[int] = []
        for k in order[count:MAX_VIEWS]:
            if not in_view[k] or sum(in_view[j] for j in order[:count] + extra) >= ENOUGH_IN_VIEW:
                break
            extra.append(k)
        return [near[k] for k in order[:count]], [near[k] for k in extra]

    def _in_view(self, T_map_camera: Matrix, camera: Camera, positions: Sequence[int]) -> list[int]:
        """Return the number of each view's points that lie in the camera's image."""
        if not positions:
            return []
        views = [self.views[k].points for k in positions]
        if runs_compiled(*views):
            T, K = T_map_camera.astype(np.float32), np.array([camera.fx, camera.fy, camera.cx, camera.cy], np.float32)
            return [
                point_kernels.count_in_view(view.numpy(), T, K, camera.width, camera.height, NEAR_M) for view in views
            ]
        counts, points = [len(view) for view in views], torch.cat(views)
        # float32 is exact enough only near the origin, and a map may be far from its own
        local = points - torch.from_numpy(T_map_camera[:3, 3]).to(points)
        x, y, z = (local @ torch.from_numpy(T_map_camera[:3, :3]).to(points)).unbind(dim=1)
        u, v = camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy
        inside = (z > NEAR_M) & (u > 0) & (v > 0) & (u < camera.width - 1) & (v < camera.height - 1)
        return [int(part.sum()) for part in torch.split(inside, counts)]

    def _shares(self, positions: Sequence[int], in_view: Sequence[int]) -> list[float]:
        return [n / max(len(self.views[k]), 1) for k, n in zip(positions, in_view, strict=False)]


def view_distances(T_map_cameras: NDArray[np.float64], T_map_camera: Matrix) -> NDArray[np.float64]:
    """Return distances (K,) of views (K, 4, 4) to a pose, metres; a radian counts as ``METRES_PER_RADIAN``."""
    centres = np.linalg.norm(T_map_cameras[:, :3, 3] - T_map_camera[:3, 3], axis=1)
    cosine = (np.einsum("kij,ij->k", T_map_cameras[:, :3, :3], T_map_camera[:3, :3]) - 1) / 2
    return np.asarray(centres + METRES_PER_RADIAN * np.arccos(np.clip(cosine, -1.0, 1.0)))


def nearness_of(distances: NDArray[np.float64]) -> list[float]:
    """Return the weights of views at distances (K,) of a pose in an alignment: 1 for the nearest, less for others.

    Nearer views look more similar, and their own poses have smaller errors relative to each other.
    """
    floored = distances + NEARNESS_FLOOR_M
    return [float(w) for w in (floored.min(initial=np.inf) / floored) ** 2]


def extract_reference_points(
    features: BackboneFeatures, depth_m: NDArray[np.float32], camera: Camera, T_map_camera: Matrix, max_points: int
) -> ReferencePoints:
    """Choose points of a mapping view and sample their features.

    Candidates lie on a 4-pixel grid where depth is known and smooth. Their score is the reliability times the root of
    the smaller eigenvalue of the fine features' structure tensor, which measures how well the point constrains both
    image directions. The best of every 32-pixel bucket are taken in turns.

    Args:
        features: backbone features of this one image.
        depth_m: (H, W) depth, metres.
        camera: pinhole camera of the image and depth.
        T_map_camera: (4, 4) pose of the view.
        max_points: largest number of points.
    """
    uv, depth = _candidates(depth_m)
    coarse = FeatureImage.from_maps(
        features.coarse[0].cpu().float(), features.reliability[0].cpu().float(), COARSE_STRIDE
    )
    fine = FeatureImage.from_maps(features.fine[0].cpu().float(), torch.ones(features.fine.shape[-2:]), FINE_STRIDE)
    coarse_rows, _ = coarse.sample((uv + 0.5) / COARSE_STRIDE - 0.5)
    fine_rows, _ = fine.sample((uv + 0.5) / FINE_STRIDE - 0.5)
    reliability = coarse_rows[:, -1]
    keep = _spread(uv, reliability * _corner_strength(fine_rows, fine.channels), max_points)
    uv, depth = uv[keep].double(), depth[keep].double()
    x, y = (uv[:, 0] - camera.cx) / camera.fx * depth, (uv[:, 1] - camera.cy) / camera.fy * depth
    T = torch.from_numpy(T_map_camera)
    points = torch.stack([x, y, depth], dim=1) @ T[:3, :3].T + T[:3, 3]
    coarse_features = F.normalize(coarse_rows[keep, : coarse.channels], dim=1)
    fine_features = F.normalize(fine_rows[keep, : fine.channels], dim=1)
    return ReferencePoints(points.float(), coarse_features, fine_features, reliability[keep])


def query_points(features: BackboneFeatures, max_points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels (N, 2) and coarse unit features (N, 64) of an image's points, chosen as in reference views."""
    coarse = FeatureImage.from_maps(features.coarse[0].float(), features.reliability[0].float(), COARSE_STRIDE)
    weight = torch.ones(features.fine.shape[-2:], device=features.fine.device)
    fine = FeatureImage.from_maps(features.fine[0].float(), weight, FINE_STRIDE)
    uv, coarse_rows, _, _ = choose_points((coarse, fine), max_points)
    return uv, coarse_rows


def choose_points(
    images: tuple[FeatureImage, FeatureImage], max_points: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose points of an image as in reference views, but with no need of a depth.

    Args:
        images: coarse and fine level of the image.
        max_points: largest number of points.

    Returns:
        Pixels (N, 2), coarse (N, 64) and fine (N, 24) unit features, and reliabilities (N,).
    """
    coarse, fine = images
    device = coarse.features.device
    h, w = (side * COARSE_STRIDE for side in (coarse.height, coarse.width))
    rows, columns = (torch.arange(BORDER_PX, side - BORDER_PX, CANDIDATE_STEP_PX, device=device) for side in (h, w))
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    uv = torch.stack([u.reshape(-1), v.reshape(-1)], dim=1).float()
    at, at_fine, score = (uv + 0.5) / COARSE_STRIDE - 0.5, (uv + 0.5) / FINE_STRIDE - 0.5, torch.empty(len(uv))
    if runs_compiled(fine.features, coarse.confidence):
        point_kernels.corner_scores(
            fine.features.numpy(), coarse.confidence.numpy(), at_fine.numpy(), at.numpy(), score.numpy()
        )
    else:
        score = coarse.sample(at)[0][:, -1] * _corner_strength(fine.sample(at_fine)[0], fine.channels)
    keep = _spread(uv.cpu(), score.cpu(), max_points).to(device)
    (coarse_rows, _), (fine_rows, _) = coarse.sample(at[keep]), fine.sample(at_fine[keep])
    return (
        uv[keep],
        F.normalize(coarse_rows[:, : coarse.channels], dim=1),
        F.normalize(fine_rows[:, : fine.channels], dim=1),
        coarse_rows[:, -1],
    )


def smooth_depth_mask(depth_m: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return (H, W) bool: depth is known throughout the 5x5 neighbourhood and varies by less than 3 % + 1 cm."""
    window = np.ones((5, 5), dtype=np.uint8)
    nearest, farthest = cv2.erode(depth_m, window), cv2.dilate(depth_m, window)
    return np.asarray((nearest > 0.1) & (farthest - nearest < 0.03 * nearest + 0.01))


def _candidates(depth_m: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return grid pixels (N, 2) with usable depth, and that depth (N,)."""
    H, W = depth_m.shape
    grid = np.zeros((H, W), dtype=bool)
    grid[BORDER_PX : H - BORDER_PX : CANDIDATE_STEP_PX, BORDER_PX : W - BORDER_PX : CANDIDATE_STEP_PX] = True
    v, u = np.nonzero(grid & smooth_depth_mask(depth_m))
    return torch.from_numpy(np.stack([u, v], axis=1).astype(np.float32)), torch.from_numpy(depth_m[v, u])


def _corner_strength(rows: torch.Tensor, channels: int) -> torch.Tensor:
    du, dv = rows[:, channels : 2 * channels], rows[:, 2 * channels : 3 * channels]
    a, b, c = (du * du).sum(1), (du * dv).sum(1), (dv * dv).sum(1)
    smaller = (a + c) / 2 - (((a - c) / 2) ** 2 + b * b).sqrt()
    return smaller.clamp(min=0).sqrt()


def _spread(uv: torch.Tensor, score: torch.Tensor, count: int) -> torch.Tensor:
    """Return indices of at most ``count`` points: the best of every bucket, then the second best, and so on."""
    order = np.argsort(-score.numpy())  # a sixth of the time of torch's
    key = (uv.numpy()[order] // BUCKET_PX).astype(np.int64) @ np.array([1, 1024])  # of images up to 32,768 px wide
    if has_numba() and len(key):
        return torch.from_numpy(order[point_kernels.in_turns(key, count)])
    by_bucket = np.argsort(key, kind="stable")
    sorted_key = key[by_bucket]
    starts = np.flatnonzero(np.r_[True, sorted_key[1:] != sorted_key[:-1]]) if len(key) else np.zeros(0, dtype=int)
    turn = np.empty(len(key), dtype=np.int64)
    turn[by_bucket] = np.arange(len(key)) - np.repeat(starts, np.diff(np.r_[starts, len(key)]))
    return torch.from_numpy(order[np.argsort(turn, kind="stable")[:count]])
