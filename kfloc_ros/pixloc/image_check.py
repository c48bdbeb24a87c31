# SPDX-License-Identifier: Apache-2.0
"""Check of an aligned pose by the whole image, block by block.

An alignment sees a few pixels around each point. Block by block, every reference point in view is compared with the
cells around its projection, and the similarities of the points of one block are averaged, displacement by displacement.
A block matches if no other displacement is clearly better than none. Blocks that touch each other and agree on one
displacement are a part of the scene that moved, or the pose is that of the moved part.

Closer by, every point searches the cells around its projection for itself, and each block has the median displacement
of its points. At a right pose these medians are noise of a pixel or two. A wrong camera, a rolling shutter, parts that
moved a little, or a pose between two groups of points leave displacements that whole blocks agree on.

If something moved, the image has two poses: that of what stayed, and that of the part that moved. Of all rectangles of
blocks, the one counts whose own displacement explains most of what a change of the pose does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc.check_kernels import (
    COLUMNS,
    ROWS,
    BlockMean,
    block_medians,
    displaced_part,
    similarities_around,
)
from kfloc_ros.pixloc.cost import POSE, FeatureImage, Intrinsics, project, projection_derivatives
from kfloc_ros.pixloc.point_matching import PointMatches, best_cells
from kfloc_ros.pixloc.references import ReferencePoints

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
PART_BLOCKS = 4, 32
"""Smallest and largest number of blocks of a part that may have moved; the rest of the image has at least the first."""
LEAST_FIXED = 0.02
"""Share of a part's information on its displacement that has to be left beside the pose's."""
PART_NOISE_PX = 1.0
"""Smallest standard deviation of a block's median displacement in the search of such a part."""
USUAL_GAIN = 60.0
"""Gain by a part up to which displacements are usual: the middle of six maps' 95 % quantiles (36 to 219) of good
images 0.15 and 0.3 m away from the mapped views. If something moved by 25 px, nine of ten have 90 and more."""
MATCHING_GAP, MIN_SIMILARITY = 0.03, 0.6
"""A block that is less similar matches if no displacement gains more than the first, and if it is at least as similar
as the second, which unrelated features reach somewhere in their surroundings."""


RECTANGLES = np.array([r for r in np.ndindex(ROWS, COLUMNS, ROWS + 1, COLUMNS + 1) if r[0] < r[2] and r[1] < r[3]])
_AREAS = (RECTANGLES[:, 2:] - RECTANGLES[:, :2]).prod(axis=1)
RECTANGLES = RECTANGLES[(PART_BLOCKS[0] <= _AREAS) & (PART_BLOCKS[1] >= _AREAS)]
"""Top, left, bottom and right (R, 4) of the rectangles of as many blocks as a part may have."""


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sums (R, K) over rectangles of values (blocks, K), without a product that wakes BLAS' spinning threads."""
    total = np.zeros((ROWS + 1, COLUMNS + 1, values.shape[1]))
    total[1:, 1:] = values.reshape(ROWS, COLUMNS, -1).cumsum(axis=0).cumsum(axis=1)
    top, left, bottom, right = RECTANGLES.T
    return np.asarray(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])


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


@dataclass(frozen=True, eq=False)
class TwoParts:
    """Image in which a part moved: how much speaks for it, and what the pose then errs by."""

    gain: float
    """Decrease of the squared displacements of blocks by the part's own displacement, relative to what is left."""
    share: float
    """Share of the blocks that belong to the part."""
    shift_px: tuple[float, float]
    """Displacement of the part, right and down."""
    errors: NDArray[np.float64]
    """(2, 6) changes of the pose, in the order of its covariance, if the part moved, and if all others did."""

    @property
    def moments(self) -> Matrix:
        """Second moments (6, 6) of the pose's error: either of both moved, the larger one as likely as it is small."""
        if self.gain <= USUAL_GAIN:
            return np.zeros((POSE, POSE))
        likely = (1.0 - USUAL_GAIN / self.gain) * np.array([1.0 - self.share, self.share])
        return np.asarray(self.errors.T @ (likely[:, None] * self.errors))


def two_parts(matches: PointMatches, points: torch.Tensor, T_camera_local: Matrix, camera: Camera) -> TwoParts | None:
    """Return the part of an image whose displacement explains most, and the pose without it; None if few are matched.

    Args:
        matches: places of the points in the image, searched around their projections.
        points: (N, 3) reference points in a frame near the camera, metres.
        T_camera_local: pose (4, 4) that maps points of that frame to the camera frame.
        camera: pinhole camera of the image.
    """
    at, J, in_view = projection_derivatives(points.double().cpu().numpy(), T_camera_local, Intrinsics.of(camera, 1.0))
    cell = np.floor(at * (COLUMNS / camera.width, ROWS / camera.height))
    inside = ((cell >= 0) & (cell < (COLUMNS, ROWS))).all(axis=1)
    used = in_view & inside & (matches.weights.cpu().numpy() > 0)
    block = (cell[used] @ (1, COLUMNS)).astype(np.int64)
    shift = (matches.pixels.cpu().numpy() - at)[used].astype(np.float32)
    count, median = block_medians(shift, block)
    _, spread = block_medians(np.abs(shift - median[block]).astype(np.float32), block)
    known = count >= BLOCK_POINTS
    size = _sums(known[:, None].astype(np.float64))[:, 0]
    is_part = (size >= PART_BLOCKS[0]) & (size <= known.sum() - PART_BLOCKS[0])
    if not is_part.any():
        return None
    mean_J = np.zeros((ROWS * COLUMNS, 2, POSE))
    np.add.at(mean_J, block, J[used, :, :POSE])
    # points of several views share corners: half of them count
    sigma = 1.25 * 1.4826 * np.sqrt((spread[known] ** 2).sum(axis=1) / count[known])
    root = np.repeat(1.0 / np.maximum(sigma, PART_NOISE_PX), 2)
    A, y = (mean_J[known] / count[known, None, None]).reshape(-1, POSE), median[known].reshape(-1)
    A, y = root[:, None] * A, root * y
    H = A.T @ A
    covariance = np.linalg.inv(H + np.diag(1e-6 * np.diag(H) + 1e-9))
    left = y - A @ (covariance @ (A.T @ y))
    # of a part's displacement right (0) and down (1): information, without what a change of the pose explains
    of_blocks = np.zeros((ROWS * COLUMNS, 2, POSE + 2))
    of_blocks[known] = (root[:, None] * np.column_stack([A, left, root])).reshape(-1, 2, POSE + 2)
    sums = _sums(of_blocks.reshape(ROWS * COLUMNS, -1)).reshape(-1, 2, POSE + 2)
    by_axis, right, down, full = sums[:, :, :POSE], sums[:, 0, POSE], sums[:, 1, POSE], sums[:, 0, POSE + 1]
    free = full[:, None, None] * np.eye(2) - by_axis @ covariance @ by_axis.transpose(0, 2, 1)
    a, b, c = free[:, 0, 0], free[:, 0, 1], free[:, 1, 1]
    determinant = a * c - b * b
    is_fixed = is_part & (np.minimum(a, c) > LEAST_FIXED * full) & (determinant > 1e-3 * a * c)
    determinant = np.where(is_fixed, determinant, 1.0)
    shifts = np.stack([c * right - b * down, a * down - b * right], axis=1) / determinant[:, None]
    gains = np.where(is_fixed, right * shifts[:, 0] + down * shifts[:, 1], 0.0)
    best = int(np.argmax(gains))
    cells = np.stack(np.divmod(np.flatnonzero(known), COLUMNS), axis=1)  # row and column
    part = np.all((cells >= RECTANGLES[best, :2]) & (cells < RECTANGLES[best, 2:]), axis=1)
    remaining = (left @ left - gains[best]) / max(len(y) - POSE - 2, 1)
    changes = np.stack([_pose_without(of, A, y, root) for of in (part, ~part)])
    errors = -(changes.reshape(2, 2, 3) @ T_camera_local[:3, :3]).reshape(2, POSE)  # as in map_frame_covariance
    moved_px = float(shifts[best, 0]), float(shifts[best, 1])
    return TwoParts(float(gains[best]) / max(float(remaining), 1.0), float(part.mean()), moved_px, errors)


def _pose_without(
    part: NDArray[np.bool_], A: NDArray[np.float64], y: NDArray[np.float64], root: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the change of the pose (6,) by displacements y of blocks if a part of them has one of its own."""
    own = np.repeat(part, 2)[:, None] * root[:, None] * np.tile(np.eye(2), (len(part), 1))
    X = np.concatenate([A, own], axis=1)
    H = X.T @ X
    return np.asarray(np.linalg.solve(H + np.diag(1e-6 * np.diag(H) + 1e-9), X.T @ y)[:POSE])


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
    mean = BlockMean(block, references.confidence[seen])
    wanted = references.coarse[seen]
    here_of_points = similarities_around(image.features, wanted, column, row)
    here = mean(here_of_points).flatten(1).max(1).values.cpu().numpy()
    found = _shifts(image, wanted, at[seen], here_of_points.flatten(1).max(1).values, block)
    shifts = (*found, float(P[seen, 2].median()))
    similar = known & (here > SIMILAR)
    if similar.sum() >= CLEAR_SHARE * blocks:
        return BlockMatch(blocks, int(similar.sum()), 0, (0.0, 0.0), 0.0, *shifts)
    open_blocks = known & ~similar  # a block that is similar here is not displaced
    of_open = torch.from_numpy(open_blocks).to(block.device)[block]
    mean = BlockMean(block[of_open], references.confidence[seen][of_open])
    around = mean.around(image.features, wanted[of_open], (column[of_open], row[of_open])).cpu()
    moved = displaced_part(around, here, open_blocks)
    best = around.flatten(1).max(1).values.numpy()
    matching = similar | (open_blocks & (here > MIN_SIMILARITY) & (best - here <= MATCHING_GAP))
    if moved is None:
        return BlockMatch(blocks, int(matching.sum()), 0, (0.0, 0.0), 0.0, *shifts)
    depth = P[seen, 2][torch.from_numpy(moved.part).to(block.device)[block]]
    part, depth_m = int(moved.part.sum()), float(depth.median())
    return BlockMatch(blocks, int(matching.sum()), part, moved.shift_px, depth_m, *shifts)


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
    count, median = block_medians(shift, blocks)
    _, spread = block_medians(np.abs(shift - median[blocks]), blocks)
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
