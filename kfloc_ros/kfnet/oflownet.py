# SPDX-License-Identifier: Apache-2.0
"""OFlowNet of the fast family: backward flow between frames from a cost volume on trunk features.

Two levels: a full search at stride 16 gives the integer displacement, a 5x5 search around it at stride 8
the sub-cell one by soft-argmax. The second moment of the match distribution is the flow's variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SEARCH_RADIUS = 4
"""Cells of stride 16: displacements up to 64 pixels between frames."""
REFINE_RADIUS = 2
"""Cells of stride 8 around the displacement found above."""
PIXEL_LOCKING_VARIANCE = 0.02
"""Square cells; what remains uncertain even under a sharp match."""
MIN_CORRELATION = 0.5
"""A cell whose best match is less alike than this came into view, or was occluded."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Backward flow: cell p of this frame was at p + flow in the previous one."""

    offset: torch.Tensor
    """(2, h, w) cells, x then y."""
    variance: torch.Tensor
    """(h, w) square cells, per axis."""
    valid: torch.Tensor
    """(h, w) bool: the match is alike and lies inside the previous image and the search window."""
    at_edge: torch.Tensor | None = None
    """(h, w) bool: the match lies at the border of the search window, so the true one may lie beyond it."""
    process_variance_m2: torch.Tensor | None = None
    """(h, w) process noise per axis where a network predicts it; None: the filter models it from ``variance``."""


def backward_flow(current: torch.Tensor, previous: torch.Tensor, temperature: float) -> Flow:
    """Flow from L2-normalised features (C, h, w) of two frames.

    Args:
        current, previous: trunk features at stride 8.
        temperature: of the softmax over correlations; calibrated when the map is built.
    """
    C, h, w = current.shape
    base, at_edge = _search(current, previous)
    x = torch.arange(w, device=current.device)
    y = torch.arange(h, device=current.device)[:, None]
    table = previous.reshape(C, h * w).t().contiguous()
    query = current.reshape(C, h * w).t()
    span = torch.arange(-REFINE_RADIUS, REFINE_RADIUS + 1, device=current.device)
    oy, ox = (o.reshape(-1) for o in torch.meshgrid(span, span, indexing="ij"))
    col = (x + base[0]).reshape(-1, 1) + ox
    row = (y + base[1]).reshape(-1, 1) + oy
    inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
    index = row.clamp(0, h - 1) * w + col.clamp(0, w - 1)
    scores = torch.bmm(table[index.reshape(-1)].reshape(h * w, -1, C), query[:, :, None])[..., 0]
    probability = (scores / temperature).masked_fill(~inside, -torch.inf).softmax(dim=1)
    probability = torch.nan_to_num(probability)
    offsets = torch.stack([ox, oy], dim=1).to(current.dtype)
    mean = probability @ offsets
    second = probability @ (offsets * offsets)
    variance = (second - mean * mean).clamp(min=0).mean(1) + PIXEL_LOCKING_VARIANCE
    offset = mean.t().reshape(2, h, w) + base
    target_x, target_y = x + offset[0], y + offset[1]
    alike = (probability * scores).sum(1).reshape(h, w) >= MIN_CORRELATION
    valid = alike & (target_x >= 0) & (target_x <= w - 1) & (target_y >= 0) & (target_y <= h - 1) & ~at_edge
    return Flow(offset, variance.reshape(h, w), valid, at_edge)


def _search(current: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer displacement (2, h, w) in stride-8 cells by full search at stride 16, and where it touches the edge."""
    h, w = current.shape[1:]
    a = F.normalize(F.avg_pool2d(current[None], 2, ceil_mode=True)[0], dim=0)
    b = F.normalize(F.avg_pool2d(previous[None], 2, ceil_mode=True)[0], dim=0)
    rows, cols = a.shape[1:]
    r = SEARCH_RADIUS
    padded = F.pad(b, (r, r, r, r))
    side = 2 * r + 1
    scores = torch.stack(
        [(a * padded[:, dy : dy + rows, dx : dx + cols]).sum(0) for dy in range(side) for dx in range(side)]
    )
    # a match must hold for a neighbourhood, which keeps single repeated cells from winning
    scores = F.avg_pool2d(scores[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    best = scores.argmax(dim=0)
    dx, dy = best % side - r, torch.div(best, side, rounding_mode="floor") - r
    edge = (dx.abs() == r) | (dy.abs() == r)
    base = (2 * torch.stack([dx, dy])).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :h, :w]
    return base, edge.repeat_interleave(2, 0).repeat_interleave(2, 1)[:h, :w]
