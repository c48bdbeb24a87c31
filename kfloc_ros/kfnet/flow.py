# SPDX-License-Identifier: Apache-2.0
"""Cost volume of the fast family: similarity of each cell to the previous frame's cells around its last position.

There are two levels. A full search at stride 16 gives the integer displacement. A 5x5 window around it at stride 8
gives the scores from which the flow is read: by the trained network of ``flow_network``, or here by a soft-argmax with
only a temperature. The variance of the flow is then the second moment of the match distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kfloc_ros.device import runs_compiled

SEARCH_RADIUS = 4
"""Search radius in cells of stride 16: displacements of up to 64 pixels between frames."""
REFINE_RADIUS = 2
"""Radius in cells of stride 8 around the displacement of the coarse search."""
WINDOW_CELLS = (2 * REFINE_RADIUS + 1) ** 2
PIXEL_LOCKING_VARIANCE = 0.02
"""Smallest variance of the flow, square cells, even for a sharp match."""
CHUNK_CELLS = 600
"""Cells whose windows are gathered at a time: 4 MB stay in a processor's cache, which halves the time."""
MIN_CORRELATION = 0.5
"""Smallest correlation of a cell's best match; a cell below it has come into view, or was occluded."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Backward flow: cell p of this frame was at p + flow in the previous one."""

    offset: torch.Tensor
    """(2, h, w) cells, x then y."""
    variance: torch.Tensor
    """(h, w) square cells, per axis."""
    valid: torch.Tensor
    """(h, w) bool: the match is similar enough and lies inside the previous image and the search window."""
    at_edge: torch.Tensor | None = None
    """(h, w) bool: the match lies at the border of the search window, so the true match may lie outside."""
    process_variance_m2: torch.Tensor | None = None
    """(h, w) process noise per axis, if a network predicts it; None: the filter models it from ``variance``."""


@dataclass(frozen=True, eq=False)
class CostWindow:
    """Scores of each cell's search window."""

    base: torch.Tensor
    """(2, h, w) centre of the window relative to the cell, in cells, x then y, even numbers."""
    scores: torch.Tensor
    """(h w, :data:`WINDOW_CELLS`) cosines of the features, rows of the window first."""
    inside: torch.Tensor
    """(h w, :data:`WINDOW_CELLS`) bool: the cell of the window lies in the previous image."""
    at_edge: torch.Tensor
    """(h, w) bool: the displacement is the largest that the search covers."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        h, w = self.at_edge.shape
        return h, w


def window_offsets(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return (:data:`WINDOW_CELLS`, 2) positions of the window's cells relative to its centre, x then y."""
    span = torch.arange(-REFINE_RADIUS, REFINE_RADIUS + 1, device=device)
    oy, ox = (o.reshape(-1) for o in torch.meshgrid(span, span, indexing="ij"))
    return torch.stack([ox, oy], dim=1)


def cost_window(current: torch.Tensor, previous: torch.Tensor) -> CostWindow:
    """Return the cost volume of L2-normalised features (C, h, w) of two frames at stride 8."""
    C, h, w = current.shape
    if runs_compiled(current, previous):
        return _compiled_cost_window(current, previous)
    base, at_edge = _search(current, previous)
    offsets = window_offsets(current.device)
    x = torch.arange(w, device=current.device)
    y = torch.arange(h, device=current.device)[:, None]
    table = previous.reshape(C, h * w).t().contiguous()
    query = current.reshape(C, h * w).t().contiguous()
    col = (x + base[0]).reshape(-1, 1) + offsets[:, 0]
    row = (y + base[1]).reshape(-1, 1) + offsets[:, 1]
    inside = (col >= 0) & (col < w) & (row >= 0) & (row < h)
    index = row.clamp(0, h - 1) * w + col.clamp(0, w - 1)
    scores = torch.empty(h * w, WINDOW_CELLS, device=current.device, dtype=current.dtype)
    for first in range(0, h * w, CHUNK_CELLS):
        part = slice(first, first + CHUNK_CELLS)
        gathered = table.index_select(0, index[part].reshape(-1)).reshape(-1, WINDOW_CELLS, C)
        scores[part] = (gathered * query[part, None]).sum(-1)
    return CostWindow(base, scores, inside, at_edge)


def _compiled_cost_window(current: torch.Tensor, previous: torch.Tensor) -> CostWindow:
    from kfloc_ros.kfnet import kernels

    _, h, w = current.shape
    # in the backbone's memory layout channels are contiguous already
    now, before = (grid.permute(1, 2, 0).contiguous().numpy() for grid in (current, previous))
    best_x, best_y = kernels.search(kernels.pooled(now), kernels.pooled(before), SEARCH_RADIUS)
    dx, dy = torch.from_numpy(best_x), torch.from_numpy(best_y)
    base, at_edge = _at_cells(dx, dy, h, w)
    scores = torch.empty(h * w, WINDOW_CELLS)
    inside = torch.empty(h * w, WINDOW_CELLS, dtype=torch.bool)
    kernels.window_scores(now, before, base.numpy(), REFINE_RADIUS, scores.numpy(), inside.numpy())
    return CostWindow(base, scores, inside, at_edge)


def backward_flow(current: torch.Tensor, previous: torch.Tensor, temperature: float) -> Flow:
    """Return the flow by soft-argmax, from L2-normalised features (C, h, w) of two frames.

    Args:
        current, previous: backbone features at stride 8.
        temperature: of the softmax over correlations; calibrated when the map is built.
    """
    window = cost_window(current, previous)
    h, w = window.grid
    probability = (window.scores / temperature).masked_fill(~window.inside, -torch.inf).softmax(dim=1)
    probability = torch.nan_to_num(probability)
    offsets = window_offsets(current.device).to(current.dtype)
    mean = probability @ offsets
    second = probability @ (offsets * offsets)
    variance = (second - mean * mean).clamp(min=0).mean(1) + PIXEL_LOCKING_VARIANCE
    offset = mean.t().reshape(2, h, w) + window.base
    similar = (probability * window.scores).sum(1).reshape(h, w) >= MIN_CORRELATION
    valid = similar & ends_inside(offset) & ~window.at_edge
    return Flow(offset, variance.reshape(h, w), valid, window.at_edge)


def ends_inside(offset: torch.Tensor) -> torch.Tensor:
    """Return (h, w) bool: a flow (2, h, w) ends inside the previous image."""
    h, w = offset.shape[1:]
    x = torch.arange(w, device=offset.device) + offset[0]
    y = torch.arange(h, device=offset.device)[:, None] + offset[1]
    return (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)


def _search(current: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the displacement (2, h, w) in stride-8 cells by full search at stride 16, and (h, w) bool, at the edge."""
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
    return _at_cells(dx, dy, h, w)


def _at_cells(dx: torch.Tensor, dy: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return displacements at stride 16 as (2, h, w) in stride-8 cells, and (h, w) bool, at the edge of the search."""
    edge = (dx.abs() == SEARCH_RADIUS) | (dy.abs() == SEARCH_RADIUS)
    base = (2 * torch.stack([dx, dy])).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :h, :w].contiguous()
    return base, edge.repeat_interleave(2, 0).repeat_interleave(2, 1)[:h, :w]
