# SPDX-License-Identifier: Apache-2.0
"""Points of this session's own images, with depths that are filtered from frame to frame.

Where a map shows little of a view, or what it shows has changed, the images of the last seconds still show it. A point
is a pixel of an earlier image, its anchor, with the image's features and an inverse depth. Every later image with a
pose in which the point finds itself measures the depth (a Kalman filter in one dimension, along the epipolar line).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import has_numba
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.pixloc.cost import NEAR_M, FeatureImage
from kfloc_ros.pixloc.point_matching import search_points
from kfloc_ros.pixloc.references import ReferencePoints, choose_points

Doubles = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class SessionPointSettings:
    """Number and quality of the points."""

    per_image: int = 300
    """Points that an image keeps in view; fewer are replenished."""
    max_points: int = 1500
    match_sigma_px: float = 3.0
    """Standard deviation of a match, with the relative errors of two poses."""
    max_off_line_px: float = 8.0
    """Largest distance of a match from the epipolar line."""
    near_sigma: float = 0.15
    """Relative standard deviation of an inverse depth that is taken from a point of the map nearby."""
    far_sigma: float = 0.5
    """The same, if it is taken from the middle depth of the image."""
    least_sigma: float = 0.02
    """Smallest relative standard deviation: errors of the poses do not average out."""
    near_px: float = 32.0
    """Largest distance of a point of the map that lends its depth."""
    apart_px: float = 10.0
    """Smallest distance between a new point and the others."""
    max_misses: int = 3
    """Consecutive images in which a point does not find itself, after which it is dropped."""
    usable_px: float = 12.0
    """Largest standard deviation of a usable point's place in an image."""


@dataclass(eq=False)
class _Points:
    """Columns of the points; all arrays have N rows."""

    centre: Doubles
    """(N, 3) anchor's camera centre, metres, map frame."""
    ray: Doubles
    """(N, 3) viewing ray in the map frame, of depth 1 along the anchor's optical axis."""
    inverse_depth: Doubles
    """1/m"""
    variance: Doubles
    """Variance of the inverse depth, 1/m2."""
    misses: NDArray[np.int64]
    coarse: torch.Tensor
    """(N, 64) unit features."""
    fine: torch.Tensor
    """(N, 24) unit features."""
    confidence: torch.Tensor

    def __len__(self) -> int:
        return len(self.inverse_depth)

    @property
    def positions(self) -> Doubles:
        """(N, 3) metres, map frame."""
        return self.centre + self.ray / self.inverse_depth[:, None]

    def __getitem__(self, keep: Booleans | NDArray[np.int64]) -> _Points:
        rows = torch.from_numpy(keep).to(self.coarse.device)
        return _Points(
            self.centre[keep],
            self.ray[keep],
            self.inverse_depth[keep],
            self.variance[keep],
            self.misses[keep],
            self.coarse[rows],
            self.fine[rows],
            self.confidence[rows],
        )

    def joined(self, other: _Points) -> _Points:
        """Return these points and others."""
        return _Points(
            np.concatenate([self.centre, other.centre]),
            np.concatenate([self.ray, other.ray]),
            np.concatenate([self.inverse_depth, other.inverse_depth]),
            np.concatenate([self.variance, other.variance]),
            np.concatenate([self.misses, other.misses]),
            torch.cat([self.coarse, other.coarse]),
            torch.cat([self.fine, other.fine]),
            torch.cat([self.confidence, other.confidence]),
        )


class SessionPoints:
    """Points of the last images of one camera.

    Args:
        camera: pinhole camera of the images.
        settings: number and quality of the points; None: the defaults.
    """

    def __init__(self, camera: Camera, settings: SessionPointSettings | None = None) -> None:
        self._camera = camera
        self._settings = settings or SessionPointSettings()
        self._points: _Points | None = None

    def __len__(self) -> int:
        return 0 if self._points is None else len(self._points)

    def reset(self) -> None:
        """Drop all points."""
        self._points = None

    def usable(self, T_map_camera: Matrix) -> ReferencePoints | None:
        """Return the points in view whose places in the image are known; None if there are none.

        Args:
            T_map_camera: pose of the image, (4, 4), good to the width of a search window.
        """
        points = self._points
        if points is None:
            return None
        _, slope, in_view = self._project(points, T_map_camera)
        spread_px = np.linalg.norm(slope, axis=1) * np.sqrt(points.variance)
        usable = in_view & (spread_px < self._settings.usable_px)
        chosen = points[usable]
        if not len(chosen):
            return None
        positions = torch.from_numpy(chosen.positions).float().to(chosen.coarse.device)
        certainty = 1.0 / (1.0 + (spread_px[usable] / self._settings.match_sigma_px) ** 2)
        confidence = chosen.confidence * torch.from_numpy(certainty).to(chosen.confidence)
        return ReferencePoints(positions, chosen.coarse, chosen.fine, confidence)

    def all(self) -> tuple[torch.Tensor, Doubles]:
        """Return the coarse features (N, 64) of all points, and their positions (N, 3), metres, map frame."""
        if self._points is None:
            return torch.zeros(0, 64), np.zeros((0, 3))
        return self._points.coarse, self._points.positions

    def places(self, T_map_camera: Matrix) -> tuple[Doubles, Booleans]:
        """Return the pixels (N, 2) of all points in an image of a pose (4, 4), and (N,) bool: in view."""
        if self._points is None:
            return np.zeros((0, 2)), np.zeros(0, dtype=bool)
        at, _, in_view = self._project(self._points, T_map_camera)
        return at, in_view

    def displacement_px(self, before: Matrix, now: Matrix) -> float:
        """Return how far the points move in the image between two poses (4, 4), in the median.

        One that leaves the image has moved by its width, and so has everything if nothing was in view.
        """
        width = float(self._camera.width)
        (at, in_view), (later, stays) = self.places(before), self.places(now)
        moved = np.where(stays, np.linalg.norm(later - at, axis=1), width)[in_view]
        return float(np.median(moved)) if len(moved) else width

    def observe(self, images: tuple[FeatureImage, FeatureImage], T_map_camera: Matrix, mapped: ReferencePoints) -> None:
        """Measure the depths of the points in an image, drop those that are gone, and add new ones.

        Args:
            images: coarse and fine level of the image.
            T_map_camera: pose of the image, (4, 4).
            mapped: points of the map around the view; they lend their depths to new points.
        """
        if self._points is not None:
            self._points = self._measured(self._points, images, T_map_camera)
        self._add(images, T_map_camera, mapped)

    def _measured(self, points: _Points, images: tuple[FeatureImage, FeatureImage], T_map_camera: Matrix) -> _Points:
        s = self._settings
        at, slope, in_view = self._project(points, T_map_camera)
        seen = np.flatnonzero(in_view)
        if not len(seen):
            return points
        chosen = points[seen]
        # coordinates relative to the camera: float32 is not exact enough far from the map's origin
        local = torch.from_numpy(chosen.positions - T_map_camera[:3, 3]).to(chosen.coarse)
        T_camera_local = make_pose(T_map_camera[:3, :3].T, np.zeros(3))
        features = chosen.coarse, chosen.fine
        matches = search_points(images, local, features, chosen.confidence, T_camera_local, self._camera)
        found = matches.weights.cpu().numpy() > 0
        error = matches.pixels.double().cpu().numpy() - at[seen]
        J, variance = slope[seen], points.variance[seen]
        squared = np.maximum((J**2).sum(axis=1), 1e-12)
        along = (J * error).sum(axis=1)
        off_line = np.sqrt(np.maximum((error**2).sum(axis=1) - along**2 / squared, 0.0))
        expected = 3.0 * np.sqrt(variance * squared + s.match_sigma_px**2)
        is_match = found & (off_line < s.max_off_line_px) & (np.abs(along) / np.sqrt(squared) < expected)
        better = 1.0 / (1.0 / variance + squared / s.match_sigma_px**2)
        rho = points.inverse_depth[seen] + better * along / s.match_sigma_px**2
        is_match &= rho > 1e-3
        better = np.maximum(better, np.minimum(variance, (s.least_sigma * rho) ** 2))
        points.inverse_depth[seen] = np.where(is_match, rho, points.inverse_depth[seen])
        points.variance[seen] = np.where(is_match, better, variance)
        points.misses[seen] = np.where(is_match, 0, points.misses[seen] + 1)
        return points[points.misses < s.max_misses]

    def _add(self, images: tuple[FeatureImage, FeatureImage], T_map_camera: Matrix, mapped: ReferencePoints) -> None:
        s, camera, old = self._settings, self._camera, self._points
        taken = np.zeros((0, 2))
        if old is not None:
            at, _, in_view = self._project(old, T_map_camera)
            taken = at[in_view]
        wanted = s.per_image - len(taken)
        if wanted < s.per_image // 4:
            return
        chosen, coarse, fine, confidence = choose_points(images, s.per_image)
        pixels = chosen.double().cpu().numpy()
        if len(taken):
            _, distance = _nearest(pixels, taken)
            free = np.flatnonzero(distance > s.apart_px)[:wanted]
            rows = torch.from_numpy(free).to(coarse.device)
            pixels, coarse, fine, confidence = pixels[free], coarse[rows], fine[rows], confidence[rows]
        if not len(pixels):
            return
        depth_m, sigma = self.depths(pixels, T_map_camera, mapped)
        x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
        ray = np.stack([x, y, np.ones_like(x)], axis=1) @ T_map_camera[:3, :3].T
        new = _Points(
            np.repeat(T_map_camera[None, :3, 3], len(ray), axis=0),
            ray,
            1.0 / depth_m,
            (sigma / depth_m) ** 2,
            np.zeros(len(ray), dtype=np.int64),
            coarse,
            fine,
            confidence,
        )
        joined = new if old is None else old.joined(new)
        self._points = joined[np.arange(max(0, len(joined) - s.max_points), len(joined))]

    def depths(self, pixels: Doubles, T_map_camera: Matrix, mapped: ReferencePoints) -> tuple[Doubles, Doubles]:
        """Return depths (N,), metres, and relative standard deviations (N,), of pixels (N, 2) of an image with a pose.

        They are those of points nearby, of this session or of the map; the usual depth where there is none.
        """
        s, camera = self._settings, self._camera
        back = inverse_pose(T_map_camera)
        local = mapped.points.double().cpu().numpy() @ back[:3, :3].T + back[:3, 3]
        own = self._points
        if own is not None:
            close = np.sqrt(own.variance) < s.near_sigma * own.inverse_depth
            local = np.concatenate([local, own.positions[close] @ back[:3, :3].T + back[:3, 3]])
        local = local[local[:, 2] > NEAR_M]
        at = local[:, :2] / local[:, 2:] * (camera.fx, camera.fy) + (camera.cx, camera.cy)
        inside = (at > 0).all(axis=1) & (at < (camera.width, camera.height)).all(axis=1)
        at, depth = at[inside], local[inside, 2]
        if not len(at):
            return np.full(len(pixels), 2.0), np.full(len(pixels), 2 * s.far_sigma)
        nearest, distance = _nearest(pixels, at)
        lends = distance < s.near_px
        return np.where(lends, depth[nearest], np.median(depth)), np.where(lends, s.near_sigma, s.far_sigma)

    def _project(self, points: _Points, T_map_camera: Matrix) -> tuple[Doubles, Doubles, Booleans]:
        """Return pixels (N, 2), their derivatives (N, 2) by the inverse depths, and (N,) bool: in view."""
        camera, R = self._camera, T_map_camera[:3, :3]
        local = (points.positions - T_map_camera[:3, 3]) @ R
        moves = -(points.ray @ R) / (points.inverse_depth**2)[:, None]
        z = np.maximum(local[:, 2], NEAR_M)
        u, v = local[:, 0] / z, local[:, 1] / z
        at = np.stack([camera.fx * u + camera.cx, camera.fy * v + camera.cy], axis=1)
        slope = np.stack(
            [
                camera.fx * (moves[:, 0] - u * moves[:, 2]) / z,
                camera.fy * (moves[:, 1] - v * moves[:, 2]) / z,
            ],
            axis=1,
        )
        in_view = (local[:, 2] > NEAR_M) & (at > 8).all(axis=1)
        in_view &= (at[:, 0] < camera.width - 9) & (at[:, 1] < camera.height - 9)
        return at, slope, in_view


def _nearest(pixels: Doubles, others: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """Return, for each pixel (N, 2), the index of the nearest of others (M, 2), at least one, and its distance."""
    if has_numba():
        from kfloc_ros.pixloc import point_kernels

        return point_kernels.nearest(np.ascontiguousarray(pixels), np.ascontiguousarray(others))
    distance = np.linalg.norm(pixels[:, None] - others[None], axis=2)
    index = distance.argmin(axis=1)
    return index, distance[np.arange(len(pixels)), index]
