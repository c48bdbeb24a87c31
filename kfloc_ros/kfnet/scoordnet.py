# SPDX-License-Identifier: Apache-2.0
"""SCoordNet of the fast family: a residual per-cell head on the trunk, one per map.

Its likelihood is an isotropic Laplace density in space, p(e) ~ exp(-|e| / b) / b^3, which forgives the
cells that cannot be told apart; its variance per axis is 4 b^2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.device import quick_matmul
from kfloc_ros.features.trunk import COARSE_CHANNELS, COARSE_STRIDE, CONTEXT_CHANNELS, TrunkFeatures
from kfloc_ros.types import SceneCoordinates

INPUT_CHANNELS = COARSE_CHANNELS + CONTEXT_CHANNELS
MIN_SCALE_M = 2e-3
"""Smallest Laplace scale b that the head may claim."""
MAX_SCALE_M = 20.0


def head_input(features: TrunkFeatures) -> torch.Tensor:
    """(B, h, w, 192) what the head sees of each cell: its own features and its surroundings."""
    return torch.cat([features.coarse, features.context], dim=1).permute(0, 2, 3, 1)


class SCoordNet(nn.Module):
    """Per-cell regression of a scene coordinate and the scale of its error.

    Args:
        width: hidden channels.
        blocks: residual blocks of two layers each.
    """

    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.input = nn.Linear(INPUT_CHANNELS, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, 4)
        self.register_buffer("input_mean", torch.zeros(INPUT_CHANNELS))
        self.register_buffer("input_scale", torch.ones(INPUT_CHANNELS))
        self.register_buffer("centre", torch.zeros(3))

    input_mean: torch.Tensor
    input_scale: torch.Tensor
    centre: torch.Tensor

    def normalize_with(self, inputs: torch.Tensor, coordinates: torch.Tensor) -> None:
        """Fit the input whitening and the map's centre to samples (N, 192) and (N, 3)."""
        self.input_mean.copy_(inputs.mean(0))
        self.input_scale.copy_(1.0 / (inputs.std(0) + 1e-3))
        self.centre.copy_(coordinates.mean(0))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scene coordinates (..., 3) in metres, map frame, and log b (...), of cells (..., 192)."""
        h = F.relu(self.input((inputs - self.input_mean) * self.input_scale))
        for first, second in zip(self.first, self.second, strict=True):
            h = F.relu(h + second(F.relu(first(h))))
        # the last layer stays in float32: bfloat16 would round a coordinate at 3 m to a centimetre
        with torch.autocast(h.device.type, enabled=False):
            out = self.output(h.float())
        return out[..., :3] + self.centre, out[..., 3].clamp(math.log(MIN_SCALE_M), math.log(MAX_SCALE_M))

    @torch.inference_mode()
    def measure(self, features: TrunkFeatures, variance_scale: float = 1.0) -> SceneCoordinates:
        """Scene coordinates of the first image of a batch.

        Args:
            features: of one image.
            variance_scale: from the map's calibration on views that the head was not trained on.
        """
        inputs = head_input(features)[0]
        with quick_matmul(inputs.device):
            mean, log_scale = self(inputs)
        variance = variance_scale * laplace_variance(log_scale)
        valid = torch.isfinite(mean).all(-1) & torch.isfinite(variance)
        return SceneCoordinates(mean.permute(2, 0, 1).contiguous(), variance, valid, COARSE_STRIDE)


def laplace_variance(log_scale: torch.Tensor) -> torch.Tensor:
    """Variance per axis, m^2, of the isotropic Laplace density in 3-D: E|e|^2 = 12 b^2."""
    return 4.0 * (2.0 * log_scale).exp()


def laplace_nll(error_m: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, up to a constant, of error lengths |e| (N,) at log b (N,)."""
    return 3.0 * log_scale + error_m * (-log_scale).exp()
