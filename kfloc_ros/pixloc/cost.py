# SPDX-License-Identifier: Apache-2.0
"""Feature-metric cost of a camera pose, and its normal equations.

Every map point p with reference feature f is projected into the query; its residual is r = F(u(p)) - f. With robust
loss rho and confidence w the cost is mean_w rho(|r|^2), minimised over a left perturbation (dt, dw) of T_camera_map: P'
= P + dt + dw x P. Only the two image-plane directions affect the pose, so a point contributes its 2x2 structure tensor,
never its C x 6 Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera

NEAR_M = 0.05
"""Smallest depth of a point that is projected."""


@dataclass(frozen=True, eq=False)
class FeatureImage:
    """Feature level of the query: features, their image gradients and confidence, laid out for gathering."""

    table: torch.Tensor
    """(H * W, 3 C + 1): features, their central differences along u and v, confidence."""
    width: int
    height: int
    stride: float

    @classmethod
    def from_maps(cls, features: torch.Tensor, confidence: torch.Tensor, stride: float) -> FeatureImage:
        """Prepare features (C, H, W) and confidence (H, W) for sampling.

        The gradients are central differences at the cells, interpolated like the features. This is exactly the central
        difference of the interpolated map at plus and minus one cell (PixLoc's choice). It is smoother than the
        interpolant's own derivative, hence the basin is wider.
        """
        C, H, W = features.shape
        cells = features.permute(1, 2, 0)  # a view: in the backbone's memory layout channels are contiguous
        table = torch.empty(H, W, 3 * C + 1, dtype=torch.float32, device=features.device)
        table[..., :C] = cells
        du, dv = table[..., C : 2 * C], table[..., 2 * C : 3 * C]
        du[:, 1:-1] = cells[:, 2:] - cells[:, :-2]
        du[:, 0], du[:, -1] = cells[:, 1] - cells[:, 0], cells[:, -1] - cells[:, -2]
        dv[1:-1] = cells[2:] - cells[:-2]
        dv[0], dv[-1] = cells[1] - cells[0], cells[-1] - cells[-2]
        table[..., C : 3 * C] *= 0.5
        table[..., 3 * C] = confidence
        return cls(table.reshape(H * W, 3 * C + 1), W, H, float(stride))

    @property
    def channels(self) -> int:
        """Number of feature channels C."""
        return (self.table.shape[1] - 1) // 3

    def sample(self, uv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bilinear rows (N, 3 C + 1) at cell positions uv (N, 2), and (N,) bool, true for positions inside."""
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
    """Cost and normal equations at one pose."""

    cost: float
    """Confidence-weighted mean robust cost over valid points; infinite if none is valid."""
    H: torch.Tensor
    """(6, 6) float64 Gauss-Newton matrix over (dt, dw), weights normalised to sum to one."""
    g: torch.Tensor
    """(6,) float64 gradient of half the cost."""
    valid_count: int
    weight_sum: float


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
    x, y = P[:, 0], P[:, 1]
    z = P[:, 2].clamp(min=NEAR_M)
    fx, fy = camera.fx / stride, camera.fy / stride
    zero = torch.zeros_like(z)
    xz, yz = x / z, y / z
    row_u = torch.stack([fx / z, zero, -fx * xz / z, -fx * xz * yz, fx * (1 + xz * xz), -fx * yz], dim=1)
    row_v = torch.stack([zero, fy / z, -fy * yz / z, -fy * (1 + yz * yz), fy * xz * yz, fy * xz], dim=1)
    return torch.stack([row_u, row_v], dim=1)


def linearize(
    image: FeatureImage,
    points: torch.Tensor,
    features: torch.Tensor,
    confidence: torch.Tensor,
    T_camera_map: torch.Tensor,
    camera: Camera,
    loss: RobustLoss,
) -> Linearization:
    """Return cost and normal equations of map points (N, 3) with reference features (N, C) and confidence (N,)."""
    uv, P, in_front = project(points, T_camera_map, camera, image.stride)
    rows, inside = image.sample(uv)
    C = image.channels
    residual = rows[:, :C] - features
    du, dv = rows[:, C : 2 * C], rows[:, 2 * C : 3 * C]
    squared = (residual * residual).sum(1)
    valid = inside & in_front
    trust = confidence * rows[:, 3 * C] * valid
    total = float(trust.sum())
    if total <= 0.0:
        zero = torch.zeros(6, dtype=torch.float64)
        return Linearization(float("inf"), torch.zeros(6, 6, dtype=torch.float64), zero, 0, 0.0)
    cost = float((trust * loss.value(squared)).sum()) / total
    weight = trust * loss.weight(squared) / total
    tensor = torch.stack([(du * du).sum(1), (du * dv).sum(1), (du * dv).sum(1), (dv * dv).sum(1)], dim=1)
    slope = torch.stack([(du * residual).sum(1), (dv * residual).sum(1)], dim=1)
    J = projection_jacobian(P, camera, image.stride)
    WJ = (weight[:, None] * tensor).reshape(-1, 2, 2) @ J
    H = J.reshape(-1, 6).T @ WJ.reshape(-1, 6)
    g = J.reshape(-1, 6).T @ (weight[:, None] * slope).reshape(-1)
    return Linearization(cost, H.double().cpu(), g.double().cpu(), int(valid.sum()), total)
