# SPDX-License-Identifier: Apache-2.0
"""Checks of an aligned pose by the whole image: the camera fitted together with the pose, and the map block by block.

Hundreds of points overdetermine a pose, so the same residuals also constrain the focal length, the principal point and
the first term of radial distortion. The cost is that of :mod:`kfloc_ros.pixloc.cost`, with the camera's ``OFFSETS`` as
five more columns of the Jacobian, and a weak Gaussian prior on them.

An alignment sees a few pixels around each point. Block by block, every reference point in view is compared with the
cells around its projection, and the similarities of the points of one block are averaged, displacement by displacement.
A block matches if no other displacement is clearly better than none. Blocks that touch each other and agree on one
displacement are a part of the scene that moved, or the pose is that of the moved part.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.pixloc.cost import OFFSETS, POSE, FeatureImage, RobustLoss, linearize, project
from kfloc_ros.pixloc.references import ReferencePoints

PRIOR_SIGMA = np.array([0.15, 0.1, 20.0, 20.0, 0.15])
"""Standard deviations of the prior; pixels of the map's camera for the principal point."""
MAX_ITERATIONS = 12
"""Largest number of iterations per level."""
MIN_POINTS = 60
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
MATCHING_GAP, MIN_SIMILARITY = 0.03, 0.6
"""A block that is less similar matches if no displacement gains more than the first, and if it is at least as similar
as the second, which unrelated features reach somewhere in their surroundings."""
MOVED_GAP, MOVED_SIMILARITY, MOVED_NEARLY = 0.08, 0.75, 0.03
"""A displaced block is more similar than without the displacement by the first, similar by the second, and no other
displacement is better by more than the third."""


@dataclass(frozen=True, eq=False)
class CameraFit:
    """Camera and pose that fit one image best."""

    offsets: NDArray[np.float64]
    """(5,) offsets from the map's camera; see the module's docstring."""
    information: NDArray[np.float64]
    """(5, 5) information of the offsets, with the pose marginalised, without the prior."""
    T_camera_local: Matrix
    """Pose (4, 4) that maps points of their given frame to the camera frame."""
    pose_information: NDArray[np.float64]
    """(6, 6) information of the left perturbation (dt, dw) of the pose, with the camera marginalised."""
    cost: float


@dataclass(frozen=True, eq=False)
class FitLevel:
    """Feature level of an image with the reference features of the same level."""

    image: FeatureImage
    features: torch.Tensor
    """(N, C)"""
    confidence: torch.Tensor
    """(N,)"""


@dataclass(frozen=True, eq=False)
class _System:
    """Normal equations (11, 11) of pose and camera, scaled to information."""

    cost: float
    H: NDArray[np.float64]
    g: NDArray[np.float64]
    valid_count: int


def fit_camera(
    levels: tuple[FitLevel, ...], points: torch.Tensor, T_camera_local: Matrix, camera: Camera, loss: RobustLoss
) -> CameraFit | None:
    """Fit pose and camera together, coarse level first.

    Args:
        levels: coarse to fine.
        points: (N, 3) reference points, in a frame near the camera, since float32 is exact enough only near its origin.
        T_camera_local: pose to start from, (4, 4), which maps points of that frame to the camera frame.
        camera: pinhole camera of the map, to which the image was converted.
        loss: robust loss of the alignment.

    Returns:
        The fit; None if too few points are in view.
    """
    T, offsets = T_camera_local, np.zeros(len(OFFSETS))
    system: _System | None = None
    for level in levels:
        system = _linearize(level, points, T, camera, offsets, loss)
        if system.valid_count < MIN_POINTS:
            return None
        damping = 1e-3
        for _ in range(MAX_ITERATIONS):
            step = _step(system, offsets, damping)
            T_new = make_pose(so3_exp(step[3:POSE]), step[:3]) @ T
            new_offsets = offsets + step[POSE:]
            new = _linearize(level, points, T_new, camera, new_offsets, loss)
            if new.cost < system.cost and 3 * new.valid_count >= 2 * system.valid_count:
                gain = (system.cost - new.cost) / max(system.cost, 1e-12)
                T, offsets, system, damping = T_new, new_offsets, new, max(damping / 10, 1e-7)
                if gain < 1e-5:
                    break
            else:
                damping *= 10
                if damping > 1e3:
                    break
    if system is None or not np.isfinite(offsets).all():
        return None
    H = system.H
    try:
        information = H[POSE:, POSE:] - H[POSE:, :POSE] @ np.linalg.solve(H[:POSE, :POSE], H[:POSE, POSE:])
    except np.linalg.LinAlgError:
        return None
    full = H.copy()
    full[POSE:, POSE:] += np.diag(PRIOR_SIGMA**-2)
    of_pose = full[:POSE, :POSE] - full[:POSE, POSE:] @ np.linalg.solve(full[POSE:, POSE:], full[POSE:, :POSE])
    return CameraFit(offsets, 0.5 * (information + information.T), T, of_pose, system.cost)


@dataclass(frozen=True, eq=False)
class CameraScore:
    """Offsets that one Gauss-Newton step from an aligned pose suggests, and what offsets do to the pose."""

    offsets: NDArray[np.float64]
    """(5,) offsets; those of a large mistake are too small."""
    covariance: NDArray[np.float64]
    """(5, 5) covariance of the offsets."""
    sensitivity: NDArray[np.float64]
    """(6, 5) derivative of the left perturbation (dt, dw) of the pose by the offsets."""


def score_camera(
    level: FitLevel, points: torch.Tensor, T_camera_local: Matrix, camera: Camera, loss: RobustLoss
) -> CameraScore | None:
    """Return the score of the camera at an aligned pose, from the residuals of one level; None if it is not determined.

    This is one linearization, a tenth of :func:`fit_camera`; arguments as there.
    """
    system = _linearize(level, points, T_camera_local, camera, np.zeros(len(OFFSETS)), loss)
    if system.valid_count < MIN_POINTS:
        return None
    H, g = system.H, system.g
    try:
        by_camera = np.linalg.solve(H[:POSE, :POSE], H[:POSE, POSE:])
        by_pose = np.linalg.solve(H[:POSE, :POSE], g[:POSE])
        covariance = np.asarray(np.linalg.inv(H[POSE:, POSE:] - H[POSE:, :POSE] @ by_camera), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    offsets = -covariance @ (g[POSE:] - H[POSE:, :POSE] @ by_pose)
    if not np.isfinite(offsets).all() or not (np.diag(covariance) > 0).all():
        return None
    symmetric = np.asarray(0.5 * (covariance + covariance.T), dtype=np.float64)
    return CameraScore(offsets, symmetric, np.asarray(-by_camera, dtype=np.float64))


def _step(system: _System, offsets: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Return the damped Gauss-Newton step of pose and offsets under the prior."""
    H, g = system.H.copy(), system.g.copy()
    H[np.diag_indices_from(H)] += damping * np.diag(system.H) + 1e-9
    precision = PRIOR_SIGMA**-2
    H[POSE:, POSE:] += np.diag(precision)
    g[POSE:] += precision * offsets
    return np.asarray(-np.linalg.solve(H, g))


def _linearize(
    level: FitLevel,
    points: torch.Tensor,
    T: Matrix,
    camera: Camera,
    offsets: NDArray[np.float64],
    loss: RobustLoss,
) -> _System:
    at = linearize(level.image, points, level.features, level.confidence, T, camera, loss, offsets)
    scale = at.valid_count / max(at.cost, 1e-9)  # to information, as for the pose alone
    return _System(at.cost, scale * at.H, scale * at.g, at.valid_count)


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

    @property
    def matching_share(self) -> float:
        """Share of the blocks that match."""
        return self.matching / self.blocks

    @property
    def moved_share(self) -> float:
        """Share of the blocks that belong to a displaced part."""
        return self.moved / self.blocks


def match_blocks(
    cells: torch.Tensor,
    points: torch.Tensor,
    references: ReferencePoints,
    T_camera_local: Matrix,
    camera: Camera,
) -> BlockMatch | None:
    """Compare an image with reference points at a pose.

    Args:
        cells: (C, h, w) coarse unit features of the image.
        points: (N, 3) reference points in a frame near the camera, metres.
        references: the same points with their coarse features and confidence.
        T_camera_local: pose (4, 4) that maps points of that frame to the camera frame.
        camera: pinhole camera of the image.

    Returns:
        None if too few blocks have points in view.
    """
    C, h, w = cells.shape
    at, P, in_front = project(points, torch.from_numpy(T_camera_local).to(points), camera, COARSE_STRIDE)
    column, row = at.round().long().unbind(1)
    seen = torch.nonzero(in_front & (column >= 0) & (column < w) & (row >= 0) & (row < h))[:, 0]
    if len(seen) < MIN_BLOCKS * BLOCK_POINTS:
        return None
    if len(seen) > MAX_POINTS:
        seen = seen[torch.linspace(0, len(seen) - 1, MAX_POINTS, device=seen.device).long()]
    column, row = column[seen], row[seen]
    block = (row * ROWS // h) * COLUMNS + column * COLUMNS // w
    count = torch.bincount(block, minlength=ROWS * COLUMNS)
    known = (count >= BLOCK_POINTS).cpu().numpy()
    blocks = int(known.sum())
    if blocks < MIN_BLOCKS:
        return None
    mean = _BlockMean(block, references.confidence[seen])
    wanted = references.coarse[seen]
    here = mean(_here(cells, wanted, column, row)).flatten(1).max(1).values.cpu().numpy()
    similar = known & (here > SIMILAR)
    if similar.sum() >= CLEAR_SHARE * blocks:
        return BlockMatch(blocks, int(similar.sum()), 0, (0.0, 0.0), 0.0)
    open_blocks = known & ~similar  # a block that is similar here is not displaced
    of_open = torch.from_numpy(open_blocks).to(block.device)[block]
    similarity = (wanted[of_open] @ cells.float().reshape(C, -1)).reshape(-1, h, w)
    mean = _BlockMean(block[of_open], references.confidence[seen][of_open])
    around = mean(_surroundings(similarity, column[of_open], row[of_open])).cpu()
    moved = _moved_part(around, here, open_blocks)
    best = around.flatten(1).max(1).values.numpy()
    matching = similar | (open_blocks & (here > MIN_SIMILARITY) & (best - here <= MATCHING_GAP))
    if moved is None:
        return BlockMatch(blocks, int(matching.sum()), 0, (0.0, 0.0), 0.0)
    depth = P[seen, 2][torch.from_numpy(moved.part).to(block.device)[block]]
    return BlockMatch(blocks, int(matching.sum()), int(moved.part.sum()), moved.shift_px, float(depth.median()))


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


def _here(cells: torch.Tensor, wanted: torch.Tensor, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return the similarities (N, 3, 3) of points to their own cell and its neighbours."""
    _, h, w = cells.shape
    step = torch.arange(-1, 2, device=row.device)
    rows = (row[:, None] + step).clamp(0, h - 1)[:, :, None]
    columns = (column[:, None] + step).clamp(0, w - 1)[:, None, :]
    near = cells.permute(1, 2, 0)[rows, columns].float()
    return torch.einsum("nijc,nc->nij", near, wanted)


def _surroundings(similarity: torch.Tensor, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return the similarities (N, 2 REACH + 1, 2 REACH + 1) around each point's own cell; 0 outside the image."""
    padded = F.pad(similarity, (REACH, REACH, REACH, REACH))
    n, size, width = len(similarity), 2 * REACH + 1, padded.shape[2]
    step = torch.arange(size, device=similarity.device)
    window = step[:, None] * width + step[None, :]
    index = (row * width + column)[:, None] + window.reshape(1, -1)
    return padded.reshape(n, -1).gather(1, index).reshape(n, size, size)


@dataclass(frozen=True, eq=False)
class _MovedPart:
    part: NDArray[np.bool_]
    """(blocks,)"""
    shift_px: tuple[float, float]


def _moved_part(around: torch.Tensor, here: NDArray[np.float32], known: NDArray[np.bool_]) -> _MovedPart | None:
    """Return the largest connected set of blocks that agree on one displacement; None if no block is displaced."""
    near = slice(REACH - 1, REACH + 2)
    best = around.flatten(1).max(1).values
    smooth = F.max_pool2d(around[:, None], 3, stride=1, padding=1)[:, 0]  # parallax and tilt move blocks apart
    least = torch.maximum(torch.from_numpy(here) + MOVED_GAP, best - MOVED_NEARLY).clamp(min=MOVED_SIMILARITY)
    votes = (smooth > least[:, None, None]).numpy() & known[:, None, None]
    votes[:, near, near] = False
    tally = votes.sum(axis=0)
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
