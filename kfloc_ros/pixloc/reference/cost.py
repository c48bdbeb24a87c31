# SPDX-License-Identifier: Apache-2.0
"""Feature-metric cost of the published PixLoc: batched sampling with image gradients, normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.covariance import map_frame_covariance
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.losses import RobustLoss


class Samples(NamedTuple):
    """Values of a map at points."""

    values: torch.Tensor
    """(B, N, C)"""
    inside: torch.Tensor
    """(B, N) bool: at least ``pad`` cells from the border."""


class GradientSamples(NamedTuple):
    """Values and image gradients at points."""

    values: torch.Tensor
    """(B, N, C)"""
    du: torch.Tensor
    """(B, N, C) per cell"""
    dv: torch.Tensor
    """(B, N, C) per cell"""
    inside: torch.Tensor
    """(B, N) bool"""


_OFFSETS = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Feature maps of a batch, with the channels of a cell contiguous, so that a sample reads whole rows."""

    table: torch.Tensor
    """(B * H * W, C)"""
    batch: int
    height: int
    width: int
    cubic: bool = False
    """Sample by cubic convolution (Keys, 1981; a = -0.5), which needs a cell more at the border, not bilinearly."""

    @classmethod
    def from_maps(cls, maps: torch.Tensor, *, cubic: bool = False) -> FeatureMap:
        """Return the layout of maps (B, C, H, W)."""
        B, C, H, W = maps.shape
        return cls(maps.permute(0, 2, 3, 1).reshape(B * H * W, C), B, H, W, cubic)

    @classmethod
    def with_confidence(cls, features: torch.Tensor, confidence: torch.Tensor, *, cubic: bool = False) -> FeatureMap:
        """Return the layout of features (B, C, H, W) with a confidence (B, 1, H, W) as the last channel."""
        return cls.from_maps(torch.cat([features, confidence], dim=1), cubic=cubic)

    def inside(self, uv: torch.Tensor, pad: int) -> torch.Tensor:
        """Return (B, N) bool: cells uv (B, N, 2) lie ``pad`` cells or more from the border; false for NaN."""
        pad += self.cubic
        last = uv.new_tensor([self.width - 1 - pad, self.height - 1 - pad])
        return ((uv >= pad) & (uv <= last)).all(-1)

    def sample(self, uv: torch.Tensor, pad: int = 0) -> Samples:
        """Return values at cell positions (B, N, 2); outside, those of the border."""
        return Samples(self._cubic(uv)[0] if self.cubic else self._bilinear(uv), self.inside(uv, pad))

    def sample_with_gradient(self, uv: torch.Tensor, pad: int = 1) -> GradientSamples:
        """Return values and central differences over one cell to either side, at cell positions (B, N, 2).

        PixLoc minimises along this gradient: it is smoother than the interpolant's own derivative, so the basin is
        wider. With ``cubic``, it is the interpolant's own.
        """
        if self.cubic:
            return GradientSamples(*self._cubic(uv), self.inside(uv, pad))
        offsets = uv.new_tensor(_OFFSETS)
        B, N = uv.shape[:2]
        around = self._bilinear((uv[:, :, None] + offsets).reshape(B, N * len(offsets), 2)).reshape(B, N, 5, -1)
        here, right, left, below, above = around.unbind(2)
        return GradientSamples(here, (right - left) / 2, (below - above) / 2, self.inside(uv, pad))

    def _cubic(self, uv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return values and their derivatives by u and v, (B, N, C) each."""
        B, N = uv.shape[:2]
        u, v = torch.nan_to_num(uv).unbind(-1)
        u, v = u.clamp(0, self.width - 1), v.clamp(0, self.height - 1)
        u0, v0 = u.detach().floor(), v.detach().floor()
        around = torch.arange(-1, 3, device=uv.device)
        columns = (u0[..., None].long() + around).clamp(0, self.width - 1)
        rows = (v0[..., None].long() + around).clamp(0, self.height - 1)
        first = torch.arange(B, device=uv.device)[:, None, None, None] * (self.height * self.width)
        cells = (first + rows[..., :, None] * self.width + columns[..., None, :]).reshape(-1, 16)
        (along_u, slope_u), (along_v, slope_v) = _keys(u - u0), _keys(v - v0)
        found = [
            F.embedding_bag(
                cells,
                self.table,
                per_sample_weights=(down[..., :, None] * across[..., None, :]).reshape(-1, 16).to(self.table),
                mode="sum",
            ).reshape(B, N, -1)
            for down, across in ((along_v, along_u), (along_v, slope_u), (slope_v, along_u))
        ]
        return found[0], found[1], found[2]

    def _bilinear(self, uv: torch.Tensor) -> torch.Tensor:
        B, N = uv.shape[:2]
        u, v = torch.nan_to_num(uv).unbind(-1)
        u, v = u.clamp(0, self.width - 1), v.clamp(0, self.height - 1)
        u0 = u.detach().floor().clamp(max=max(self.width - 2, 0))
        v0 = v.detach().floor().clamp(max=max(self.height - 2, 0))
        a, b = u - u0, v - v0
        first = torch.arange(B, device=uv.device)[:, None] * (self.height * self.width)
        corner = first + (v0 * self.width + u0).long()
        right, down = min(self.width - 1, 1), self.width if self.height > 1 else 0
        corners = torch.stack([corner, corner + right, corner + down, corner + down + right], dim=-1)
        weights = torch.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b], dim=-1)
        rows = F.embedding_bag(
            corners.reshape(-1, 4), self.table, per_sample_weights=weights.reshape(-1, 4).to(self.table), mode="sum"
        )
        return rows.reshape(B, N, -1)


def _keys(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights (..., 4) of the four cells around a place ``t`` in [0, 1) past the second; their slopes."""
    t2, t3, one = t * t, t * t * t, torch.ones_like(t)
    weights = [-t3 + 2 * t2 - t, 3 * t3 - 5 * t2 + 2 * one, -3 * t3 + 4 * t2 + t, t3 - t2]
    slopes = [-3 * t2 + 4 * t - one, 9 * t2 - 10 * t, -9 * t2 + 8 * t + one, 3 * t2 - 2 * t]
    return torch.stack(weights, dim=-1) / 2, torch.stack(slopes, dim=-1) / 2


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Cost and its linearisation at one pose per batch element."""

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
    """(B, N, 6) norms of J's columns, if requested."""

    @property
    def valid_count(self) -> torch.Tensor:
        """(B,) number of valid points."""
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
    """Alignment problem of one level."""

    query: FeatureMap
    """Features of the query, with confidence as the last channel."""
    camera: CameraTensor
    """(B,) camera of the query at this level."""
    points: torch.Tensor
    """(B, N, 3) points near the origin; see :func:`kfloc_ros.pixloc.reference.solver.recentre`."""
    features: torch.Tensor
    """(B, N, C) features of the reference."""
    confidence: torch.Tensor
    """(B, N) confidence of the reference."""
    mask: torch.Tensor | None = None
    """(B, N) bool: points to use; None: all."""
    pad: int = 2
    legacy: bool = False
    """See :func:`kfloc_ros.geometry.distortion.distort`."""

    def linearize(self, T: Pose, loss: RobustLoss, *, column_norms: bool = False) -> NormalEquations:
        """Return cost and normal equations at poses T (B,) from the points' frame to the camera."""
        # Geometry is a few numbers a point, so double precision is cheap; only the features keep their own type.
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
        J = self.camera.J_world2image(p).J @ T.J_transform(p)
        J = torch.where(valid[..., None, None], J, torch.zeros_like(J))  # removes points that are not finite
        SJ = tensor @ J
        B = len(J)
        H = J.reshape(B, -1, 6).mT @ (weight[..., None, None] * SJ).reshape(B, -1, 6)
        parts = (J.mT @ (weight[..., None] * slope)[..., None])[..., 0]
        norms = (J * SJ).sum(-2).clamp(min=0).sqrt() if column_norms else None
        return NormalEquations(H, parts.sum(-2), parts.mT @ parts, loss.value(squared), confidence, valid, norms)


UNRELATED = 2.0
"""Squared distance of two unrelated unit features."""
WELL_CONDITIONED = 1e-3
"""Smallest eigenvalue of the scaled system from which every direction counts as constrained."""


@dataclass(frozen=True)
class Score:
    """Success score: three figures in [0, 1], and their product."""

    valid_ratio: float
    """Share of the reference points that are in view."""
    likeness: float
    """1 for equal features, 0 for features as different as unrelated ones."""
    conditioning: float
    """1 if the image constrains every direction, 0 if one is free."""

    @property
    def value(self) -> float:
        """Product of the three figures."""
        return self.valid_ratio * self.likeness * self.conditioning


def score_of(at: NormalEquations, loss: RobustLoss, point_count: int) -> Score:
    """Return the score of the first element at its final pose; likeness assumes unit features."""
    cost = float(at.mean_cost[0])
    worst = float(loss.value(torch.tensor(UNRELATED, dtype=torch.float64)))
    likeness = 1 - cost / worst if np.isfinite(cost) else 0.0
    H = at.H[0].cpu().numpy()
    diagonal = np.sqrt(np.maximum(np.diag(H), 0))
    conditioning = 0.0
    if np.isfinite(H).all() and (diagonal > 0).all():
        smallest = float(np.linalg.eigvalsh(H / np.outer(diagonal, diagonal))[0])
        conditioning = min(max(smallest / WELL_CONDITIONED, 0.0), 1.0)
    return Score(int(at.valid_count[0]) / max(point_count, 1), min(max(likeness, 0.0), 1.0), conditioning)


def pose_covariance(at: NormalEquations, T_camera_map: Pose) -> Matrix | None:
    """Return the (6, 6) covariance of T_map_camera, in the order of ``PoseWithCovariance``, of the first element.

    It is the sandwich of an M-estimator, H^-1 (sum g_n g_n^T) H^-1, with each point's own part g_n of the gradient. It
    needs no residual variance, and the channels of one point may share errors. Points are assumed independent.

    Returns:
        The covariance; None if the image does not constrain the pose in every direction.
    """
    H, scatter = at.H[0].cpu().numpy(), at.scatter[0].cpu().numpy()
    if not (np.isfinite(H).all() and np.isfinite(scatter).all()):
        return None
    try:
        information = H @ np.linalg.solve(scatter, H)
    except np.linalg.LinAlgError:
        return None
    return map_frame_covariance(np.asarray(information), T_camera_map.matrix_numpy()[0])
