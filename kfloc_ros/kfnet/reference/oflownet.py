# SPDX-License-Identifier: Apache-2.0
"""Published OFlowNet: backward flow and process noise from a cost volume of signed feature differences.

Each cell has a window of 8x8 displacements, -4 to +3 cells in x and y. A small U-Net runs over every window separately:
there is no spatial context between cells. The flow is the soft-argmax of its output; the innermost features give the
process noise. Source: the layers of KFNet's released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.reference.layers import Conv, Padding, UpConv, image_to_input

WINDOW = 8
"""Cells per side of the search window."""
BEFORE, AFTER = 4, 3
"""Displacements run from -4 to +3 cells: the window of an even size is not symmetric."""
FEATURE_CHANNELS = 32
PROCESS_SIGMA_UNIT_M = 0.01
"""Process sigma before training."""
EDGE_MARGIN = 0.5
"""Distance in cells from the window's border below which the true flow may lie outside."""
CHUNK_CPU, CHUNK_GPU = 400, 4800
"""Cells whose windows are in memory at once: 25 MB of activations that fit a CPU's cache, 290 MB that fill a GPU."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Output of the U-Net for every cell of one pair of frames."""

    probability: torch.Tensor
    """(h w, 64) probability of each displacement; y outer, x inner."""
    process_sigma_m: torch.Tensor
    """(h, w) standard deviation per axis of the process noise, metres."""


class FeatureNet(nn.Module):
    """Network from RGB images to features (B, 32, H/8, W/8) of unit length; not shared with SCoordNet."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.feat1 = Conv(3, 16, padding=padding)
        self.feat2 = Conv(16, 32, stride=2, padding=padding)
        self.feat3 = Conv(32, 32, padding=padding)
        self.feat4 = Conv(32, 64, stride=2, padding=padding)
        self.feat5 = Conv(64, 64, padding=padding)
        self.feat6 = Conv(64, 128, stride=2, padding=padding)
        self.feat7 = Conv(128, FEATURE_CHANNELS, padding=padding)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = image_to_input(images)
        for layer in (self.feat1, self.feat2, self.feat3, self.feat4, self.feat5, self.feat6):
            x = F.relu(layer(x))
        x = self.feat7(x).float()
        unit: torch.Tensor = x * torch.rsqrt(x.square().sum(1, keepdim=True).clamp(min=1e-12))
        return unit


class WindowUNet(nn.Module):
    """U-Net from cost windows (N, 32, 8, 8) of N cells to displacement logits (N, 64) and log process noise (N,)."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.conv0 = Conv(FEATURE_CHANNELS, 32, padding=padding)
        self.conv1a = Conv(32, 32, stride=2, padding=padding)
        self.conv1b = Conv(32, 32, padding=padding)
        self.conv2a = Conv(32, 64, stride=2, padding=padding)
        self.conv2b = Conv(64, 64, padding=padding)
        self.conv3a = Conv(64, 128, stride=2, padding=padding)
        self.conv3b = Conv(128, 128, padding=padding)
        self.upconv2 = UpConv(128, 64, padding=padding)
        self.conv4 = Conv(128, 64, padding=padding)
        self.upconv1 = UpConv(64, 32, padding=padding)
        self.conv5 = Conv(64, 32, padding=padding)
        self.upconv0 = UpConv(32, 16, padding=padding)
        self.conv6 = Conv(48, 16, padding=padding)
        self.prediction = Conv(16, 1, padding=padding)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 32)
        self.uncertainty = nn.Linear(32, 1)
        for layer in (self.fc1, self.fc2, self.uncertainty):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = F.relu(self.conv0(cost))
        x1 = F.relu(self.conv1b(F.relu(self.conv1a(x0))))
        x2 = F.relu(self.conv2b(F.relu(self.conv2a(x1))))
        x3 = F.relu(self.conv3b(F.relu(self.conv3a(x2))))
        y2 = F.relu(self.conv4(torch.cat([F.relu(self.upconv2(x3)), x2], dim=1)))
        y1 = F.relu(self.conv5(torch.cat([F.relu(self.upconv1(y2)), x1], dim=1)))
        y0 = F.relu(self.conv6(torch.cat([F.relu(self.upconv0(y1)), x0], dim=1)))
        noise = self.uncertainty(F.relu(self.fc2(F.relu(self.fc1(x3.flatten(1))))))
        return self.prediction(y0).flatten(1), noise[:, 0]


class ReferenceOFlowNet(nn.Module):
    """KFNet's process network; one for all scenes.

    Args:
        padding: ``TENSORFLOW`` for weights trained by the original, else ``CENTRED``.
        chunk: cells whose windows are in memory at once; None: a number that suits the device. It does not change the
            result.
    """

    converted = False
    """The weights are published ones, not trained further here."""

    def __init__(self, padding: Padding = Padding.CENTRED, chunk: int | None = None) -> None:
        super().__init__()
        self.padding, self.chunk = padding, chunk
        self.features = FeatureNet(padding)
        self.unet = WindowUNet(padding)

    def forward(self, current: torch.Tensor, previous: torch.Tensor) -> Windows:
        """Return displacement probabilities and process noise from the features (32, h, w) of two frames.

        Inference holds ``chunk`` windows in memory; training holds all, since their activations are kept.
        """
        h, w = current.shape[1:]
        chunk = self.chunk or (CHUNK_GPU if current.is_cuda else CHUNK_CPU)
        logits, noise = zip(*(self.unet(cost) for cost in cost_windows(current, previous, chunk)), strict=True)
        probability = torch.cat(logits).float().softmax(dim=1)
        sigma_m = PROCESS_SIGMA_UNIT_M * torch.cat(noise).float().exp()
        return Windows(probability, sigma_m.reshape(h, w))

    def flow(self, current: torch.Tensor, previous: torch.Tensor) -> Flow:
        """Return flow and process noise in the form that the filter takes; differentiable except for ``valid``."""
        h, w = current.shape[1:]
        windows = self(current, previous)
        offsets = displacements(current.device, current.dtype)
        mean = windows.probability @ offsets
        second = windows.probability @ offsets.square()
        offset = mean.t().reshape(2, h, w)
        x = torch.arange(w, device=offset.device) + offset[0]
        y = torch.arange(h, device=offset.device)[:, None] + offset[1]
        inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
        low, high = EDGE_MARGIN - BEFORE, AFTER - EDGE_MARGIN
        at_edge = ((offset < low) | (offset > high)).any(0)
        return Flow(
            offset=offset,
            variance=(second - mean.square()).clamp(min=0).mean(1).reshape(h, w),
            valid=inside & ~at_edge,
            at_edge=at_edge,
            process_variance_m2=windows.process_sigma_m.square(),
        )


def displacements(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the displacements (64, 2) x, y in cells of a window's entries; y outer, x inner."""
    span = torch.arange(-BEFORE, AFTER + 1, device=device, dtype=dtype)
    oy, ox = torch.meshgrid(span, span, indexing="ij")
    return torch.stack([ox.reshape(-1), oy.reshape(-1)], dim=1)


def cost_windows(current: torch.Tensor, previous: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Yield signed differences V(p, o) = F(p) - F_previous(p + o), in chunks (n, 32, 8, 8) of cells in row-major order.

    Features of the previous frame are zero outside its image.
    """
    channels, h, w = current.shape
    padded = F.pad(previous, (BEFORE, AFTER, BEFORE, AFTER))
    windows = padded.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1)  # a view: (C, h, w, 8, 8)
    rows = max(1, chunk // w)
    for top in range(0, h, rows):
        part = windows[:, top : top + rows].permute(1, 2, 0, 3, 4)
        centre = current[:, top : top + rows].permute(1, 2, 0)[..., None, None]
        yield (centre - part).reshape(-1, channels, WINDOW, WINDOW)
