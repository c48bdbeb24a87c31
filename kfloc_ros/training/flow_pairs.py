# SPDX-License-Identifier: Apache-2.0
"""Pairs of frames with their true flow, from depth and poses: what the fast family's OFlowNet is trained on.

Every pair is a function of its number and the seed alone, so training that is resumed sees what it would have seen.
Both frames of a pair are turned and zoomed alike; light, blur, noise and covers are each frame's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.datasets.degraded import motion_blur
from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.errors import SourceError
from kfloc_ros.features.trunk import COARSE_STRIDE
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.mapping.views import CELL_CENTRE, IDENTITY, View, cell_coordinates, map_camera, warp_image
from kfloc_ros.training.kfnet_samples import random_placement

Mask = NDArray[np.bool_]

REMEMBERED_FRAMES = 400
"""Frames kept in memory, 2 MB each: a rendered one takes longer to make than to train on."""
DEPTH_AGREES, DEPTH_AGREES_M = 0.03, 0.02
"""A point is seen again if the other frame's depth there is its own but for this share and length."""
PLACED_SHARE, LIGHT_SHARE, BLUR_SHARE, COVER_SHARE = 0.6, 0.7, 0.25, 0.1
"""How often a pair is turned and zoomed, and a frame has other light, blur or a cover."""


@dataclass(frozen=True, eq=False)
class FlowPair:
    """Two frames and the backward flow from the first to the second."""

    images: torch.Tensor
    """(2, 1, H, W) grey, 0..1: this frame, and the one before."""
    flow: torch.Tensor
    """(2, h, w) cells of the trunk's coarse level, x then y; 0 where unknown."""
    known: torch.Tensor
    """(h, w) bool: where the depth, and so the flow, is known."""
    seen: torch.Tensor
    """(h, w) bool: where, besides, the point is in the second image, and nothing in front of it."""

    def to(self, device: torch.device) -> FlowPair:
        """The same on a device."""
        return FlowPair(*(part.to(device) for part in (self.images, self.flow, self.known, self.seen)))


class FlowPairs:
    """Pairs of sources' frames.

    Args:
        sources: with depth and poses.
        max_step: largest step of the frame index from one frame to the other; both directions occur.
        augment: turn, zoom, light, blur, noise and cover as described; else frames stay as they are.
        seed: of the choice and of what is done to the frames.

    Raises:
        SourceError: a source has no two frames that near to each other.
    """

    def __init__(
        self, sources: Sequence[FrameSource], *, max_step: int = 4, augment: bool = True, seed: int = 0
    ) -> None:
        self._sources = [Remembered(source, REMEMBERED_FRAMES // len(sources)) for source in sources]
        self._adapters = [ImageAdapter(source.camera, map_camera(source.camera)) for source in sources]
        self._augment, self._seed = augment, seed
        self._pairs: list[list[tuple[int, int]]] = []
        for source in sources:
            indices = source.indices()
            pairs = [
                (a, b)
                for a in range(len(indices))
                for b in range(max(0, a - max_step), min(len(indices), a + max_step + 1))
                if 0 < abs(indices[b] - indices[a]) <= max_step
            ]
            if not pairs:
                raise SourceError(f"'{source.name}' has no two frames within {max_step} of each other.")
            self._pairs.append(pairs)

    def __getitem__(self, number: int) -> FlowPair:
        """The pair of a number that only grows.

        Raises:
            SourceError: a frame has no depth or pose.
        """
        rng = np.random.default_rng((self._seed, 3, number))
        which = int(rng.integers(len(self._sources)))
        pairs = self._pairs[which]
        now, before = (self._view(which, p) for p in pairs[int(rng.integers(len(pairs)))])
        placement = IDENTITY
        if self._augment and rng.random() < PLACED_SHARE:
            placement = random_placement(now.camera, rng)
        flow, known, seen = true_flow(now, before, placement)
        images = []
        for k, view in enumerate((now, before)):
            image = view.image if placement is IDENTITY else warp_image(view.image, placement)
            if self._augment:
                image, covered = disturbed(image, rng)
                seen &= ~(_at_cells(covered, flow) if k else _at_cells(covered, np.zeros_like(flow)))
            images.append(image.mean(axis=2, dtype=np.float32) / 255.0)
        return FlowPair(
            torch.from_numpy(np.stack(images))[:, None],
            torch.from_numpy(flow),
            torch.from_numpy(known),
            torch.from_numpy(seen),
        )

    def _view(self, which: int, position: int) -> View:
        frame, adapter = self._sources[which][position], self._adapters[which]
        if frame.depth_m is None or frame.T_map_camera is None:
            raise SourceError(
                f"Frame {frame.index} of '{self._sources[which].name}' has no depth or no pose to train from."
            )
        return View(
            adapter(frame.image), adapter.nearest(frame.depth_m), adapter.target, frame.T_map_camera, frame.index
        )


def true_flow(
    now: View, before: View, placement: NDArray[np.float64] = IDENTITY, first_pixel: float = CELL_CENTRE
) -> tuple[NDArray[np.float32], Mask, Mask]:
    """Backward flow (2, h, w) in cells, where it is known, and where the point is seen again, both (h, w).

    Args:
        now, before: two views of one camera.
        placement: (2, 3) from pixels of both augmented images to pixels of the originals.
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
    seen = known & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    depth = before.depth_m[np.clip(v, 0, camera.height - 1), np.clip(u, 0, camera.width - 1)]
    seen &= (depth > 0) & (np.abs(depth - z) < DEPTH_AGREES * z + DEPTH_AGREES_M)
    placed = np.linalg.solve(placement[:, :2], pixel - placement[:, 2:])
    cell = (placed - first_pixel) / COARSE_STRIDE
    seen &= ((cell >= 0) & (cell <= np.array([[w - 1], [h - 1]]))).all(0)
    rows, cols = np.mgrid[:h, :w]
    flow = np.where(known, cell - np.stack([cols.ravel(), rows.ravel()]), 0.0)
    return flow.reshape(2, h, w).astype(np.float32), known.reshape(h, w), seen.reshape(h, w)


def disturbed(image: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], Mask]:
    """An image (H, W, 3) in other light, blurred, noisy, or partly covered, and where it is covered, (H, W)."""
    h, w = image.shape[:2]
    values = image
    if rng.random() < BLUR_SHARE:
        values = motion_blur(values, float(rng.uniform(3, 25)), float(rng.uniform(0, np.pi)))
    bright = values.astype(np.float32)
    if rng.random() < LIGHT_SHARE:
        field = rng.uniform(0.6, 1.3) * rng.uniform(0.7, 1.3, (3, 4)).astype(np.float32)
        lit = cv2.resize(field.astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        bright = 255.0 * (bright / 255.0) ** np.float32(rng.uniform(0.7, 1.5)) * lit[..., None]
    bright += np.float32(rng.uniform(0, 6)) * rng.standard_normal(bright.shape, dtype=np.float32)
    covered = np.zeros((h, w), dtype=np.bool_)
    if rng.random() < COVER_SHARE:
        height, width = int(h * rng.uniform(0.2, 0.8)), int(w * rng.uniform(0.2, 0.8))
        top, left = int(rng.integers(h - height)), int(rng.integers(w - width))
        covered[top : top + height, left : left + width] = True
        bright[covered] = rng.uniform(20, 200) + rng.normal(0.0, 3.0, (int(covered.sum()), 3))
    return np.clip(bright, 0, 255).astype(np.uint8), covered


def _at_cells(mask: Mask, flow: NDArray[np.float32]) -> Mask:
    """(h, w) of a mask (H, W): its value at each cell's centre moved by a flow (2, h, w) in cells."""
    _, h, w = flow.shape
    rows, cols = np.mgrid[:h, :w]
    centre = (COARSE_STRIDE - 1) / 2
    u = np.clip(np.round((cols + flow[0]) * COARSE_STRIDE + centre).astype(np.int64), 0, mask.shape[1] - 1)
    v = np.clip(np.round((rows + flow[1]) * COARSE_STRIDE + centre).astype(np.int64), 0, mask.shape[0] - 1)
    return np.asarray(mask[v, u])
