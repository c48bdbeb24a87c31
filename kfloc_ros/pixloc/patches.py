# SPDX-License-Identifier: Apache-2.0
"""Last step of an alignment: grey patches of the reference points, at the full resolution of the image.

The finest features have a stride of four pixels. A point that finds itself in them is off by 0.9 px, towards the centre
of a cell, and points of one view share a part of that. A patch around the point, warped as its view and the pose say,
and compared with the image as grey values, finds itself within a tenth of a pixel. Gain and offset of the brightness of
every patch are free (normalised correlation), and patches that do not resemble the image have little weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import runs_compiled
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg, so3_log
from kfloc_ros.pixloc import patch_kernels
from kfloc_ros.pixloc.cost import NEAR_M
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.pixloc.patch_kernels import (
    MIN_DEVIATION,
    PATCH_RADIUS,
    PATCH_SIDE,
    WARP_LIMITS,
    normalised_patches,
    window_of,
)
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, nearness_of, view_distances
from kfloc_ros.types import Alignment

_KEPT_VIEWS = 64
"""Number of views whose patches stay prepared; a view takes about 80 kB."""
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PatchSettings:
    """Settings of the alignment of patches, and the conditions for accepting its result."""

    max_views: int = 6
    farthest_m: float = 0.6
    """Nearest views, and their largest ``view_distances``, that are aligned beside the features' views; three side by
    side share errors, and patches are taken to face their view."""
    loss_scale: float = 0.35
    """Scale of the loss: a patch whose correlation with the image is 0.94 has half of its weight."""
    window_sigma_px: float = 2.5
    """Standard deviation of the weights of a patch's pixels."""
    min_deviation: float = MIN_DEVIATION
    """Smallest standard deviation of the grey values of a patch, of 255, that is compared."""
    even_dissimilarity: float = 0.35
    """Mean dissimilarity at which the features' covariance counts fully, as a prior of the patches' pose; else by the
    fourth power. Errors grow faster than residuals: at a quarter of the resolution, residuals are three times as large
    in the demo room, and errors eleven times. With constant weights, its and RedKitchen's best differ by ten."""
    max_iterations: int = 12
    step_m: float = 5e-5
    step_rad: float = 2e-5
    """A step below both limits is the last one."""
    longest_step_m: float = 0.02
    agreeing: float = 0.25
    min_agreeing: int = 20
    """Largest dissimilarity of a patch that agrees, a correlation of 0.88, and fewest such patches."""
    noise_scale: float = 4.0
    """Factor on the squared mean dissimilarity, which scales the covariance by the patches' residuals. Residuals of bad
    images are not independent: those of a quarter of the resolution are three times as large in the demo room, and the
    errors eleven times."""
    max_moved_m: float = 0.1
    max_moved_deg: float = 3.0
    """A result further from its start is not taken: patches see a few pixels around themselves."""


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches to align, in coordinates relative to the start."""

    points: Doubles
    """(N, 3) metres."""
    right: Doubles
    down: Doubles
    """(N, 3) metres from the point to its neighbours by one pixel in its view, if the surface faces the view."""
    values: Floats
    """(N, side^2) grey values with mean 0 and standard deviation 1."""
    confidence: Doubles
    """(N,)"""


@dataclass(frozen=True, eq=False)
class PatchFit:
    """Pose at which patches fit an image."""

    T_camera_local: Matrix
    H: Matrix
    """(6, 6) normal equations of (dt, dw)."""
    variance: float
    """Mean dissimilarity of the patches that the loss lets count."""


class PatchAligner:
    """Aligner of a pose by the patches of the views that it was aligned with.

    Args:
        references: reference views of the map, with or without patches.
        camera: pinhole camera of map and image.
        covariance_scale: factor on the covariance of aligned poses, from the map's calibration.
        settings: settings and conditions; None: the defaults.
    """

    def __init__(
        self,
        references: ReferenceViews,
        camera: Camera,
        covariance_scale: float = 1.0,
        settings: PatchSettings | None = None,
    ) -> None:
        self._references, self._camera = references, camera
        self._covariance_scale, self._settings = covariance_scale, settings or PatchSettings()
        self._of_view = lru_cache(_KEPT_VIEWS)(self._patches_of)
        self._position = {ident: k for k, ident in enumerate(references.ids)}
        self._window = window_of(self._settings.window_sigma_px)

    def improved(self, image: NDArray[np.uint8], alignment: Alignment) -> Alignment:
        """Return an alignment with the pose at which the patches fit the image best.

        The given one is returned if it failed, if points of this session alone gave it, if the map has no patches, or
        if too few of them fit the image (H, W, 3). Cost and steps stay those of the features.
        """
        T, s = alignment.T_map_camera, self._settings
        if not alignment.success or alignment.carried or T is None:
            return alignment
        patches = self._around(T, self._views(alignment, T))
        if patches is None:
            return alignment
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        start = make_pose(T[:3, :3].T, np.zeros(3))
        A = np.kron(np.eye(2), -T[:3, :3])  # as in map_frame_covariance
        prior = np.zeros((6, 6)) if alignment.covariance is None else A.T @ np.linalg.inv(alignment.covariance) @ A
        fit = self._minimize(grey, patches, start, prior)
        noise = None if fit is None else map_frame_covariance(fit.H / fit.variance + prior, fit.T_camera_local)
        if fit is None or noise is None:
            return alignment
        back = inverse_pose(fit.T_camera_local)
        away_m, away_deg = float(np.linalg.norm(back[:3, 3])), rotation_angle_deg(back[:3, :3].T @ T[:3, :3])
        if away_m > s.max_moved_m or away_deg > s.max_moved_deg:
            return alignment
        back[:3, 3] += T[:3, 3]
        noise, covariance = s.noise_scale * fit.variance**2 * noise, alignment.covariance
        if covariance is not None:
            covariance = self._covariance_scale * covariance + noise
        return replace(alignment, T_map_camera=back, covariance=covariance, by_patches=True, patch_noise=noise)

    def _views(self, alignment: Alignment, T_map_camera: Matrix) -> list[int]:
        """Return the views of an alignment and further ones nearest to its pose, of the same sessions, by number."""
        own, references = [self._position[k] for k in alignment.reference_ids if k in self._position], self._references
        sessions, s = {references.session_of(k) for k in own}, self._settings
        away = view_distances(references.T_map_camera, T_map_camera)
        near = (int(k) for k in np.argsort(away, kind="stable")[: s.max_views] if away[k] < s.farthest_m)
        return list(dict.fromkeys([*own, *(k for k in near if references.session_of(k) in sessions)]))

    def _around(self, T_map_camera: Matrix, positions: list[int]) -> Patches | None:
        """Return the patches of views, relative to a pose; None without any."""
        if not positions:
            return None
        nearness = nearness_of(view_distances(self._references.T_map_camera[positions], T_map_camera))
        parts = [
            replace(view, points=view.points - T_map_camera[:3, 3], confidence=near * view.confidence)
            for k, near in zip(positions, nearness, strict=True)
            if (view := self._of_view(k)) is not None
        ]
        joined = (np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Patches) if parts)
        return Patches(*joined) if parts else None

    def _patches_of(self, position: int) -> Patches | None:
        """Return the patches of a view that have enough contrast, in the map's coordinates; None without any."""
        T, view = self._references.T_map_camera[position], self._references.views[position]
        if view.patches is None:
            return None
        points = view.points.double().cpu().numpy()
        depth = (points - T[:3, 3]) @ T[:3, 2]
        right = depth[:, None] / self._camera.fx * T[:3, 0]
        down = depth[:, None] / self._camera.fy * T[:3, 1]
        values, used = normalised_patches(view.patches.cpu().numpy(), self._settings.min_deviation)
        confidence = view.confidence.double().cpu().numpy()
        return Patches(points[used], right[used], down[used], values[used], confidence[used])

    def _minimize(self, grey: Floats, patches: Patches, start: Matrix, prior: Matrix) -> PatchFit | None:
        """Return the pose after Gauss-Newton; None if the patches do not fit the image there, or diverge.

        Args:
            grey, patches: image (H, W), and patches to align.
            start, prior: pose to start from, (4, 4), and information (6, 6) of (dt, dw) there.
        """
        s, first, dissimilarity = self._settings, -np.inf, np.empty(len(patches.points))
        if runs_compiled():
            T, H = np.array(start, dtype=np.float64), np.empty((6, 6))
            rule = np.array([s.max_iterations, s.step_m, s.step_rad, s.longest_step_m, s.even_dissimilarity])
            args = *self._arguments(grey, patches, T, dissimilarity), np.ascontiguousarray(prior), rule, H
            variance, first, last = patch_kernels.fit_patches(*args)
            if variance < 0 or not np.isfinite(T).all():
                return None
        else:
            T = start
            for iteration in range(s.max_iterations + 1):
                H, g = patch_equations(*self._arguments(grey, patches, T, dissimilarity))
                variance, last = self._variance(dissimilarity, patches), self._fit(dissimilarity, patches)
                first = last if iteration == 0 else first
                if iteration == s.max_iterations:
                    break
                since_start = T @ inverse_pose(start)
                away = np.concatenate([since_start[:3, 3], so3_log(since_start[:3, :3])])
                weighted = variance * (variance / s.even_dissimilarity) ** 4 * prior
                A, b = H + weighted, g + weighted @ away
                try:
                    step = -np.linalg.solve(A + 1e-6 * np.diag(np.diag(A)) + 1e-12 * np.eye(6), b)
                except np.linalg.LinAlgError:
                    return None
                if not np.isfinite(step).all():
                    return None
                step *= min(1.0, s.longest_step_m / max(float(np.linalg.norm(step[:3])), 1e-12))
                T = left_update(T, step)
                is_small = np.linalg.norm(step[:3]) < s.step_m and np.linalg.norm(step[3:]) < s.step_rad
                if iteration > 0 and is_small:
                    break
        agreeing = int(((dissimilarity >= 0) & (dissimilarity < s.agreeing)).sum())
        return PatchFit(T, H, max(variance, 1e-6)) if agreeing >= s.min_agreeing and last > first else None

    def _variance(self, dissimilarity: Doubles, patches: Patches) -> float:
        """Return the mean dissimilarity of the patches that the loss lets count."""
        weight = (
            (dissimilarity >= 0) * patches.confidence / (1 + dissimilarity / (2 * self._settings.loss_scale**2)) ** 2
        )
        return float(weight @ dissimilarity / max(float(weight.sum()), 1e-9))

    def _fit(self, dissimilarity: Doubles, patches: Patches) -> float:
        """Return how well the patches fit the image: the sum of the robust scores that the iterations increase."""
        squared = np.where(dissimilarity < 0, np.inf, dissimilarity)
        return float((patches.confidence / (1 + squared / (2 * self._settings.loss_scale**2))).sum())

    def _arguments(self, grey: Floats, patches: Patches, T: Matrix, dissimilarity: Doubles) -> tuple[Any, ...]:
        """Return the arguments of :func:`patch_equations` at a pose."""
        p, scale = patches, self._settings.loss_scale
        intrinsics = np.array([self._camera.fx, self._camera.fy, self._camera.cx, self._camera.cy])
        at = p.points, p.right, p.down, p.values, self._window, p.confidence, T, intrinsics
        return grey, *at, scale, NEAR_M, dissimilarity


def with_patches(
    points: ReferencePoints, image: NDArray[np.uint8], camera: Camera, T_map_camera: Matrix
) -> ReferencePoints:
    """Return reference points with the patches around them.

    Args:
        points: points of one view, at whole pixels of it, at least ``PATCH_RADIUS`` from the border.
        image: (H, W, 3) RGB image of the view.
        camera: pinhole camera of the image.
        T_map_camera: pose of the view, (4, 4).
    """
    local = (points.points.double().cpu().numpy() - T_map_camera[:3, 3]) @ T_map_camera[:3, :3]
    at = local[:, :2] / local[:, 2:] * (camera.fx, camera.fy) + (camera.cx, camera.cy)
    limit = np.array([camera.width, camera.height]) - 1 - PATCH_RADIUS
    columns, rows = np.clip(np.rint(at).astype(np.int64), PATCH_RADIUS, limit).T
    span = np.arange(-PATCH_RADIUS, PATCH_RADIUS + 1)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    patches = grey[rows[:, None, None] + span[:, None], columns[:, None, None] + span]
    return replace(points, patches=torch.from_numpy(patches.reshape(len(points), PATCH_SIDE**2)))


def patch_equations(
    image: Floats,
    points: Doubles,
    right: Doubles,
    down: Doubles,
    patches: Floats,
    window: Floats,
    confidence: Doubles,
    T: Doubles,
    intrinsics: Doubles,
    loss_scale: float,
    near_m: float,
    dissimilarity: Doubles,
) -> tuple[Doubles, Doubles]:
    """Return H (6, 6) and g (6,) of patches over the left perturbation (dt, dw); write (N,) ``dissimilarity``.

    The dissimilarity of a patch is the mean squared difference of normalised grey values, weighted by the window: about
    twice one minus the correlation. It is -1 where the patch is not in view. The loss of a patch is that of Geman and
    McClure. A compiled version is in :mod:`kfloc_ros.pixloc.patch_kernels`.

    Args:
        image: (H, W) grey values.
        points: (N, 3) metres.
        right, down: (N, 3) metres from the point to its neighbours by one pixel in its reference view.
        patches: (N, side^2) grey values with mean 0 and standard deviation 1.
        window: (side^2,) weights with sum 1.
        confidence: (N,) of the points.
        T: (4, 4) ``T_camera_local``.
        intrinsics: fx, fy, cx, cy in pixels.
        loss_scale: scale of the loss.
        near_m: smallest depth.
        dissimilarity: (N,), written.
    """
    fx, fy, cx, cy = intrinsics
    local = points @ T[:3, :3].T + T[:3, 3]
    z = np.maximum(local[:, 2], near_m)
    x, y = local[:, 0] / z, local[:, 1] / z

    def derivative(axis: Doubles) -> Doubles:
        moved = axis @ T[:3, :3].T
        return np.stack([fx * (moved[:, 0] - x * moved[:, 2]) / z, fy * (moved[:, 1] - y * moved[:, 2]) / z], axis=1)

    warp = np.stack([derivative(right), derivative(down)], axis=2)  # (N, 2, 2): pixel by pixel of the view
    at = np.stack([fx * x + cx, fy * y + cy], axis=1)
    area = np.linalg.det(warp)
    reach = (PATCH_RADIUS + 1) * np.abs(warp).sum(axis=2)
    size = np.array([image.shape[1], image.shape[0]])
    seen = (local[:, 2] > near_m) & (area > WARP_LIMITS[0]) & (area < WARP_LIMITS[1])
    seen &= (at > reach).all(axis=1) & (at < size - 1.001 - reach).all(axis=1)
    dissimilarity[:] = -1.0
    if not seen.any():
        return np.zeros((6, 6)), np.zeros(6)
    span = np.arange(PATCH_SIDE + 2) - PATCH_RADIUS - 1
    offsets = np.stack(np.meshgrid(span, span), axis=-1).reshape(-1, 2)  # (right, down)
    pixels = (at[seen, None] + np.einsum("nij,kj->nki", warp[seen], offsets)).astype(np.float32)
    sampled = cv2.remap(image, pixels[..., 0], pixels[..., 1], cv2.INTER_LINEAR).astype(np.float64)
    sampled = sampled.reshape(-1, PATCH_SIDE + 2, PATCH_SIDE + 2)
    inner = sampled[:, 1:-1, 1:-1].reshape(len(sampled), -1)
    deviation = np.maximum(inner.std(axis=1, keepdims=True), 1.0)
    error = (inner - inner.mean(axis=1, keepdims=True)) / deviation - patches[seen]
    along = 0.5 * (sampled[:, 1:-1, 2:] - sampled[:, 1:-1, :-2]).reshape(len(sampled), -1)
    across = 0.5 * (sampled[:, 2:, 1:-1] - sampled[:, :-2, 1:-1]).reshape(len(sampled), -1)
    slopes = np.stack([along, across], axis=2)
    slopes = (slopes - slopes.mean(axis=1, keepdims=True)) / deviation[:, :, None]
    slopes = slopes @ np.linalg.inv(warp[seen])  # along the image's axes
    squared = (window * error**2).sum(axis=1)
    dissimilarity[seen] = squared
    weight = confidence[seen] / (1 + squared / (2 * loss_scale**2)) ** 2
    tensor = np.einsum("nki,nkj,k,n->nij", slopes, slopes, window, weight)
    slope = np.einsum("nki,nk,k,n->ni", slopes, error, window, weight)
    x, y, z = x[seen], y[seen], z[seen]
    zero = np.zeros_like(z)
    J_u = fx * np.stack([1 / z, zero, -x / z, -x * y, 1 + x * x, -y], axis=1)
    J_v = fy * np.stack([zero, 1 / z, -y / z, -(1 + y * y), x * y, x], axis=1)
    J = np.stack([J_u, J_v], axis=1)
    return np.einsum("nia,nij,njb->ab", J, tensor, J), np.einsum("nia,ni->a", J, slope)
