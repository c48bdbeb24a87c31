# SPDX-License-Identifier: Apache-2.0
"""Feature-metric cost of a camera pose, and its normal equations.

Every map point p with reference feature f is projected into the query; its residual is r = F(u(p)) - f. With robust
loss rho and confidence w the cost is mean_w rho(|r|^2), minimised over a left perturbation (dt, dw) of T_camera_map: P'
= P + dt + dw x P. Only the two image-plane directions affect the pose, so a point contributes its 2x2 structure tensor,
never its C x 6 Jacobian.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.device import runs_compiled
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix

NEAR_M = 0.05
"""Smallest depth of a point that is projected."""


@dataclass(frozen=True, eq=False)
class FeatureImage:
    """Feature level of the query, laid out for gathering at the points' positions."""

    features: torch.Tensor
    """(H, W, C) float32, contiguous."""
    confidence: torch.Tensor
    """(H, W) float32, contiguous."""
    stride: float

    @classmethod
    def from_maps(cls, features: torch.Tensor, confidence: torch.Tensor, stride: float) -> FeatureImage:
        """Lay out features (C, H, W) and confidence (H, W); the backbone's memory layout needs no copy."""
        return cls(features.permute(1, 2, 0).float().contiguous(), confidence.float().contiguous(), float(stride))

    @property
    def width(self) -> int:
        """Columns of cells."""
        return self.features.shape[1]

    @property
    def height(self) -> int:
        """Rows of cells."""
        return self.features.shape[0]

    @property
    def channels(self) -> int:
        """Number of feature channels C."""
        return self.features.shape[2]

    @cached_property
    def table(self) -> torch.Tensor:
        """(H * W, 3 C + 1) features, their central differences along u and v, confidence.

        The gradients are central differences at the cells, interpolated like the features. This is exactly the central
        difference of the interpolated map at plus and minus one cell (PixLoc's choice). It is smoother than the
        interpolant's own derivative, hence the basin is wider. Compiled loops compute the rows they need instead.
        """
        cells, (H, W, C) = self.features, self.features.shape
        table = torch.empty(H, W, 3 * C + 1, dtype=torch.float32, device=cells.device)
        table[..., :C] = cells
        du, dv = table[..., C : 2 * C], table[..., 2 * C : 3 * C]
        du[:, 1:-1] = cells[:, 2:] - cells[:, :-2]
        du[:, 0], du[:, -1] = cells[:, 1] - cells[:, 0], cells[:, -1] - cells[:, -2]
        dv[1:-1] = cells[2:] - cells[:-2]
        dv[0], dv[-1] = cells[1] - cells[0], cells[-1] - cells[-2]
        table[..., C : 3 * C] *= 0.5
        table[..., 3 * C] = self.confidence
        return table.reshape(H * W, 3 * C + 1)

    def sample(self, uv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bilinear rows (N, 3 C + 1) at cell positions uv (N, 2), and (N,) bool, true for positions inside.

        The rows are those of :attr:`table`; a position outside takes the nearest one inside.
        """
        uv = uv.float()
        if runs_compiled(self.features, self.confidence, uv):
            from kfloc_ros.pixloc import point_kernels

            rows = torch.empty(len(uv), 3 * self.channels + 1)
            inside = torch.empty(len(uv), dtype=torch.bool)
            point_kernels.sample(
                self.features.numpy(), self.confidence.numpy(), uv.contiguous().numpy(), rows.numpy(), inside.numpy()
            )
            return rows, inside
        u, v = uv.unbind(-1)
        inside = (u >= 0) & (u <= self.width - 1) & (v >= 0) & (v <= self.height - 1)
        u = u.clamp(0, self.width - 1)
        v = v.clamp(0, self.height - 1)
        u0 = u.floor().clamp(max=self.width - 2)
        v0 = v.floor().clamp(max=self.height - 2)
        a, b = u - u0, v - v0
        base = (v0 * self.width + u0).long()
        corners = torch.stack([base, base + 1, base + self.width, base + self.width + 1], dim=1)
        weights = torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], dim=1)
        rows = F.embedding_bag(corners, self.table, per_sample_weights=weights, mode="sum")
        return rows, inside


@dataclass(frozen=True, eq=False)
class FitLevel:
    """Feature level of an image with the reference features of the same level."""

    image: FeatureImage
    features: torch.Tensor
    """(N, C)"""
    confidence: torch.Tensor
    """(N,)"""


@dataclass(frozen=True)
class RobustLoss:
    """General loss of Barron (CVPR 2019) at alpha = 0 with scale c: 2 c^2 log(1 + x / (2 c^2)), x = |r|^2."""

    scale: float

    def value(self, squared: torch.Tensor) -> torch.Tensor:
        """Return the loss of squared residuals."""
        c2 = 2 * self.scale**2
        return c2 * torch.log1p(squared / c2)

    def weight(self, squared: torch.Tensor) -> torch.Tensor:
        """Return the first derivative by the squared residual; 1 at zero."""
        return 1.0 / (1.0 + squared / (2 * self.scale**2))


@dataclass(frozen=True, eq=False)
class Linearization:
    """Cost and normal equations at one pose, or at one pose and camera."""

    cost: float
    """Confidence-weighted mean robust cost over valid points; infinite if none is valid."""
    H: Matrix
    """(6, 6) Gauss-Newton matrix over (dt, dw), weights normalised to sum to one; (12, 12) with the camera."""
    g: Matrix
    """(6,) or (12,) gradient of half the cost."""
    valid_count: int
    weight_sum: float

    @classmethod
    def of_sums(cls, weights: float, losses: float, count: int, H: Matrix, g: Matrix) -> Linearization:
        """Return the linearization of sums over ``count`` points: weights, weighted losses, unscaled H and g."""
        if weights <= 0.0:
            return cls(math.inf, np.zeros_like(H), np.zeros_like(g), 0, 0.0)
        return cls(losses / weights, H / weights, g / weights, count, weights)


def project(
    points: torch.Tensor, T_camera_map: torch.Tensor, camera: Camera, stride: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return cell positions (N, 2) at ``stride``, camera points (N, 3), and (N,) bool, true for points in front."""
    P = points @ T_camera_map[:3, :3].T + T_camera_map[:3, 3]
    z = P[:, 2].clamp(min=NEAR_M)
    u = (camera.fx * P[:, 0] / z + camera.cx + 0.5) / stride - 0.5
    v = (camera.fy * P[:, 1] / z + camera.cy + 0.5) / stride - 0.5
    return torch.stack([u, v], dim=1), P, P[:, 2] > NEAR_M


def projection_jacobian(P: torch.Tensor, camera: Camera, stride: float) -> torch.Tensor:
    """Return the derivative (N, 2, 6) of the cell position by the left perturbation (dt, dw)."""
    z = P[:, 2].clamp(min=NEAR_M)
    return _jacobian(P[:, 0] / z, P[:, 1] / z, z, Intrinsics.of(camera, stride))[..., :POSE]


def projection_derivatives(
    points: NDArray[np.float64], T_camera_map: Matrix, model: Intrinsics
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Return cell positions (N, 2), their derivative (N, 2, 12) by pose and ``OFFSETS``, and (N,) bool, in view.

    A point behind the camera, or beyond the radius at which the distortion folds, is not in view.
    """
    P = torch.from_numpy(points @ T_camera_map[:3, :3].T + T_camera_map[:3, 3])
    z = P[:, 2].clamp(min=NEAR_M)
    x, y = P[:, 0] / z, P[:, 1] / z
    r2 = x * x + y * y
    bend = 1.0 + model.k1 * r2
    u = model.fx * (x + model.skew * y) * bend + model.cx
    at = torch.stack([u, model.fy * y * bend + model.cy], dim=1)
    in_view = (P[:, 2] > NEAR_M) & (1.0 + 3.0 * model.k1 * r2 > 0.0)
    return at.numpy(), _jacobian(x, y, z, model).numpy(), in_view.numpy()


POSE = 6
OFFSETS = ("log focal length", "log aspect ratio", "principal point x", "principal point y", "k1", "skew")
"""Offsets c of a camera: fx' = fx exp(c0), fy' = fy exp(c0 + c1), cx' = cx + c2, cy' = cy + c3, and before projection
x' = x (1 + c4 |x|^2), then x'' = x' + c5 y', y'' = y'. A rolling shutter in a turn about the vertical axis makes a
skew."""


@dataclass(frozen=True)
class Intrinsics:
    """Camera in cells of a feature level, with the first term of radial distortion, and a skew."""

    fx: float
    fy: float
    cx: float
    cy: float
    k1: float
    skew: float
    cells_per_px: float

    @classmethod
    def of(cls, camera: Camera, stride: float, offsets: NDArray[np.float64] | None = None) -> Intrinsics:
        """Return a pinhole camera with ``OFFSETS`` (6,), at a level's stride."""
        focal, aspect, dx, dy, k1, skew = (0.0,) * len(OFFSETS) if offsets is None else (float(c) for c in offsets)
        fx, fy = camera.fx * math.exp(focal), camera.fy * math.exp(focal + aspect)
        cx, cy = (camera.cx + dx + 0.5) / stride - 0.5, (camera.cy + dy + 0.5) / stride - 0.5
        return cls(fx / stride, fy / stride, cx, cy, k1, skew, 1.0 / stride)

    def as_array(self) -> Matrix:
        """Return the fields in their order, (7,)."""
        return np.array([self.fx, self.fy, self.cx, self.cy, self.k1, self.skew, self.cells_per_px])


def linearize(
    image: FeatureImage,
    points: torch.Tensor,
    features: torch.Tensor,
    confidence: torch.Tensor,
    T_camera_map: Matrix,
    camera: Camera,
    loss: RobustLoss,
    offsets: NDArray[np.float64] | None = None,
) -> Linearization:
    """Return cost and normal equations of map points with their reference features at a pose.

    Args:
        image: feature level of the query.
        points: (N, 3) metres, in a frame near the camera, since float32 is exact enough only near its origin.
        features: (N, C) reference features.
        confidence: (N,)
        T_camera_map: pose (4, 4) that maps points of that frame to the camera frame.
        camera: pinhole camera of the query.
        loss: robust loss.
        offsets: (6,) ``OFFSETS`` of the camera, which then are six more unknowns; None: the pose alone.
    """
    of_points = points, features, confidence
    return linearize_parts(image, *of_points, [len(points)], T_camera_map, camera, loss, offsets)[0]


def linearize_parts(
    image: FeatureImage,
    points: torch.Tensor,
    features: torch.Tensor,
    confidence: torch.Tensor,
    counts: Sequence[int],
    T_camera_map: Matrix,
    camera: Camera,
    loss: RobustLoss,
    offsets: NDArray[np.float64] | None = None,
) -> list[Linearization]:
    """Return :func:`linearize` of the first ``counts[0]`` points, of the ``counts[1]`` points after them, and so on."""
    model, size = Intrinsics.of(camera, image.stride, offsets), POSE if offsets is None else POSE + len(OFFSETS)
    parts = [slice(*ends) for ends in itertools.pairwise([0, *itertools.accumulate(counts)])]
    if runs_compiled(image.features, image.confidence, points, features, confidence):
        from kfloc_ros.pixloc import kernels

        cells, trust = image.features.numpy(), image.confidence.numpy()
        cloud, wanted, weights = (values.contiguous().numpy() for values in (points, features, confidence))
        at = np.ascontiguousarray(T_camera_map, dtype=np.float64), model.as_array(), loss.scale, NEAR_M, size
        sums = [kernels.normal_equations(cells, trust, cloud[p], wanted[p], weights[p], *at) for p in parts]
    else:
        given = T_camera_map, model, loss, size
        sums = [_linearize_in_torch(image, points[p], features[p], confidence[p], *given) for p in parts]
    return [Linearization.of_sums(*found) for found in sums]


def _linearize_in_torch(
    image: FeatureImage,
    points: torch.Tensor,
    features: torch.Tensor,
    confidence: torch.Tensor,
    T_camera_map: Matrix,
    model: Intrinsics,
    loss: RobustLoss,
    size: int,
) -> tuple[float, float, int, Matrix, Matrix]:
    """Return sum of weights, weighted sum of losses, number of valid points, and unscaled H and g."""
    T = torch.from_numpy(T_camera_map).to(points)
    P = points @ T[:3, :3].T + T[:3, 3]
    z = P[:, 2].clamp(min=NEAR_M)
    x, y = P[:, 0] / z, P[:, 1] / z
    r2 = x * x + y * y
    bend, grows = 1.0 + model.k1 * r2, 1.0 + 3.0 * model.k1 * r2 > 0.0  # beyond the fold, points are not in view
    u = model.fx * x * bend + model.cx + model.skew * model.fx * y * bend
    uv = torch.stack([u, model.fy * y * bend + model.cy], dim=1)
    rows, inside = image.sample(uv)
    C = image.channels
    residual = rows[:, :C] - features
    du, dv = rows[:, C : 2 * C], rows[:, 2 * C : 3 * C]
    squared = (residual * residual).sum(1)
    valid = inside & grows & (P[:, 2] > NEAR_M)
    trust = confidence * rows[:, 3 * C] * valid
    weight = trust * loss.weight(squared)
    tensor = torch.stack([(du * du).sum(1), (du * dv).sum(1), (du * dv).sum(1), (dv * dv).sum(1)], dim=1)
    slope = torch.stack([(du * residual).sum(1), (dv * residual).sum(1)], dim=1)
    J = _jacobian(x, y, z, model)[..., :size]
    WJ = (weight[:, None] * tensor).reshape(-1, 2, 2) @ J
    H = (J.reshape(-1, size).T @ WJ.reshape(-1, size)).double().cpu().numpy()
    g = (J.reshape(-1, size).T @ (weight[:, None] * slope).reshape(-1)).double().cpu().numpy()
    return float(trust.sum()), float((trust * loss.value(squared)).sum()), int(valid.sum()), H, g


def _jacobian(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, model: Intrinsics) -> torch.Tensor:
    """Return the derivative (N, 2, 12) of the cell position by the left perturbation (dt, dw) and the offsets.

    Args:
        x, y: (N,) normalised image coordinates.
        z: (N,) depth, metres.
        model: camera.
    """
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    fx, fy, k1, r2 = model.fx, model.fy, model.k1, x * x + y * y
    bend = 1.0 + k1 * r2
    along, across, up = bend + 2 * k1 * x * x, 2 * k1 * x * y, bend + 2 * k1 * y * y
    dx = torch.stack([1 / z, zero, -x / z, -x * y, 1 + x * x, -y], dim=1)
    dy = torch.stack([zero, 1 / z, -y / z, -(1 + y * y), x * y, x], dim=1)
    row_v = fy * (across[:, None] * dx + up[:, None] * dy)
    row_u = fx * (along[:, None] * dx + across[:, None] * dy) + model.skew * fx / fy * row_v
    step = model.cells_per_px * one
    skewed_x, skewed_y = x + model.skew * y, fx * y * bend
    camera_u = torch.stack([fx * skewed_x * bend, zero, step, zero, fx * skewed_x * r2, skewed_y], dim=1)
    camera_v = torch.stack([fy * y * bend, fy * y * bend, zero, step, fy * y * r2, zero], dim=1)
    return torch.stack([torch.cat([row_u, camera_u], dim=1), torch.cat([row_v, camera_v], dim=1)], dim=1)
