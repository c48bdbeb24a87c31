# SPDX-License-Identifier: Apache-2.0
"""Matches of reference points near a pose: every point searches the image for itself; a robust fit gives the pose.

An alignment descends from its start into the nearest local minimum of the summed feature differences. Content that has
changed since the map was made, and points on depth edges, pull it away by centimetres. A point that searches its own
neighbourhood finds itself wherever the start was, or contradicts the others and loses its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import has_numba, runs_compiled
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc.cost import (
    NEAR_M,
    OFFSETS,
    POSE,
    FeatureImage,
    Intrinsics,
    project,
    projection_derivatives,
)
from kfloc_ros.pixloc.optimizer import fitted, left_update

SEARCH_CELLS = 3
"""Half side of the searched window in cells of the coarse level (24 px)."""
WIDE_SEARCH_CELLS = 6
"""Half side of the window for a second try (48 px)."""
FINE_CELLS = 2
"""Half side of the window in cells of the fine level, around the place found at the coarse level."""
MIN_SIMILARITY = 0.6
"""Smallest cosine of coarse features of a match."""
MIN_MATCHES = 30
MIN_CAMERA_MATCHES, MAX_CAMERA_MATCHES = 60, 300
"""Fewest matches that a camera is fitted to, and the number from which only a part of them is used."""
CAMERA_SCALES_PX, STEPS_PER_CAMERA_SCALE = (24.0, 12.0, 6.0), 4
"""Scales of the loss, and steps for each, if the camera is fitted, too: its mistakes displace points further."""
SMALL_GAIN = 0.03
"""Expected decrease of the weighted squared errors, relative to the squared scale, below which no more step is made."""
MAX_CAMERA_STEP = 1.0
"""Step in metres or radians that no fit near its start takes."""
AGREEING_PX = 8.0
"""Largest error of a match that agrees with a pose: one cell."""

AGREEING_BY_CHANCE = 0.3
"""Share of found points that agree with the pose fitted to them at a wrong place.

Measured on four maps (demo room, RedKitchen, d435_office), with mirrored images, images of another room and poses
elsewhere in the map: the median is 0.25 to 0.30."""
POINTS_PER_INDEPENDENT_ONE = 4.0
"""Number of points that count as one independent observation, since points of several views show the same corners."""


@dataclass(frozen=True, eq=False)
class PointMatches:
    """Places in an image where reference points were found."""

    pixels: torch.Tensor
    """(N, 2) pixels."""
    weights: torch.Tensor
    """(N,) cosine of the features times the point's confidence; 0 for points that were not found."""


@dataclass(frozen=True, eq=False)
class MatchedPose:
    """Pose that most matches agree with."""

    T_camera_local: Matrix
    agreement: torch.Tensor
    """(N,) in (0, 1): weight of each reference point, small where it contradicts the pose, 0 where it was not found."""
    found_count: int
    agreeing_count: int

    @property
    def support(self) -> float:
        """Support of the pose by all points; see :func:`support_of`."""
        return support_of(self.found_count, self.agreeing_count)

    def support_by(self, first: int) -> float:
        """Return the support by the first points alone."""
        part = self.agreement[:first]
        return support_of(int((part > 0).sum()), int((part > AGREEMENT_AT_LIMIT).sum()))


AGREEMENT_AT_LIMIT = 0.25
"""Agreement of a match with an error of ``AGREEING_PX``."""


def support_of(found: int, agreeing: int) -> float:
    """Return the support by points: standard deviations of the number that agrees above that of a wrong place."""
    expected = AGREEING_BY_CHANCE * found
    variance = POINTS_PER_INDEPENDENT_ONE * expected * (1 - AGREEING_BY_CHANCE)
    return (agreeing - expected) / math.sqrt(max(variance, 1e-9))


def search_points(
    images: Sequence[FeatureImage],
    points: torch.Tensor,
    features: Sequence[torch.Tensor],
    confidence: torch.Tensor,
    T_camera_local: Matrix,
    camera: Camera,
    search_cells: int = SEARCH_CELLS,
) -> PointMatches:
    """Search every reference point around its projection: the most similar coarse cell, then the most similar fine one.

    Places between cells come from a parabola through the neighbours' similarities.

    Args:
        images: coarse and fine level of the image.
        points: (N, 3) metres, in the local frame.
        features: coarse and fine reference features of the points, each (N, C).
        confidence: (N,) confidence of the points.
        T_camera_local: pose at which the points are projected, (4, 4).
        camera: pinhole camera of the image.
        search_cells: half side of the searched window in cells of the coarse level.
    """
    coarse, fine = images
    tensors = coarse.features, fine.features, points, *features, confidence
    if runs_compiled(*tensors):
        from kfloc_ros.pixloc import point_kernels

        cells, finer, cloud, *wanted, trust = (values.contiguous().numpy() for values in tensors)
        strides = np.array([coarse.stride, fine.stride], dtype=np.float32)
        T, K = T_camera_local.astype(np.float32), np.array([camera.fx, camera.fy, camera.cx, camera.cy], np.float32)
        pixels, weights = torch.empty(len(points), 2), torch.empty(len(points))
        point_kernels.search(
            cells, finer, strides, cloud, wanted[0], wanted[1], trust, np.ascontiguousarray(T), K, NEAR_M,
            (search_cells, FINE_CELLS), MIN_SIMILARITY, pixels.numpy(), weights.numpy(),
        )  # fmt: skip
        return PointMatches(pixels, weights)
    at, _, in_front = project(points, torch.from_numpy(T_camera_local).to(points), camera, coarse.stride)
    u, v = at.unbind(-1)
    inside = in_front & (u > 0) & (u < coarse.width - 1) & (v > 0) & (v < coarse.height - 1)
    at = torch.where(inside[:, None], at, 0.0)
    found, similarity, at_border = best_cells(coarse, features[0], at, search_cells)
    pixels = (found + 0.5) * coarse.stride - 0.5
    found, _, _ = best_cells(fine, features[1], (pixels + 0.5) / fine.stride - 0.5, FINE_CELLS)
    pixels = (found + 0.5) * fine.stride - 0.5
    is_match = inside & ~at_border & (similarity > MIN_SIMILARITY)
    return PointMatches(pixels, confidence * similarity.clamp(min=0.0) * is_match)


def fit_pose(matches: PointMatches, points: torch.Tensor, T_camera_local: Matrix, camera: Camera) -> MatchedPose | None:
    """Fit the pose near a given one to matches, by Gauss-Newton with the loss of Geman and McClure.

    Args:
        matches: matches of the points.
        points: (N, 3) metres, in the local frame.
        T_camera_local: pose to start from, (4, 4).
        camera: pinhole camera of the image.

    Returns:
        None if there are too few matches, or they do not fix the pose.
    """
    pixels, chosen, weights = (values.cpu().numpy() for values in (matches.pixels, points, matches.weights))
    used = weights > 0
    found_count = int(used.sum())
    if found_count < MIN_MATCHES:
        return None
    pixels, chosen, weights = (values[used].astype(np.float64) for values in (pixels, chosen, weights))
    squared = np.zeros(found_count)
    T = fitted(pixels, chosen, weights, T_camera_local, camera, squared)
    if T is None:
        return None
    agreement = np.zeros(len(used), dtype=np.float32)
    agreement[used] = 1 / (1 + squared / AGREEING_PX**2) ** 2
    return MatchedPose(
        T, torch.from_numpy(agreement).to(matches.weights), found_count, int((squared < AGREEING_PX**2).sum())
    )


def fit_pose_and_camera(
    matches: PointMatches,
    points: torch.Tensor,
    T_camera_local: Matrix,
    camera: Camera,
    prior_sigma: NDArray[np.float64],
) -> tuple[Matrix, NDArray[np.float64]] | None:
    """Fit pose and camera to places where points were found, by Gauss-Newton with the loss of Geman and McClure.

    Points find themselves tens of pixels away; the minima of an alignment are nearer.

    Args:
        matches: places of the points in the image.
        points: (N, 3) metres, in a frame near the camera.
        T_camera_local: pose to start from, (4, 4).
        camera: pinhole camera of the map.
        prior_sigma: (6,) standard deviations of the prior on the camera's ``OFFSETS``.

    Returns:
        The pose (4, 4) and the ``OFFSETS`` (6,); None if too few points were found, or they do not fix them.
    """
    used = torch.nonzero(matches.weights > 0)[:, 0]
    if len(used) < MIN_CAMERA_MATCHES:
        return None
    used = used[:: max(len(used) // MAX_CAMERA_MATCHES, 1)]
    pixels, chosen, weights = (v[used].double().cpu().numpy() for v in (matches.pixels, points, matches.weights))
    if not has_numba():
        return fitted_with_camera_step_by_step(pixels, chosen, weights, T_camera_local, camera, prior_sigma)
    from kfloc_ros.pixloc import point_kernels

    T, offsets = np.array(T_camera_local, dtype=np.float64), np.zeros(len(OFFSETS))
    of_camera, scales_px = np.array([camera.fx, camera.fy, camera.cx, camera.cy]), np.array(CAMERA_SCALES_PX)
    limits = STEPS_PER_CAMERA_SCALE, NEAR_M, MAX_CAMERA_STEP, SMALL_GAIN
    is_fixed = point_kernels.fit_matches_and_camera(
        pixels, chosen, weights, T, offsets, of_camera, prior_sigma**-2, scales_px, *limits
    )
    return (T, offsets) if is_fixed else None


def fitted_with_camera_step_by_step(
    pixels: NDArray[np.float64],
    chosen: NDArray[np.float64],
    weights: NDArray[np.float64],
    T_camera_local: Matrix,
    camera: Camera,
    prior_sigma: NDArray[np.float64],
) -> tuple[Matrix, NDArray[np.float64]] | None:
    """Return what the compiled loop returns, but for rounding."""
    T, offsets = T_camera_local, np.zeros(len(OFFSETS))
    for scale_px in CAMERA_SCALES_PX:
        for _ in range(STEPS_PER_CAMERA_SCALE):
            at, J, in_front = projection_derivatives(chosen, T, Intrinsics.of(camera, 1.0, offsets))
            error = at - pixels
            weight = weights * in_front / (1.0 + (error**2).sum(axis=1) / scale_px**2) ** 2
            JW = (J * weight[:, None, None]).reshape(-1, J.shape[2])
            H, g = JW.T @ J.reshape(-1, J.shape[2]), JW.T @ error.reshape(-1)
            precision = scale_px**2 * prior_sigma**-2
            H[POSE:, POSE:] += np.diag(precision)
            g[POSE:] += precision * offsets
            try:
                step = -np.linalg.solve(H + 1e-9 * np.diag(np.diag(H)) + 1e-9 * np.eye(len(H)), g)
            except np.linalg.LinAlgError:
                return None
            if not np.isfinite(step).all() or np.abs(step[:POSE]).max() > MAX_CAMERA_STEP:
                return None
            T, offsets = left_update(T, step[:POSE]), offsets + step[POSE:]
            if -float(g @ step) < SMALL_GAIN * scale_px**2:
                break
    return T, offsets


def best_cells(
    image: FeatureImage, features: torch.Tensor, at: torch.Tensor, radius: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the most similar places (N, 2) around cells, their cosines (N,), and (N,) bool, at the window's border.

    Args:
        image: feature level.
        features: (N, C) wanted features.
        at: (N, 2) cells around which to search.
        radius: half side of the searched window in cells, at least 1.
    """
    if runs_compiled(image.features, features, at):
        from kfloc_ros.pixloc import point_kernels

        place, similarity = torch.empty(len(at), 2), torch.empty(len(at))
        at_border = torch.empty(len(at), dtype=torch.bool)
        wanted, around = features.contiguous().numpy(), at.contiguous().numpy()
        outputs = (place.numpy(), similarity.numpy(), at_border.numpy())
        point_kernels.best_cells(image.features.numpy(), wanted, around, radius, *outputs)
        return place, similarity, at_border
    side = 2 * radius + 1
    centre = at.round().long()
    span = torch.arange(-radius, radius + 1, device=at.device)
    u = (centre[:, 0, None] + span).clamp(0, image.width - 1)
    v = (centre[:, 1, None] + span).clamp(0, image.height - 1)
    cells = image.features[v[:, :, None], u[:, None, :]].reshape(len(at), side * side, image.channels)
    cosines = torch.bmm(cells, features[:, :, None])[:, :, 0]
    best, index = cosines.max(dim=1)
    row, column = index // side, index % side
    window, n = cosines.reshape(-1, side, side), torch.arange(len(at), device=at.device)
    i, j = row.clamp(1, side - 2), column.clamp(1, side - 2)
    du = _vertex(window[n, i, j - 1], window[n, i, j], window[n, i, j + 1])
    dv = _vertex(window[n, i - 1, j], window[n, i, j], window[n, i + 1, j])
    place = centre + torch.stack([column, row], dim=1) - radius + torch.stack([du, dv], dim=1)
    return place, best, (row != i) | (column != j)


def _vertex(before: torch.Tensor, middle: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the offset of the vertex of parabolas through three equidistant values, at most half a cell."""
    bend = before - 2 * middle + after
    return torch.where(bend < -1e-6, 0.5 * (before - after) / bend.clamp(max=-1e-6), 0.0).clamp(-0.5, 0.5)
