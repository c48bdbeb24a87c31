# SPDX-License-Identifier: Apache-2.0
"""Texture atlas: all pictures of a scene in one image, in several resolutions, filtered on lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

LEVELS = 5
_GUTTER = 2 ** (LEVELS - 1)  # one texel is left of it at the coarsest level

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Packing:
    """Positions of pictures in an image: ``left`` and ``top`` of each, and the size of the image."""

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    width: int
    height: int


def pack(sizes: Sequence[tuple[int, int]], width: int, gutter: int, align: int = 1) -> Packing:
    """Place pictures of (width, height) in rows, each with a gutter around it; the highest come first."""
    left, top = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    x = y = row = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        across, down = (-(-(size + 2 * gutter) // align) * align for size in sizes[i])
        if x + across > width:
            x, y, row = 0, y + row, 0
        left[i], top[i] = x + gutter, y + gutter
        x, row = x + across, max(row, down)
    return Packing(left, top, width, -(-(y + row) // align) * align)


class TextureAtlas:
    """Pictures of all faces, with mipmaps.

    Args:
        pictures: (h, w, 3) uint8 each.
        width: width of the atlas in texels; no picture may be wider than this less two gutters.
    """

    def __init__(self, pictures: Sequence[NDArray[np.uint8]], width: int = 4096) -> None:
        sizes = [(p.shape[1], p.shape[0]) for p in pictures]
        widest = max(size[0] for size in sizes) + 2 * _GUTTER
        width = -(-max(width, widest) // _GUTTER) * _GUTTER
        self.packing = pack(sizes, width, _GUTTER, _GUTTER)
        height = self.packing.height
        # The levels lie side by side in one image, so that one look-up serves pixels of any level.
        self._image = np.zeros((height, 2 * width, 3), np.uint8)
        for picture, left, top in zip(pictures, self.packing.left, self.packing.top, strict=True):
            padded = cv2.copyMakeBorder(picture, *(_GUTTER,) * 4, cv2.BORDER_REPLICATE)
            rows, columns = padded.shape[:2]
            self._image[top - _GUTTER :, left - _GUTTER :][:rows, :columns] = padded
        self._offset = np.zeros(LEVELS, np.float32)
        level, x = self._image[:, :width], width
        for i in range(1, LEVELS):
            level = cv2.resize(level, (level.shape[1] // 2, level.shape[0] // 2), interpolation=cv2.INTER_AREA)
            self._offset[i] = x
            self._image[: level.shape[0], x : x + level.shape[1]] = level
            x += level.shape[1]

    def sample(self, u: Array, v: Array, level: Array) -> Array:
        """Return (h, w, 3) values at atlas positions ``u``, ``v`` (h, w), in texels of level 0.

        Args:
            u, v: (h, w) positions.
            level: (h, w) base-2 logarithm of texels per pixel; between two levels, both are blended.
        """
        level = np.clip(level, 0, LEVELS - 1 - 1e-3)
        lower = level.astype(np.int32)
        share = (level - lower)[..., None]
        fine = self._lookup(u, v, lower)
        coarse = self._lookup(u, v, lower + 1)
        return np.asarray(fine + share * (coarse - fine), dtype=np.float32)

    def _lookup(self, u: Array, v: Array, level: NDArray[np.int32]) -> Array:
        # Texel centres are whole numbers at every level: (x + 0.5) / 2^level - 0.5.
        scale = np.float32(0.5) ** level
        x = (u + np.float32(0.5)) * scale - np.float32(0.5) + self._offset[level]
        y = (v + np.float32(0.5)) * scale - np.float32(0.5)
        values = cv2.remap(self._image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
        return np.asarray(values, dtype=np.float32)
