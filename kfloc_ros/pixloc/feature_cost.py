# SPDX-License-Identifier: Apache-2.0
"""PixLoc's feature-metric cost for a batch of poses, any camera model, and its normal equations.

With residual r = F(u(T p)) - f, robust loss rho and confidence w, the cost of a pose is sum w rho(|r|^2) over the
valid points, linearised by a left perturbation (dt, dw) of the pose. The image gradient has two directions only, so
that a point adds its 2x2 structure tensor; the C x 6 Jacobian of the original is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.pose import Pose
from kfloc_ros.pixloc.feature_map import FeatureMap
from kfloc_ros.pixloc.losses import RobustLoss


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """The cost and its linearisation at one pose per batch element."""

    H: torch.Tensor
    """(B, 6, 6) float64: sum w rho' J^T J; not divided by the number of points."""
    g: torch.Tensor
    """(B, 6) float64: sum w rho' J^T r."""
    scatter: torch.Tensor
    """(B, 6, 6) float64: sum of the outer products of each point's part of g, for the covariance."""
    cost: torch.Tensor
    """(B, N) rho(|r|^2), without confidence."""
    confidence: torch.Tensor
    """(B, N) w, zero where not valid."""
    valid: torch.Tensor
    """(B, N) bool"""
    column_norms: torch.Tensor | None = None
    """(B, N, 6) of J's columns, where asked for."""

    @property
    def valid_count(self) -> torch.Tensor:
        """(B,)"""
        return self.valid.sum(-1)

    @property
    def mean_cost(self) -> torch.Tensor:
        """(B,) confidence-weighted mean cost; infinite where no point is valid."""
        total = self.confidence.sum(-1)
        mean = (self.cost * self.confidence).sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return torch.where(total > 0, mean, torch.full_like(mean, torch.inf))

    @property
    def plain_mean_cost(self) -> torch.Tensor:
        """(B,) mean cost over valid points, without confidences, as the original reports it."""
        return (self.cost * self.valid).sum(-1) / self.valid_count.clamp(min=1)


@dataclass(frozen=True, eq=False)
class FeatureCost:
    """One level of an alignment problem."""

    query: FeatureMap
    """Features, and confidence as the last channel."""
    camera: CameraTensor
    """(B,) of the query at this level."""
    points: torch.Tensor
    """(B, N, 3), near the origin; see :func:`kfloc_ros.pixloc.solver.recentre`."""
    features: torch.Tensor
    """(B, N, C) of the reference."""
    confidence: torch.Tensor
    """(B, N) of the reference."""
    mask: torch.Tensor | None = None
    """(B, N) bool: points to use at all."""
    pad: int = 2
    legacy: bool = False
    """See :func:`kfloc_ros.geometry.distortion.distort`."""

    def linearize(self, T: Pose, loss: RobustLoss, *, column_norms: bool = False) -> NormalEquations:
        """Cost and normal equations at poses T (B,) from the points' frame to the camera."""
        # A few numbers a point: double precision costs nothing here. Only features, many numbers, are in their own.
        p = T.transform(self.points.double())
        uv, visible = self.camera.world2image(p, legacy=self.legacy)
        samples = self.query.sample_with_gradient(uv.to(self.features.dtype), self.pad)
        valid = visible & samples.inside
        if self.mask is not None:
            valid = valid & self.mask
        C = self.features.shape[-1]
        residual = samples.values[..., :C] - self.features
        du, dv = samples.du[..., :C], samples.dv[..., :C]
        squared = (residual * residual).sum(-1)
        confidence = self.confidence * samples.values[..., C] * valid
        weight = loss.weight(squared) * confidence
        uu, uvw, vv = (du * du).sum(-1), (du * dv).sum(-1), (dv * dv).sum(-1)
        tensor = torch.stack([uu, uvw, uvw, vv], dim=-1).reshape(*uu.shape, 2, 2).double()
        slope = torch.stack([(du * residual).sum(-1), (dv * residual).sum(-1)], dim=-1).double()
        J = self.camera.J_world2image(p) @ T.J_transform(p)
        J = torch.where(valid[..., None, None], J, torch.zeros_like(J))  # a point that is not finite counts for nothing
        SJ = tensor @ J
        B = len(J)
        H = J.reshape(B, -1, 6).mT @ (weight[..., None, None] * SJ).reshape(B, -1, 6)
        parts = (J.mT @ (weight[..., None] * slope)[..., None])[..., 0]
        norms = (J * SJ).sum(-2).clamp(min=0).sqrt() if column_norms else None
        return NormalEquations(H, parts.sum(-2), parts.mT @ parts, loss.value(squared), confidence, valid, norms)
