# SPDX-License-Identifier: Apache-2.0
"""Batched bilinear sampling of feature maps at points, with PixLoc's image gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Samples(NamedTuple):
    """A map's values at points."""

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
    """Maps of a batch, with the channels of a cell side by side so that a sample reads whole rows."""

    table: torch.Tensor
    """(B * H * W, C)"""
    batch: int
    height: int
    width: int

    @classmethod
    def from_maps(cls, maps: torch.Tensor) -> FeatureMap:
        """Of maps (B, C, H, W)."""
        B, C, H, W = maps.shape
        return cls(maps.permute(0, 2, 3, 1).reshape(B * H * W, C), B, H, W)

    @classmethod
    def with_confidence(cls, features: torch.Tensor, confidence: torch.Tensor) -> FeatureMap:
        """Of features (B, C, H, W) with a confidence (B, 1, H, W) as the last channel."""
        return cls.from_maps(torch.cat([features, confidence], dim=1))

    def inside(self, uv: torch.Tensor, pad: int) -> torch.Tensor:
        """(B, N) bool: which cells uv (B, N, 2) lie ``pad`` cells or more from the border; NaN does not."""
        last = uv.new_tensor([self.width - 1 - pad, self.height - 1 - pad])
        return ((uv >= pad) & (uv <= last)).all(-1)

    def sample(self, uv: torch.Tensor, pad: int = 0) -> Samples:
        """Values at cell positions (B, N, 2); outside, those of the border."""
        return Samples(self._bilinear(uv), self.inside(uv, pad))

    def sample_with_gradient(self, uv: torch.Tensor, pad: int = 1) -> GradientSamples:
        """Values and central differences at one cell to either side.

        This is the gradient that PixLoc descends: smoother than the interpolant's own derivative, hence with a wider
        basin.
        """
        offsets = uv.new_tensor(_OFFSETS)
        B, N = uv.shape[:2]
        around = self._bilinear((uv[:, :, None] + offsets).reshape(B, N * len(offsets), 2)).reshape(B, N, 5, -1)
        here, right, left, below, above = around.unbind(2)
        return GradientSamples(here, (right - left) / 2, (below - above) / 2, self.inside(uv, pad))

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
