# SPDX-License-Identifier: Apache-2.0
"""Check of an aligned pose by the whole image, block by block.

An alignment sees a few pixels around each point. Block by block, every reference point in view is compared with the
cells around its projection, and the similarities of the points of one block are averaged, displacement by displacement.
A block matches if no other displacement is clearly better than none. Blocks that touch each other and agree on one
displacement are a part of the scene that moved, or the pose is that of the moved part.

Closer by, every point searches the cells around its projection for itself, and each block has the median displacement
of its points. At a right pose these medians are noise of a pixel or two. A wrong camera, a rolling shutter, parts that
moved a little, or a pose between two groups of points leave displacements that whole blocks agree on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.device import has_numba, runs_compiled
from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc import check_kernels
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.point_matching import best_cells
from kfloc_ros.pixloc.references import ReferencePoints

COLUMNS, ROWS = 8, 6
"""Blocks over the image."""
REACH = 12
"""Largest displacement, in coarse cells."""
MAX_POINTS = 300
"""Points that are compared, spread over those in view."""
BLOCK_POINTS = 4
"""Smallest number of points of a block that is compared."""
MIN_BLOCKS = 6
SIMILAR = 0.75
"""Similarity of a block that matches for certain."""
CLEAR_SHARE = 0.85
"""Share of such blocks from which displacements are not searched at all."""
SHIFT_CELLS = 4
"""Half side of the window in which every point searches for itself, in coarse cells."""
MATCHED, MATCHED_GAP = 0.6, 0.02
"""A point is found if it is as similar as the first; further than a cell away, it is more similar by the second."""
MAX_SHIFT_PX = 24.0
"""Displacement of a block that counts most."""
SHIFTED_PX = 4.0
"""Displacement of a block that noise does not explain."""
SHIFT_NOISE_PX = 0.7
"""Smallest standard deviation of a block's median displacement."""
MAX_SHIFT_CHI2 = 25.0
"""Largest squared displacement of a block, relative to its variance, that counts."""
MOVED_BLOCKS, MOVED_SHARE = 4, 0.08
"""Blocks, and share of the blocks, that agree on a displacement where a part has moved."""
EXCESS_POWER = 0.5
"""Power of that part's share: displacements a little beyond noise, as good images of every map have, say little."""
SHIFTED_CHI2, SHIFTED_SHARE, SHIFTED_RMS_PX = 6.0, 0.25, 8.5
"""``shift_chi2``, share of displaced blocks, and ``shift_px`` from which an image contradicts its pose."""
MATCHING_GAP, MIN_SIMILARITY = 0.03, 0.6
"""A block that is less similar matches if no displacement gains more than the first, and if it is at least as similar
as the second, which unrelated features reach somewhere in their surroundings."""
MOVED_GAP, MOVED_SIMILARITY, MOVED_NEARLY = 0.08, 0.75, 0.03
"""A displaced block is more similar than without the displacement by the first, similar by the second, and no other
displacement is better by more than the third."""


@dataclass(frozen=True, eq=False)
class BlockMatch:
    """Agreement of an image with the map at a pose."""

    blocks: int
    """Blocks with enough points in view."""
    matching: int
    """Blocks that match where the map has them."""
    moved: int
    """Blocks of the largest connected part that agrees on one displacement."""
    moved_px: tuple[float, float]
    """Displacement of that part, right and down."""
    moved_depth_m: float
    """Median depth of that part."""
    shift_px: float = 0.0
    """Root mean square of the blocks' median displacements, see the module's docstring."""
    shift_chi2: float = 0.0
    """Mean square of these displacements relative to their standard deviations; about 1 at a right pose."""
    shifted: int = 0
    """Blocks that are displaced by more than a few pixels and twice their standard deviation."""
    depth_m: float = 0.0
    """Median depth of the points in view."""

    @property
    def shifted_share(self) -> float:
        """Share of the blocks that are displaced."""
        return self.shifted / self.blocks

    @property
    def has_moved_part(self) -> bool:
        """True if a part of the image is displaced as one."""
        is_large = self.moved >= max(MOVED_BLOCKS, MOVED_SHARE * self.blocks)
        return is_large and self.matching_share <= 1.0 - MOVED_SHARE

    @property
    def fault(self) -> str:
        """Contradiction between the image and its pose as a sentence; empty if there is none."""
        if self.has_moved_part:
            right, down = self.moved_px
            return (
                f"{100 * self.moved_share:.0f} % of the image, as one part, is displaced by {right:+.0f} px right and "
                f"{down:+.0f} px down, while {100 * self.matching_share:.0f} % match: something has moved"
            )
        if self.shift_chi2 < SHIFTED_CHI2 or self.shifted_share < SHIFTED_SHARE or self.shift_px < SHIFTED_RMS_PX:
            return ""
        return (
            f"{100 * self.shifted_share:.0f} % of the image is displaced, by {self.shift_px:.0f} px in the root mean "
            "square over the image: something has moved, or the image is distorted"
        )

    def variances(self, camera: Camera, usual_chi2: float) -> NDArray[np.float64]:
        """Return the variances (6,) of the pose, m^2 and rad^2, that cover the displacements: by turning, by moving.

        Displacements count as far as they are beyond ``usual_chi2``, the ``shift_chi2`` of right poses in the map.

        The pose is that of a moved part as likely as the part is large among what agrees with either; its displacement
        is one turn or motion in an unknown direction, so each axis has a third.
        """
        variances = np.zeros(6)
        if self.has_moved_part:
            right, down = self.moved_px
            turn_rad = math.hypot(right / camera.fx, down / camera.fy)
            likely = self.moved / (self.moved + self.matching)
            variances += likely / 3.0 * np.repeat([(turn_rad * self.moved_depth_m) ** 2, turn_rad**2], 3)
        if self.shift_chi2 > usual_chi2:
            turn_rad = self.shift_px * (1.0 - usual_chi2 / self.shift_chi2) ** EXCESS_POWER / camera.fx
            variances += np.repeat([(turn_rad * self.depth_m) ** 2, turn_rad**2], 3)
        return variances

    @property
    def matching_share(self) -> float:
        """Share of the blocks that match."""
        return self.matching / self.blocks

    @property
    def moved_share(self) -> float:
        """Share of the blocks that belong to a displaced part."""
        return self.moved / self.blocks


def match_blocks(
    image: FeatureImage,
    points: torch.Tensor,
    references: ReferencePoints,
    T_camera_local: Matrix,
    camera: Camera,
) -> BlockMatch | None:
    """Compare an image with reference points at a pose.

    Args:
        image: coarse unit features of the image.
        points: (N, 3) reference points in a frame near the camera, metres.
        references: the same points with their coarse features and confidence.
        T_camera_local: pose (4, 4) that maps points of that frame to the camera frame.
        camera: pinhole camera of the image.

    Returns:
        None if too few blocks have points in view.
    """
    h, w, _ = image.features.shape
    at, P, in_front = project(points, torch.from_numpy(T_camera_local).to(points), camera, COARSE_STRIDE)
    column, row = at.round().long().unbind(1)
    seen = torch.nonzero(in_front & (column >= 0) & (column < w) & (row >= 0) & (row < h))[:, 0]
    if len(seen) < MIN_BLOCKS * BLOCK_POINTS:
        return None
    if len(seen) > MAX_POINTS:
        seen = seen[torch.linspace(0, len(seen) - 1, MAX_POINTS, device=seen.device).long()]
    column, row = column[seen], row[seen]
    block = (row * ROWS // h) * COLUMNS + column * COLUMNS // w
    known = (torch.bincount(block, minlength=ROWS * COLUMNS) >= BLOCK_POINTS).cpu().numpy()
    blocks = int(known.sum())
    if blocks < MIN_BLOCKS:
        return None
    mean = _BlockMean(block, references.confidence[seen])
    wanted = references.coarse[seen]
    here_of_points = _here(image.features, wanted, column, row)
    here = mean(here_of_points).flatten(1).max(1).values.cpu().numpy()
    found = _shifts(image, wanted, at[seen], here_of_points.flatten(1).max(1).values, block)
    shifts = (*found, float(P[seen, 2].median()))
    similar = known & (here > SIMILAR)
    if similar.sum() >= CLEAR_SHARE * blocks:
        return BlockMatch(blocks, int(similar.sum()), 0, (0.0, 0.0), 0.0, *shifts)
    open_blocks = known & ~similar  # a block that is similar here is not displaced
    of_open = torch.from_numpy(open_blocks).to(block.device)[block]
    mean = _BlockMean(block[of_open], references.confidence[seen][of_open])
    around = mean.around(image.features, wanted[of_open], (column[of_open], row[of_open])).cpu()
    moved = _moved_part(around, here, open_blocks)
    best = around.flatten(1).max(1).values.numpy()
    matching = similar | (open_blocks & (here > MIN_SIMILARITY) & (best - here <= MATCHING_GAP))
    if moved is None:
        return BlockMatch(blocks, int(matching.sum()), 0, (0.0, 0.0), 0.0, *shifts)
    depth = P[seen, 2][torch.from_numpy(moved.part).to(block.device)[block]]
    part, depth_m = int(moved.part.sum()), float(depth.median())
    return BlockMatch(blocks, int(matching.sum()), part, moved.shift_px, depth_m, *shifts)


class _BlockMean:
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
            check_kernels.add_surroundings(image, points, u, v, block, weight, REACH, mean.numpy())
            return mean
        padded = F.pad((wanted @ cells.reshape(-1, C).T).reshape(-1, h, w), (REACH, REACH, REACH, REACH))
        step, width = torch.arange(size, device=cells.device), w + 2 * REACH
        index = (row * width + column)[:, None] + (step[:, None] * width + step).reshape(1, -1)
        return self(padded.reshape(len(wanted), -1).gather(1, index).reshape(-1, size, size))


def _shifts(
    image: FeatureImage, wanted: torch.Tensor, at: torch.Tensor, here: torch.Tensor, block: torch.Tensor
) -> tuple[float, float, int]:
    """Return ``shift_px``, ``shift_chi2`` and ``shifted`` of a :class:`BlockMatch`; zeros if few blocks are found.

    Args:
        image: coarse unit features of the image.
        wanted, block: (N, C) features and (N,) blocks of the points.
        at, here: (N, 2) cells at which they are projected, and (N,) their similarity there and next to them.
    """
    found, similarity, at_border = best_cells(image, wanted, at, SHIFT_CELLS)
    shift = ((found - at) * image.stride).cpu().numpy()
    near, best = here.cpu().numpy(), similarity.cpu().numpy()
    is_near = np.abs(shift).max(axis=1) <= 1.5 * image.stride
    is_found = ~at_border.cpu().numpy() & (best > MATCHED) & (is_near | (best > near + MATCHED_GAP))
    stays = ~is_found & (near > MATCHED) & (near >= best - MATCHED_GAP)
    shift[stays] = 0.0
    used = is_found | stays
    shift, blocks = shift[used], block.cpu().numpy()[used]
    count, median = _block_medians(shift, blocks)
    _, spread = _block_medians(np.abs(shift - median[blocks]), blocks)
    is_known = count >= BLOCK_POINTS
    if is_known.sum() < MIN_BLOCKS:
        return 0.0, 0.0, 0
    length = np.hypot(*median[is_known].T)
    # points of several views share corners: half of them count
    sigma = 1.25 * 1.4826 * np.hypot(*spread[is_known].T) / np.sqrt(0.5 * count[is_known])
    sigma = np.maximum(sigma, SHIFT_NOISE_PX)
    chi2 = np.minimum((length / sigma) ** 2, MAX_SHIFT_CHI2).mean()
    shifted = (length > SHIFTED_PX) & (length > 2.0 * sigma)
    rms_px = np.sqrt((np.minimum(length, MAX_SHIFT_PX) ** 2).mean())
    return float(rms_px), float(chi2), int(shifted.sum())


def _block_medians(
    values: NDArray[np.float32], block: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers (blocks,) and the medians (blocks, 2) of values (N, 2) in each block; 0 for empty blocks."""
    if has_numba():
        counts, found = np.empty(ROWS * COLUMNS, np.int64), np.empty((ROWS * COLUMNS, 2))
        check_kernels.group_medians(values.astype(np.float64), block, counts, found)
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


def _here(cells: torch.Tensor, wanted: torch.Tensor, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return the similarities (N, 3, 3) of points to the cells (h, w, C) at and around their own."""
    if runs_compiled(cells, wanted):
        out = torch.empty(len(wanted), 3, 3)
        check_kernels.around(cells.numpy(), wanted.numpy(), column.numpy(), row.numpy(), out.numpy())
        return out
    h, w, _ = cells.shape
    step = torch.arange(-1, 2, device=row.device)
    rows = (row[:, None] + step).clamp(0, h - 1)[:, :, None]
    columns = (column[:, None] + step).clamp(0, w - 1)[:, None, :]
    near = cells[rows, columns]
    return torch.einsum("nijc,nc->nij", near, wanted)


@dataclass(frozen=True, eq=False)
class _MovedPart:
    part: NDArray[np.bool_]
    """(blocks,)"""
    shift_px: tuple[float, float]


def _moved_part(around: torch.Tensor, here: NDArray[np.float32], known: NDArray[np.bool_]) -> _MovedPart | None:
    """Return the largest connected set of blocks that agree on one displacement; None if no block is displaced."""
    votes = _displacement_votes(around, here, known)
    tally = votes.sum(axis=0, dtype=np.int32)
    found: _MovedPart | None = None
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
            found = _MovedPart(part, shift_px)
    return found


def _displacement_votes(around: torch.Tensor, here: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (blocks, side, side) bool: a displacement explains a known block clearly better than none."""
    if runs_compiled(around):
        found = np.empty(around.shape, dtype=np.bool_)
        limits = MOVED_GAP, MOVED_NEARLY, MOVED_SIMILARITY
        check_kernels.displacement_votes(around.numpy(), here, known, *limits, found)
        return found
    near = slice(REACH - 1, REACH + 2)
    best = around.flatten(1).max(1).values
    smooth = F.max_pool2d(around[:, None], 3, stride=1, padding=1)[:, 0]  # parallax and tilt move blocks apart
    least = torch.maximum(torch.from_numpy(here) + MOVED_GAP, best - MOVED_NEARLY).clamp(min=MOVED_SIMILARITY)
    votes = (smooth > least[:, None, None]).numpy() & known[:, None, None]
    votes[:, near, near] = False
    return votes
