# SPDX-License-Identifier: Apache-2.0
"""Points and blocks in the check by the whole image: compiled loops, and torch or NumPy where those cannot run."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop, has_numba, runs_compiled
from kfloc_ros.features.backbone import COARSE_STRIDE

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

COLUMNS, ROWS = 8, 6
"""Blocks over the image."""
REACH = 12
"""Largest displacement, in coarse cells."""
MOVED_GAP, MOVED_SIMILARITY, MOVED_NEARLY = 0.08, 0.75, 0.03
"""A displaced block is more similar than without the displacement by the first, similar by the second, and no other
displacement is better by more than the third."""


@compiled_loop
def around(image: Floats, wanted: Floats, column: Integers, row: Integers, out: Floats) -> None:
    """Write the similarities (N, 3, 3) of features (N, C) to the cells (H, W, C) at and around their own."""
    rows, columns, channels = image.shape
    for n in range(len(wanted)):
        feature = wanted[n]
        for i in range(3):
            for j in range(3):
                cell = image[min(max(row[n] + i - 1, 0), rows - 1), min(max(column[n] + j - 1, 0), columns - 1)]
                cosine = np.float32(0.0)
                for c in range(channels):
                    cosine += cell[c] * feature[c]
                out[n, i, j] = cosine


@compiled_loop
def add_surroundings(
    image: Floats, wanted: Floats, column: Integers, row: Integers, group: Integers, weight: Floats, reach: int,
    sums: Floats,
) -> None:  # fmt: skip
    """Add the similarities of features (N, C) to the cells (H, W, C) around their own to sums (G, side, side).

    The weight (N,) of a feature is that in the sum of its group; cells outside the image add nothing.
    """
    rows, columns, channels = image.shape
    for n in range(len(wanted)):
        feature, own, w = wanted[n], sums[group[n]], weight[n]
        for i in range(max(reach - row[n], 0), min(2 * reach + 1, rows - row[n] + reach)):
            for j in range(max(reach - column[n], 0), min(2 * reach + 1, columns - column[n] + reach)):
                cell = image[row[n] + i - reach, column[n] + j - reach]
                cosine = np.float32(0.0)
                for c in range(channels):
                    cosine += cell[c] * feature[c]
                own[i, j] += w * cosine


@compiled_loop
def group_medians(values: Doubles, group: Integers, counts: Integers, medians: Doubles) -> None:
    """Write the numbers (G,) and the medians (G, 2) of values (N, 2) in each group; 0 for empty groups."""
    counts[:] = 0
    for g in group:
        counts[g] += 1
    for g in range(len(counts)):
        medians[g] = 0.0
        if counts[g] == 0:
            continue
        for axis in range(2):
            own, at = np.empty(counts[g]), 0
            for n in range(len(group)):
                if group[n] == g:
                    own[at] = values[n, axis]
                    at += 1
            own.sort()
            medians[g, axis] = 0.5 * (own[(at - 1) // 2] + own[at // 2])


@compiled_loop
def displacement_votes(
    around: Floats, here: Floats, known: Booleans, gap: float, nearly: float, similar: float, votes: Booleans
) -> None:
    """Write (G, side, side) bool: a displacement explains a group better than none, which is the middle one.

    A vote is for similarities (G, side, side), or ones next to them, above three limits: that of no displacement (G,)
    plus ``gap``, the group's best less ``nearly``, and ``similar``. Groups that are not ``known`` (G,) have no votes,
    and neither have displacements by a cell.
    """
    side = around.shape[1]
    votes[:] = False
    for g in range(len(around)):
        if not known[g]:
            continue
        best = around[g].max()
        least = max(here[g] + np.float32(gap), best - np.float32(nearly), np.float32(similar))
        for i in range(side):
            for j in range(side):
                if around[g, i, j] > least:
                    votes[g, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
        middle = side // 2
        votes[g, middle - 1 : middle + 2, middle - 1 : middle + 2] = False


class BlockMean:
    """Weighted mean of the points of each block.

    Args:
        block: (N,) block of each point.
        weight: (N,)
    """

    def __init__(self, block: torch.Tensor, weight: torch.Tensor) -> None:
        total = torch.zeros(ROWS * COLUMNS, device=weight.device).index_add_(0, block, weight)
        self._block, self._weight = block, weight / total.clamp(min=1e-6)[block]

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Return (blocks, a, b) means of values (N, a, b)."""
        mean = torch.zeros(ROWS * COLUMNS, *values.shape[1:], device=values.device)
        return mean.index_add_(0, self._block, values * self._weight[:, None, None])

    def around(self, cells: torch.Tensor, wanted: torch.Tensor, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return mean similarities (blocks, 2 REACH + 1, 2 REACH + 1) to cells (h, w, C) around points, 0 outside."""
        (h, w, C), size, (column, row) = cells.shape, 2 * REACH + 1, at
        if runs_compiled(cells, wanted, self._weight):
            mean, block, weight = torch.zeros(ROWS * COLUMNS, size, size), self._block.numpy(), self._weight.numpy()
            image, points, u, v = cells.numpy(), wanted.numpy(), column.numpy(), row.numpy()
            add_surroundings(image, points, u, v, block, weight, REACH, mean.numpy())
            return mean
        padded = F.pad((wanted @ cells.reshape(-1, C).T).reshape(-1, h, w), (REACH, REACH, REACH, REACH))
        step, width = torch.arange(size, device=cells.device), w + 2 * REACH
        index = (row * width + column)[:, None] + (step[:, None] * width + step).reshape(1, -1)
        return self(padded.reshape(len(wanted), -1).gather(1, index).reshape(-1, size, size))


def block_medians(
    values: NDArray[np.float32], block: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers (blocks,) and the medians (blocks, 2) of values (N, 2) in each block; 0 for empty blocks."""
    if has_numba():
        counts, found = np.empty(ROWS * COLUMNS, np.int64), np.empty((ROWS * COLUMNS, 2))
        group_medians(values.astype(np.float64), block, counts, found)
        return counts, found
    count = np.bincount(block, minlength=ROWS * COLUMNS)
    order = np.argsort(block, kind="stable")
    rank = np.arange(len(block)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((ROWS * COLUMNS, max(int(count.max(initial=0)), 1), 2), np.inf)
    table[block[order], rank] = values[order]
    table.sort(axis=1)
    rows, last = np.arange(ROWS * COLUMNS), np.maximum(count - 1, 0)
    medians = 0.5 * (table[rows, last // 2] + table[rows, np.minimum(count // 2, last)])
    return count, np.where((count > 0)[:, None], medians, 0.0)


def similarities_around(
    cells: torch.Tensor, wanted: torch.Tensor, column: torch.Tensor, row: torch.Tensor
) -> torch.Tensor:
    """Return the similarities (N, 3, 3) of points to the cells (h, w, C) at and around their own."""
    if runs_compiled(cells, wanted):
        out = torch.empty(len(wanted), 3, 3)
        around(cells.numpy(), wanted.numpy(), column.numpy(), row.numpy(), out.numpy())
        return out
    h, w, _ = cells.shape
    step = torch.arange(-1, 2, device=row.device)
    rows = (row[:, None] + step).clamp(0, h - 1)[:, :, None]
    columns = (column[:, None] + step).clamp(0, w - 1)[:, None, :]
    near = cells[rows, columns]
    return torch.einsum("nijc,nc->nij", near, wanted)


def votes_of_blocks(around: torch.Tensor, here: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (blocks, side, side) bool: a displacement explains a known block clearly better than none."""
    if runs_compiled(around):
        found = np.empty(around.shape, dtype=np.bool_)
        limits = MOVED_GAP, MOVED_NEARLY, MOVED_SIMILARITY
        displacement_votes(around.numpy(), here, known, *limits, found)
        return found
    near = slice(REACH - 1, REACH + 2)
    best = around.flatten(1).max(1).values
    smooth = F.max_pool2d(around[:, None], 3, stride=1, padding=1)[:, 0]  # parallax and tilt move blocks apart
    least = torch.maximum(torch.from_numpy(here) + MOVED_GAP, best - MOVED_NEARLY).clamp(min=MOVED_SIMILARITY)
    votes = (smooth > least[:, None, None]).numpy() & known[:, None, None]
    votes[:, near, near] = False
    return votes


@dataclass(frozen=True, eq=False)
class DisplacedPart:
    """Connected blocks that agree on one displacement."""

    part: NDArray[np.bool_]
    """(blocks,) true for its blocks."""
    shift_px: tuple[float, float]
    """Right and down."""


def displaced_part(around: torch.Tensor, here: NDArray[np.float32], known: NDArray[np.bool_]) -> DisplacedPart | None:
    """Return the largest connected set of blocks that agree on one displacement; None if no block is displaced."""
    votes = votes_of_blocks(around, here, known)
    tally = votes.sum(axis=0, dtype=np.int32)
    found: DisplacedPart | None = None
    for flat in np.argsort(-tally, axis=None, kind="stable")[:8]:
        down, right = (int(i) for i in np.unravel_index(flat, tally.shape))
        if tally[down, right] <= (0 if found is None else found.part.sum()):
            break
        voting = votes[:, down, right].reshape(ROWS, COLUMNS).astype(np.uint8)
        _, labels, stats, _ = cv2.connectedComponentsWithStats(voting, connectivity=4)
        largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
        part = (labels == largest).reshape(-1)
        if found is None or part.sum() > found.part.sum():
            shift_px = float(COARSE_STRIDE * (right - REACH)), float(COARSE_STRIDE * (down - REACH))
            found = DisplacedPart(part, shift_px)
    return found


def run_once() -> None:
    """Run every loop on a point, so that it is compiled, or read from the disk, before an image waits for it."""
    image, row, weight = (np.zeros(size, dtype=np.float32) for size in ((2, 2, 1), (1, 1), 1))
    first, out = np.zeros(1, dtype=np.int64), np.zeros((1, 3, 3), dtype=np.float32)
    around(image, row, first, first, out)
    add_surroundings(image, row, first, first, first, weight, 1, out)
    group_medians(np.zeros((1, 2)), first, np.zeros(1, dtype=np.int64), np.zeros((1, 2)))
    known = np.ones(1, dtype=np.bool_)
    displacement_votes(out, row[0], known, 0.0, 0.0, 0.0, np.empty(out.shape, dtype=np.bool_))
