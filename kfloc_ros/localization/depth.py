# SPDX-License-Identifier: Apache-2.0
"""Depth of the query image as a measurement: evidence against poses, and residuals that correct them.

An image alone cannot tell a room from a print of it, nor a place from one of another size. Its depth can. Points of the
map that look as in the image, or whose scene coordinates agree with the pose, are projected, and their distances along
the optical axis are compared with the measured ones. Points that something else hides do not look alike, so that a
person in front of the camera does not count.

A pose is corrected by the same distances, as one more factor beside what the image knows of it: ``d = (1 + s) Z(x)``
for a measured depth d, the distance Z of the point at the pose x, and an unknown scale s that all points of an image
share (sensors are wrong by about a percent).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.kfnet.pnp import PnpSettings, choose_cells
from kfloc_ros.pixloc.references import ReferencePoints
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment, CoarsePose, Matrix, PoseEstimate, SceneCoordinates, TrackingState

SIMILARITY = 0.6
"""Smallest similarity of a reference point to its cell of the image, so that its depth is compared."""
MIN_POINTS = 40
"""Smallest number of compared points."""
FAR_LOG, FAR_M = 0.2, 0.15
"""A depth contradicts the map beyond both: logarithm of the ratio of the two distances, and their difference."""
REFUSED_SHARE = 0.5
"""Share of contradicting points beyond which a pose is refused."""
SCALE_LOG, SCALE_SPREAD = 0.06, 0.06
"""The scale of an image is wrong if the median logarithm of the ratios is beyond the first, and their median absolute
deviation from it below the second."""
WINDOW_PX, MIN_MEASURED, EDGE_LOG = 2, 3, 0.08
"""Depth is looked up within so many pixels, since edges of depth images are a pixel or two off; needed pixels with
depth; relative difference of the depths in a window from which an edge runs through it."""
SIGMA_M, SIGMA_PER_M2 = 0.01, 0.005
"""Standard deviation of a depth d: the first plus the second times d squared, as of stereo and structured light."""
MAP_SIGMA_M = 0.02
"""Standard deviation of a reference point of the map along the ray."""
SCALE_SIGMA = 0.01
"""Standard deviation of the scale that all depths of an image share."""
INDEPENDENT = 50.0
"""Number of independent depths of an image: neighbours share their errors."""
ITERATIONS = 6


@dataclass(frozen=True, eq=False)
class DepthPairs:
    """Points of the map with the depth that the image measures for them."""

    points: NDArray[np.float64]
    """(N, 3) metres, map frame."""
    depth_m: NDArray[np.float64]
    """(N,) measured."""
    sigma_m: NDArray[np.float64]
    """(N,) standard deviation of the difference."""
    log_ratio: NDArray[np.float64]
    """(N,) logarithm of the measured distance over that of the map at the pose."""

    def __len__(self) -> int:
        return len(self.points)

    @property
    def contradiction(self) -> str:
        """Sentence if the depth excludes the pose, else empty."""
        if len(self) < MIN_POINTS:
            return ""
        apart_m = self.depth_m * np.abs(1.0 - np.exp(-self.log_ratio))
        far = (np.abs(self.log_ratio) > FAR_LOG) & (apart_m > FAR_M)
        share = float(far.mean())
        if share <= REFUSED_SHARE:
            return ""
        middle = float(np.median(self.log_ratio))
        if float(np.median(np.abs(self.log_ratio - middle))) <= SCALE_SPREAD:
            return (
                f"the depth contradicts the map: {100 * share:.0f} % of the points that look alike are at another "
                f"distance, {_factor(middle)} times that in the map: the unit of the depth (16-bit counts are "
                "millimetres, floats metres) or the scale of the map is wrong"
            )
        seen_m, known_m = (float(np.median(d[far])) for d in (self.depth_m, self.depth_m * np.exp(-self.log_ratio)))
        return (
            f"the depth contradicts the map: {100 * share:.0f} % of the points that look alike are at another distance "
            f"(in the median {seen_m:.2f} m away, and {known_m:.2f} m in the map): a print, or a place that looks alike"
        )

    @property
    def scale_fault(self) -> str:
        """Sentence if all depths are longer or shorter than in the map by one factor, else empty."""
        if len(self) < MIN_POINTS or self.contradiction:
            return ""
        middle = float(np.median(self.log_ratio))
        spread = float(np.median(np.abs(self.log_ratio - middle)))
        if abs(middle) <= SCALE_LOG or spread > SCALE_SPREAD:
            return ""
        return (
            f"by the depth everything is {math.exp(middle):.2f} times as far away as in the map: the scale of the map, "
            "the calibration or the unit of the depth is wrong, or the pose is too near or too far"
        )


def _factor(log_ratio: float) -> str:
    ratio = math.exp(log_ratio)
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


class DepthCheck:
    """Comparison of depth images with a map.

    Args:
        refiner: aligner of the map's reference views.
        camera: pinhole camera of the map.
    """

    def __init__(self, refiner: Refiner, camera: Camera) -> None:
        self._refiner, self._camera = refiner, camera

    @torch.inference_mode()
    def pairs(self, depth_m: NDArray[np.float32], features: BackboneFeatures, T_map_camera: Matrix) -> DepthPairs:
        """Return reference points in view of a pose (4, 4) that look as in the image, with their depths.

        Args:
            depth_m: (H, W) of the map's camera, 0 where unknown.
            features: backbone features of the image.
            T_map_camera: pose (4, 4).
        """
        references = self._refiner.references
        chosen = references.overlapping(T_map_camera, self._camera, self._refiner.settings.num_references)
        known = ReferencePoints.concatenate([references.views[k] for k in chosen])
        cells = features.coarse[0]
        _, h, w = cells.shape
        points = known.points.double().cpu().numpy()
        x, y, z = ((points - T_map_camera[:3, 3]) @ T_map_camera[:3, :3]).T
        safe = np.where(z > 0.05, z, 1.0)
        u, v = self._camera.fx * x / safe + self._camera.cx, self._camera.fy * y / safe + self._camera.cy
        inside = (z > 0.05) & (u >= 0) & (v >= 0) & (u <= self._camera.width - 1) & (v <= self._camera.height - 1)
        index = np.flatnonzero(inside)
        column = torch.from_numpy(np.minimum(u[index] / COARSE_STRIDE, w - 1).astype(np.int64)).to(cells.device)
        row = torch.from_numpy(np.minimum(v[index] / COARSE_STRIDE, h - 1).astype(np.int64)).to(cells.device)
        here = cells.permute(1, 2, 0)[row, column].float()
        similarity = (here * known.coarse[torch.from_numpy(index).to(cells.device)].float()).sum(1)
        index = index[(similarity > SIMILARITY).cpu().numpy()]
        return _pairs(depth_m, points[index], np.stack([u[index], v[index]], axis=1), z[index], MAP_SIGMA_M)

    def of_alignment(
        self, depth_m: NDArray[np.float32] | None, features: BackboneFeatures, alignment: Alignment
    ) -> Alignment:
        """Return an alignment corrected by the depth; a failed one if the depth excludes its pose."""
        T, covariance = alignment.T_map_camera, alignment.covariance
        if depth_m is None or not alignment.success or T is None or covariance is None:
            return alignment
        pairs = self.pairs(depth_m, features, T)
        if pairs.contradiction:
            return replace(alignment, success=False, reason=pairs.contradiction)
        if len(pairs) < MIN_POINTS or pairs.scale_fault:
            return alignment
        T, covariance = corrected(T, covariance, pairs)
        return replace(alignment, T_map_camera=T, covariance=covariance)

    def of_estimate(
        self, depth_m: NDArray[np.float32] | None, features: BackboneFeatures, estimate: PoseEstimate
    ) -> PoseEstimate:
        """Return an estimate; DEGRADED, with a covariance that includes it, if the depth has another scale."""
        T, covariance = estimate.T_map_camera, estimate.covariance
        if depth_m is None or T is None or covariance is None or estimate.state is not TrackingState.TRACKING:
            return estimate
        pairs = self.pairs(depth_m, features, T)
        if not pairs.scale_fault:
            return estimate
        forward_m = float(np.median(pairs.depth_m)) * abs(1.0 - math.exp(-float(np.median(pairs.log_ratio))))
        wider = covariance.copy()
        wider[:3, :3] += forward_m**2 * np.outer(T[:3, 2], T[:3, 2])
        return replace(estimate, state=TrackingState.DEGRADED, reason=pairs.scale_fault, covariance=wider)


def of_coarse(
    depth_m: NDArray[np.float32], coordinates: SceneCoordinates, pose: CoarsePose, camera: Camera, settings: PnpSettings
) -> CoarsePose:
    """Return a coarse pose corrected by the depth of its inlier cells; a failed one if the depth excludes it."""
    T, covariance = pose.T_map_camera, pose.covariance
    if not pose.success or T is None or covariance is None:
        return pose
    cells = choose_cells(coordinates, settings)
    x, y, z = (cells.points @ inverse_pose(T)[:3, :3].T + inverse_pose(T)[:3, 3]).T
    safe = np.where(z > 0.05, z, 1.0)
    off = np.hypot(
        camera.fx * x / safe + camera.cx - cells.pixels[:, 0], camera.fy * y / safe + camera.cy - cells.pixels[:, 1]
    )
    near = (z > 0.05) & (off <= settings.max_error_px)
    pairs = _pairs(depth_m, cells.points[near], cells.pixels[near], z[near], cells.sigma_m[near])
    if pairs.contradiction:
        return replace(pose, success=False, reason=pairs.contradiction)
    if len(pairs) < MIN_POINTS:
        return pose
    T, covariance = corrected(T, covariance, pairs)
    return replace(pose, T_map_camera=T, covariance=covariance)


def corrected(T_map_camera: Matrix, covariance: Matrix, pairs: DepthPairs) -> tuple[Matrix, Matrix]:
    """Return pose and covariance (6, 6) with the depths as further measurements, by robust Gauss-Newton.

    The covariance is in the order of :mod:`kfloc_ros.types`: ``t + dt``, ``Exp(dr) R``. The distance of a point p then
    changes by ``-z . dt - (q x z) . dr`` for the optical axis z and ``q = p - t``, both in the map frame.
    """
    x, scale = np.zeros(6), 0.0
    prior = np.zeros((7, 7))
    prior[:6, :6] = np.linalg.inv(covariance)
    prior[6, 6] = SCALE_SIGMA**-2
    H = prior
    for _ in range(ITERATIONS):
        R, t = so3_exp(x[3:]) @ T_map_camera[:3, :3], T_map_camera[:3, 3] + x[:3]
        axis, q = R[:, 2], pairs.points - t
        Z = q @ axis
        error = pairs.depth_m - (1.0 + scale) * Z
        J = np.concatenate([-np.broadcast_to(axis, q.shape), -np.cross(q, axis), Z[:, None]], axis=1)
        weight = 1.0 / (1.0 + (error / (2.0 * pairs.sigma_m)) ** 2) / pairs.sigma_m**2
        weight *= min(1.0, INDEPENDENT / len(pairs))
        H = prior + (J * weight[:, None]).T @ J
        step = np.linalg.solve(H, J.T @ (weight * error) - prior @ np.append(x, scale))
        x, scale = x + step[:6], scale + float(step[6])
        if np.abs(step).max() < 1e-6:
            break
    wider = np.linalg.inv(H)[:6, :6]
    return make_pose(so3_exp(x[3:]) @ T_map_camera[:3, :3], T_map_camera[:3, 3] + x[:3]), 0.5 * (wider + wider.T)


def _pairs(
    depth_m: NDArray[np.float32],
    points: NDArray[np.float64],
    pixels: NDArray[np.float64],
    known_m: NDArray[np.float64],
    map_sigma_m: NDArray[np.float64] | float,
) -> DepthPairs:
    """Return points with the depth measured around their pixels (N, 2).

    It is the median of the window; at an edge, where a window has two depths, the one nearest to the known one (N,).
    """
    rows, columns = depth_m.shape
    step = np.arange(-WINDOW_PX, WINDOW_PX + 1)
    v = np.clip(np.rint(pixels[:, 1]).astype(np.int64)[:, None, None] + step[:, None], 0, rows - 1)
    u = np.clip(np.rint(pixels[:, 0]).astype(np.int64)[:, None, None] + step[None, :], 0, columns - 1)
    around = depth_m[v, u].reshape(len(points), step.size**2).astype(np.float64)
    measured = np.isfinite(around) & (around > 0.0)
    count = measured.sum(axis=1)
    has = np.flatnonzero(count >= MIN_MEASURED)
    gap = np.where(measured, np.abs(around - known_m[:, None]), np.inf)[has]
    nearest = around[has, gap.argmin(axis=1)] if len(has) else np.zeros(0)
    ordered = np.sort(np.where(measured, around, np.inf)[has], axis=1)
    low, middle, high = (ordered[np.arange(len(has)), ((count[has] - 1) * q).astype(int)] for q in (0.1, 0.5, 0.9))
    depth = np.where(high - low <= EDGE_LOG * middle, middle, nearest)
    sigma = np.hypot(SIGMA_M + SIGMA_PER_M2 * depth**2, np.broadcast_to(map_sigma_m, known_m.shape)[has])
    return DepthPairs(points[has], depth, sigma, np.log(depth / known_m[has]))
