# SPDX-License-Identifier: Apache-2.0
"""Several SCoordNet heads in one map, each trained on a session of its own.

Every head sees every cell, and the one that claims the least variance is believed. A head is trained with its variance
(a Laplace likelihood) and calibrated on views it has not seen, so where it knows nothing it says so. That lets a map
grow without forgetting: what an older head says of its own session stays as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from kfloc_ros.device import quick_matmul
from kfloc_ros.features.trunk import COARSE_STRIDE, TrunkFeatures
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.kfnet.scoordnet import SCoordNet, head_input, laplace_variance
from kfloc_ros.types import SceneCoordinates

MAX_HEADS = 8
"""Each costs its own pass over the cells of every frame."""


class SCoordNets(nn.Module):
    """Heads of the same size that speak for one map together.

    Args:
        heads: two or more, of the same width and number of blocks.
    """

    def __init__(self, heads: Sequence[SCoordNet]) -> None:
        super().__init__()
        self.width, self.blocks = heads[0].width, heads[0].blocks
        if any((head.width, head.blocks) != (self.width, self.blocks) for head in heads):
            raise ValueError("the heads of one map must have the same size")
        self.heads = nn.ModuleList(heads)

    @torch.inference_mode()
    def measure(self, features: TrunkFeatures, variance_scale: float = 1.0) -> SceneCoordinates:
        """Scene coordinates of the first image of a batch, of each cell's surest head."""
        inputs = head_input(features)[0]
        with quick_matmul(inputs.device):
            told = [head(inputs) for head in self.heads]
        mean = torch.stack([m for m, _ in told])
        variance = variance_scale * laplace_variance(torch.stack([log_scale for _, log_scale in told]))
        usable = torch.isfinite(mean).all(-1) & torch.isfinite(variance)
        surest = torch.where(usable, variance, torch.inf).argmin(dim=0, keepdim=True)
        best = mean.gather(0, surest[..., None].expand(1, *mean.shape[1:]))[0]
        return SceneCoordinates(
            best.permute(2, 0, 1).contiguous(),
            variance.gather(0, surest)[0],
            usable.gather(0, surest)[0],
            COARSE_STRIDE,
        )


Head = SCoordNet | SCoordNets
"""What a map holds: one head, or several."""


def heads_of(head: Head) -> tuple[SCoordNet, ...]:
    """The heads one by one."""
    if isinstance(head, SCoordNet):
        return (head,)
    return tuple(item for item in head.heads if isinstance(item, SCoordNet))


def together(heads: Sequence[SCoordNet]) -> Head:
    """Heads as one: a single one stays what it is."""
    return heads[0] if len(heads) == 1 else SCoordNets(heads)


def with_variance_scale(head: SCoordNet, scale: float) -> SCoordNet:
    """A copy whose variance is larger by a factor: heads of different calibration become comparable."""
    scaled = copy.deepcopy(head)
    with torch.no_grad():
        scaled.output.bias[3] += 0.5 * math.log(scale)
    return scaled


def moved(head: SCoordNet, T: Matrix) -> SCoordNet:
    """A copy that tells its coordinates in another frame: each point p becomes T p."""
    R, t = (torch.from_numpy(part.copy()) for part in (T[:3, :3], T[:3, 3]))
    result = copy.deepcopy(head)
    with torch.no_grad():
        result.output.weight[:3] = (R @ head.output.weight[:3].double()).float()
        result.output.bias[:3] = (R @ head.output.bias[:3].double()).float()
        result.centre.copy_((R @ head.centre.double() + t).float())
    return result
