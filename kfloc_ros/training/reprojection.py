# SPDX-License-Identifier: Apache-2.0
"""Training cells whose depth is not known: their prediction must lie on their ray, at a depth that can be.

The error is that of reprojection, as in ACE (Brachmann et al., CVPR 2023), told in metres across the ray so that it
weighs against the errors of cells with depth: ``|xy / z - ray| z``. It says nothing along the ray; there the cells with
depth that look alike, and the other views of the same place, decide. A prediction behind the camera, out of the range
of depths or far off its ray is drawn to the point of its ray at the usual depth instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kfloc_ros.kfnet.scoordnet import SCoordNet

FAR_OFF = 0.1
"""Tangent of the angle from the ray beyond which a prediction is drawn to the usual depth."""
PULL = 0.1
"""Weight of that pull."""
MIN_DEPTH_SHARE, MAX_DEPTH_SHARE = 0.1, 8.0
"""Range of depths in units of the usual depth."""


@dataclass(frozen=True, eq=False)
class RayCells:
    """Cells without depth, of all views."""

    inputs: torch.Tensor
    """(M, 192) half"""
    rays: torch.Tensor
    """(M, 2) x/z and y/z in the camera."""
    view: torch.Tensor
    """(M,) row of ``T_map_camera``."""
    T_map_camera: torch.Tensor
    """(V, 4, 4) float"""
    usual_depth_m: float

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> RayCells:
        """The same cells on another device."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            rays=self.rays.to(device),
            view=self.view.to(device),
            T_map_camera=self.T_map_camera.to(device),
        )


def reprojection_loss(
    predicted: torch.Tensor, log_scale: torch.Tensor, rays: torch.Tensor, T_map_camera: torch.Tensor, usual_m: float
) -> torch.Tensor:
    """Mean loss of scene coordinates (N, 3) with log b (N,) for rays (N, 2) of cameras (N, 4, 4).

    The negative log-likelihood of an isotropic Laplace density, of which two directions are observed.
    """
    R, t = T_map_camera[:, :3, :3], T_map_camera[:, :3, 3]
    local = torch.einsum("nji,nj->ni", R, predicted - t)
    z = local[:, 2]
    offset = local[:, :2] - rays * z[:, None]
    across = (offset.square().sum(dim=1) + 1e-10).sqrt()
    possible = (z > MIN_DEPTH_SHARE * usual_m) & (z < MAX_DEPTH_SHARE * usual_m) & (across < FAR_OFF * z)
    likelihood = across * torch.exp(-log_scale) + 2 * log_scale
    target = torch.cat([rays, torch.ones_like(rays[:, :1])], dim=1) * usual_m
    pull = PULL * (local - target).norm(dim=1) / usual_m + 2 * math.log(usual_m)
    return torch.where(possible, likelihood, pull).mean()


def ray_loss(cells: RayCells, batch: int, device: torch.device) -> Callable[[SCoordNet, torch.Generator], torch.Tensor]:
    """A term for ``train_head``: the reprojection loss of cells drawn at random."""
    cells = cells.to(device)

    def loss(head: SCoordNet, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(cells), (batch,), generator=generator).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted, log_scale = head(cells.inputs[index].float())
        poses = cells.T_map_camera[cells.view[index]]
        return reprojection_loss(predicted, log_scale, cells.rays[index], poses, cells.usual_depth_m)

    return loss
