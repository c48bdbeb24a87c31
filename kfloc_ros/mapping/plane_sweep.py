# SPDX-License-Identifier: Apache-2.0
"""Plane sweep: depth of a view's cells from other views with known poses, by correlation of the backbone's features.

For each cell, many depths are tried; at each, its features are compared with those of the neighbours at the projected
position. With known poses this is a search along a line, in all neighbours at once, which is why the features of one
network pass suffice: repeated texture seldom repeats along every neighbour's line. Every second cell is searched, in a
chessboard pattern; a cell between four consistent ones gets their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.geometry.camera import Camera

FINE_HALF_STEPS = 6
"""Number of fine steps on either side of the best step, within one and a half steps."""
MIN_STEPS, MAX_STEPS = 16, 128
MIN_NEIGHBOURS = 2
"""Number of neighbours in which a cell must be visible at its depth."""
RIVAL_STEPS = 4
"""A score at least this many steps from the best one competes with it; nearer ones belong to the same peak."""
NORM_ZOOM = 4
"""Resolution of the map of feature lengths between cells, in samples per cell."""
AGREE_RATIO = 1.06
"""Factor within which depths of neighbouring cells belong to one surface."""


@dataclass(frozen=True, eq=False)
class PlaneSweepView:
    """Features and pose of a view for the plane sweep."""

    coarse: torch.Tensor
    """(64, h, w) unit features at stride 8, any float type."""
    T_map_camera: torch.Tensor
    """(4, 4) float64."""


@dataclass(frozen=True)
class PlaneSweepSettings:
    """Search range and acceptance limits of depths."""

    near_m: float
    far_m: float
    step_px: float = 8.0
    """Distance of tried depths in the neighbour with the longest baseline, about one cell."""
    min_score: float = 0.7
    """Smallest mean correlation with the neighbours."""
    min_margin: float = 0.03
    """Smallest difference between the best score and any competing one."""


@dataclass(frozen=True, eq=False)
class _Match:
    """Correlations of a neighbour with the cells, and the projection of the cells into it."""

    likeness: torch.Tensor
    """(N, 1, h, w) inner products of features."""
    lengths: torch.Tensor
    """(1, 1, 4h, 4w) lengths of the features interpolated between cells, which are shorter there."""
    direction: torch.Tensor
    """(N, 3) rays of the cells in the neighbour's frame."""
    offset: torch.Tensor
    """(3,) the view's centre in the neighbour's frame."""


@torch.inference_mode()
def plane_sweep_depth(
    view: PlaneSweepView, neighbours: Sequence[PlaneSweepView], camera: Camera, settings: PlaneSweepSettings
) -> torch.Tensor:
    """Return the depth (h, w) of a view's cells along the optical axis, 0 where it is rejected.

    Args:
        view: view to compute depth for.
        neighbours: views of the same camera with a baseline.
        camera: pinhole camera of all views.
        settings: search range and acceptance limits.
    """
    c, h, w = view.coarse.shape
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    cells = torch.nonzero(((row + col) % 2 == 0).reshape(-1))[:, 0]
    own = view.coarse.float().reshape(c, -1).t()[cells]
    rays = cell_rays(h, w, camera)[cells]
    matches = [_match(own, rays, view, other) for other in neighbours]
    span = 1 / settings.near_m - 1 / settings.far_m
    longest = max(float(match.offset.norm()) for match in matches)
    steps = int(min(max(longest * span * camera.fx / settings.step_px, MIN_STEPS), MAX_STEPS))
    grid = torch.linspace(1 / settings.far_m, 1 / settings.near_m, steps)
    score = _score(matches, grid.expand(len(cells), -1), camera)
    best = score.argmax(dim=1, keepdim=True)
    rival = (torch.arange(steps) - best).abs() >= RIVAL_STEPS
    margin = score.gather(1, best)[:, 0] - torch.where(rival, score, torch.full((), -1.0)).amax(dim=1)
    step = 1.5 * (grid[1] - grid[0]) / FINE_HALF_STEPS
    offsets = torch.arange(-FINE_HALF_STEPS, FINE_HALF_STEPS + 1) * step
    inverse = (grid[best] + offsets).clamp(min=1e-6)
    score = _score(matches, inverse, camera)
    top = score[:, 1:-1].argmax(dim=1, keepdim=True) + 1
    left, peak, right = (score.gather(1, top + k)[:, 0] for k in (-1, 0, 1))
    bend = (left - 2 * peak + right).clamp(max=-1e-6)
    refined = inverse.gather(1, top)[:, 0] + (0.5 * (left - right) / bend).clamp(-0.5, 0.5) * step
    inner = (best[:, 0] > 0) & (best[:, 0] < steps - 1)
    good = inner & (peak > settings.min_score) & (margin > settings.min_margin) & (refined > 1e-6)
    whole = torch.zeros(h * w)
    whole[cells] = torch.where(good, refined, torch.zeros(()))
    return _fill(whole.reshape(h, w))


def cell_rays(h: int, w: int, camera: Camera) -> torch.Tensor:
    """Return rays (h w, 3) with z = 1 through the cells' centres."""
    centre = (COARSE_STRIDE - 1) / 2
    rows, cols = (torch.arange(n, dtype=torch.float32) * COARSE_STRIDE + centre for n in (h, w))
    v, u = torch.meshgrid(rows, cols, indexing="ij")
    rays = torch.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, torch.ones_like(u)], dim=-1)
    return rays.reshape(-1, 3)


def _match(own: torch.Tensor, rays: torch.Tensor, view: PlaneSweepView, other: PlaneSweepView) -> _Match:
    features = other.coarse.float()
    c, h, w = features.shape
    likeness = (own @ features.reshape(c, -1)).reshape(-1, 1, h, w)
    finer = F.interpolate(features[None], scale_factor=NORM_ZOOM, mode="bilinear", align_corners=False)
    T = (torch.linalg.inv(other.T_map_camera) @ view.T_map_camera).float()
    return _Match(likeness, finer.norm(dim=1, keepdim=True), rays @ T[:3, :3].t(), T[:3, 3])


def _score(matches: Sequence[_Match], inverse: torch.Tensor, camera: Camera) -> torch.Tensor:
    """Return the mean correlation (N, D) of cells at inverse depths (N, D) with the neighbours, -1 if not visible."""
    total, count = torch.zeros(inverse.shape), torch.zeros(inverse.shape)
    for match in matches:
        h, w = match.likeness.shape[-2:]
        x, y, z = (match.direction[:, k, None] + inverse * match.offset[k] for k in range(3))
        z_safe = z.clamp(min=1e-3)
        u = (camera.fx * x / z_safe + camera.cx + 0.5) / (w * COARSE_STRIDE) * 2 - 1
        v = (camera.fy * y / z_safe + camera.cy + 0.5) / (h * COARSE_STRIDE) * 2 - 1
        places = torch.stack([u, v], dim=-1)
        sampled = F.grid_sample(match.likeness, places[:, None], align_corners=False, padding_mode="border")[:, 0, 0]
        lengths = F.grid_sample(match.lengths, places[None], align_corners=False, padding_mode="border")[0, 0]
        visible = (u.abs() < 1) & (v.abs() < 1) & (z > 1e-3)
        total += torch.where(visible, sampled / lengths.clamp(min=1e-3), torch.zeros(()))
        count += visible
    enough = count >= min(MIN_NEIGHBOURS, len(matches))
    return torch.where(enough, total / count.clamp(min=1), torch.full((), -1.0))


def _fill(inverse: torch.Tensor) -> torch.Tensor:
    """Return the depth (h, w) from a chessboard of inverse depths; other cells get the mean of four consistent ones."""
    padded = F.pad(inverse, (1, 1, 1, 1))
    around = torch.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    agree = (around.amin(0) > 0) & (around.amax(0) < AGREE_RATIO * around.amin(0))
    filled = torch.where((inverse == 0) & agree, around.mean(0), inverse)
    return torch.where(filled > 0, 1 / filled.clamp(min=1e-6), torch.zeros(()))
