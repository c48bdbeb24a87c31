# SPDX-License-Identifier: Apache-2.0
"""Training cells and reference views from mapping views, one view in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE, SIZE_MULTIPLE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS, head_input
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, smooth_depth_mask, view_distances
from kfloc_ros.types import SceneCoordinates

MAX_SIDE_PX = 640
CELL_CENTRE = (COARSE_STRIDE - 1) / 2
"""Pixel of cell 0, in x and in y."""
DEPTH_AGREES, DEPTH_AGREES_M = 0.03, 0.02
"""Relative and absolute tolerance at which a point's depth in another frame agrees: it is then visible in both."""

Mask = NDArray[np.bool_]


def map_camera(camera: Camera) -> Camera:
    """Return the pinhole camera of a map: at most 640 pixels wide, sides multiples of 32."""
    scale = min(1.0, MAX_SIDE_PX / max(camera.width, camera.height))

    def side(pixels: int) -> int:
        return max(SIZE_MULTIPLE, round(pixels * scale / SIZE_MULTIPLE) * SIZE_MULTIPLE)

    return camera.pinhole().scaled_to(side(camera.width), side(camera.height))


@dataclass(frozen=True, eq=False)
class View:
    """Mapping frame adapted to the map's camera."""

    image: NDArray[np.uint8]
    depth_m: NDArray[np.float32]
    camera: Camera
    T_map_camera: Matrix
    index: int


@dataclass(frozen=True, eq=False)
class Cells:
    """Training samples."""

    inputs: torch.Tensor
    """(N, 192) half"""
    coordinates: torch.Tensor
    """(N, 3) float, metres, map frame"""


def joined(parts: Sequence[Cells]) -> Cells:
    """Return the samples of all parts."""
    empty = Cells(torch.empty(0, INPUT_CHANNELS, dtype=torch.float16), torch.empty(0, 3))
    return Cells(torch.cat([p.inputs for p in (empty, *parts)]), torch.cat([p.coordinates for p in (empty, *parts)]))


def random_similarity(camera: Camera, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a random map (2, 3) from pixels of an augmented image to pixels of the original: rotation, zoom, shift."""
    angle, zoom = np.radians(rng.uniform(-20, 20)), np.exp(rng.uniform(np.log(0.75), np.log(1.3)))
    placed = similarity(camera, angle, zoom)
    placed[:, 2] += rng.uniform(-0.08, 0.08, 2) * camera.width
    return placed


def similarity(camera: Camera, angle_rad: float, zoom: float) -> NDArray[np.float64]:
    """Return the map (2, 3) from pixels of an image rolled and zoomed about its centre to pixels of the original."""
    centre = np.array([camera.width, camera.height]) / 2
    A = zoom * np.array([[np.cos(angle_rad), -np.sin(angle_rad)], [np.sin(angle_rad), np.cos(angle_rad)]])
    return np.concatenate([A, (centre - A @ centre)[:, None]], axis=1)


IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def warp_image(image: NDArray[np.uint8], similarity: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the augmented image; pixels outside the original are mirrored."""
    size = (image.shape[1], image.shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(image, similarity, size, flags=flags, borderMode=cv2.BORDER_REFLECT_101))


def sample_cells(
    view: View, features: BackboneFeatures, similarity: NDArray[np.float64], limit: int, rng: np.random.Generator
) -> Cells:
    """Return cells of an (augmented) view with known and smooth depth, at most ``limit`` of them.

    Args:
        view: original view.
        features: features of the augmented image.
        similarity: map from augmented to original pixels.
        limit: limit on cells.
        rng: random generator of the selection.
    """
    inputs = head_input(features)[0]
    h, w = inputs.shape[:2]
    coordinates, valid = cell_coordinates(view, (h, w), similarity)
    index = np.flatnonzero(valid)
    if len(index) > limit:
        index = rng.choice(index, limit, replace=False)
    chosen = torch.from_numpy(index)
    return Cells(
        inputs.reshape(h * w, -1).cpu()[chosen].half(),
        torch.from_numpy(coordinates[index].astype(np.float32)),
    )


def cell_coordinates(
    view: View,
    grid: tuple[int, int],
    similarity: NDArray[np.float64] = IDENTITY,
    first_pixel: float = CELL_CENTRE,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the true scene coordinates (h w, 3) of the cells of a grid (h, w), and where they are known, (h w,).

    Cell (r, c) stands for the pixel (u, v) = 8 (c, r) + ``first_pixel``, by default its centre.
    """
    h, w = grid
    cols, rows = np.meshgrid(np.arange(w) * COARSE_STRIDE + first_pixel, np.arange(h) * COARSE_STRIDE + first_pixel)
    pixels = np.stack([cols.ravel(), rows.ravel(), np.ones(h * w)], axis=1) @ similarity.T
    u, v = np.round(pixels).astype(np.int64).T
    H, W = view.depth_m.shape
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)
    u, v = np.clip(u, 0, W - 1), np.clip(v, 0, H - 1)
    smooth = smooth_depth_mask(view.depth_m)
    z = view.depth_m[v, u].astype(np.float64)
    camera, T = view.camera, view.T_map_camera
    points = np.stack(
        [(pixels[:, 0] - camera.cx) / camera.fx * z, (pixels[:, 1] - camera.cy) / camera.fy * z, z], axis=1
    )
    return points @ T[:3, :3].T + T[:3, 3], inside & smooth[v, u]


def true_coordinates(view: View, grid: tuple[int, int], similarity: NDArray[np.float64] = IDENTITY) -> SceneCoordinates:
    """Return the result of :func:`cell_coordinates` as scene coordinates without variance."""
    h, w = grid
    points, known = cell_coordinates(view, grid, similarity)
    mean = torch.from_numpy(points.astype(np.float32)).t().reshape(3, h, w).contiguous()
    return SceneCoordinates(mean, torch.zeros(h, w), torch.from_numpy(known).reshape(h, w), COARSE_STRIDE)


MIN_REFERENCE_POINTS = 50
Poses = NDArray[np.float64]


class ReferenceCollector:
    """Collector of reference views that extend the coverage: a view is added if no collected one is within a spacing.

    When the views have too many points, the one that adds the least coverage is removed, one at a time, and the spacing
    grows accordingly: memory and map size stay bounded.
    """

    def __init__(self, spacing_m: float, max_points: int) -> None:
        self._spacing, self._max_points = spacing_m, max_points
        self._collected: list[tuple[int, Matrix, ReferencePoints]] = []

    def __len__(self) -> int:
        return len(self._collected)

    def extends_coverage(self, T_map_camera: Matrix) -> bool:
        """Return True if a view at this pose would extend the coverage."""
        if not self._collected:
            return True
        return bool((view_distances(self._poses(), T_map_camera) > self._spacing).all())

    def add(self, index: int, T_map_camera: Matrix, points: ReferencePoints) -> None:
        """Add a view, unless it has too few points."""
        if len(points) < MIN_REFERENCE_POINTS:
            return
        self._collected.append((index, T_map_camera, points))
        while sum(len(points) for _, _, points in self._collected) > self._max_points and len(self._collected) > 2:
            self._drop_one()

    def _drop_one(self) -> None:
        """Remove one of the two views nearest to each other: the one whose other neighbours are nearer."""
        poses = self._poses()
        apart = np.stack([view_distances(poses, T) for T in poses])
        np.fill_diagonal(apart, np.inf)
        a, b = np.unravel_index(int(apart.argmin()), apart.shape)
        self._spacing = max(self._spacing, float(apart[a, b]))
        second = [float(np.partition(apart[k], 1)[1]) for k in (a, b)]
        del self._collected[int(a if second[0] < second[1] else b)]

    def _poses(self) -> Poses:
        return np.stack([T for _, T, _ in self._collected])

    def replace(self, views: ReferenceViews) -> None:
        """Replace the collected views, such as by the same with other confidences."""
        self._collected = list(zip(views.ids, views.T_map_camera, views.views, strict=True))

    def views(self) -> ReferenceViews:
        """Return the collected views."""
        ids = tuple(index for index, _, _ in self._collected)
        return ReferenceViews(ids, self._poses(), tuple(points for _, _, points in self._collected))


def true_flow(
    now: View, before: View, placement: NDArray[np.float64] = IDENTITY, first_pixel: float = CELL_CENTRE
) -> tuple[NDArray[np.float32], Mask, Mask]:
    """Return the backward flow (2, h, w) in cells, and masks (h, w): where it is known, and visible in both views.

    Args:
        now, before: two views of one camera.
        placement: (2, 3) map from pixels of both augmented images to pixels of the originals.
        first_pixel: pixel of cell 0, in x and in y; by default the cell's centre.
    """
    camera = now.camera
    h, w = camera.height // COARSE_STRIDE, camera.width // COARSE_STRIDE
    points, known = cell_coordinates(now, (h, w), placement, first_pixel)
    T = inverse_pose(before.T_map_camera)
    x, y, z = T[:3, :3] @ points.T + T[:3, 3:]
    known &= z > 0.05
    z = np.where(known, z, 1.0)
    pixel = np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy])
    u, v = np.round(np.clip(pixel, -1e6, 1e6)).astype(np.int64)
    visible = known & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    depth = before.depth_m[np.clip(v, 0, camera.height - 1), np.clip(u, 0, camera.width - 1)]
    visible &= (depth > 0) & (np.abs(depth - z) < DEPTH_AGREES * z + DEPTH_AGREES_M)
    placed = np.linalg.solve(placement[:, :2], pixel - placement[:, 2:])
    cell = (placed - first_pixel) / COARSE_STRIDE
    visible &= ((cell >= 0) & (cell <= np.array([[w - 1], [h - 1]]))).all(0)
    rows, cols = np.mgrid[:h, :w]
    flow = np.where(known, cell - np.stack([cols.ravel(), rows.ravel()]), 0.0)
    return flow.reshape(2, h, w).astype(np.float32), known.reshape(h, w), visible.reshape(h, w)
