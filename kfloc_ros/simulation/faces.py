# SPDX-License-Identifier: Apache-2.0
"""Flat surfaces, boxes and prisms made of them, and the atlas of their pictures. Map frame: metres, z up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.simulation.textures import Painter

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Face:
    """Flat, convex surface with a picture on it.

    The picture spans the parallelogram ``corner + a * right + b * down`` with a, b in 0..1, where ``corner`` is the
    picture's top left as seen from the visible side.
    """

    corner: Vector
    right: Vector
    down: Vector
    painter: Painter
    detail: float = 1.0
    """Texels per metre, as a share of the scene's."""
    emission: float = 0.0
    """Emitted radiance, added to the reflected one, for lamps, screens and the sky; 1 is white paper in full light."""
    light: int = -1
    """Index in the scene's lights: the emission follows that light's strength. -1: none, the emission is constant."""
    outline: NDArray[np.float64] | None = None
    """(n, 2) convex polygon in (a, b); None for the whole parallelogram."""

    @property
    def normal(self) -> Vector:
        """Unit vector towards the visible side."""
        away = np.cross(self.right, self.down)
        return np.asarray(-away / np.linalg.norm(away), dtype=np.float64)

    @property
    def size_m(self) -> tuple[float, float]:
        """Width and height of the picture."""
        return float(np.linalg.norm(self.right)), float(np.linalg.norm(self.down))

    def triangles(self) -> NDArray[np.float64]:
        """Return (n, 3, 3) corners of the triangles that cover it."""
        outline = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float) if self.outline is None else self.outline
        points = self.corner + outline[:, :1] * self.right + outline[:, 1:] * self.down
        return np.stack([points[[0, i, i + 1]] for i in range(1, len(points) - 1)])


def face(
    corner: ArrayLike,
    right: ArrayLike,
    down: ArrayLike,
    painter: Painter,
    *,
    detail: float = 1.0,
    emission: float = 0.0,
    light: int = -1,
) -> Face:
    """Return a face from plain lists of numbers."""
    a, b, c = (np.asarray(v, dtype=np.float64) for v in (corner, right, down))
    return Face(a, b, c, painter, detail, emission, light)


SIDES = ("front", "back", "left", "right", "top", "bottom")


def box(
    center: ArrayLike,
    size: ArrayLike,
    painter: Painter,
    *,
    yaw_deg: float = 0.0,
    sides: Mapping[str, Painter] | None = None,
    skip: tuple[str, ...] = (),
    detail: float = 1.0,
) -> list[Face]:
    """Return the faces of a box.

    Args:
        center: of the box, metres.
        size: along x (front to back), y (left to right) and z before turning; the front looks along -x.
        painter: of every side that ``sides`` does not name.
        yaw_deg: rotation about z.
        sides: painters of single sides, by name in :data:`SIDES`.
        skip: sides that are never visible.
        detail: see :class:`Face`.
    """
    cx, sx = np.asarray(center, float), np.asarray(size, float) / 2
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    ex, ey, ez = (turn[:, i] * 2 * sx[i] for i in range(3))
    origin = cx - (ex + ey + ez) / 2
    placed = {
        "front": (origin + ey + ez, -ey, -ez),
        "back": (origin + ex + ez, ey, -ez),
        "left": (origin + ez, ex, -ez),
        "right": (origin + ex + ey + ez, -ex, -ez),
        "top": (origin + ex + ey + ez, -ey, -ex),
        "bottom": (origin + ey, -ey, ex),
    }
    painters = dict.fromkeys(SIDES, painter) | dict(sides or {})
    return [
        Face(corner, right, down, painters[name], detail)
        for name, (corner, right, down) in placed.items()
        if name not in skip
    ]


def prism(
    center: ArrayLike, radius_m: float, height_m: float, painter: Painter, top: Painter, *, corners: int = 12
) -> list[Face]:
    """Return the faces of an upright prism with many corners, nearly a cylinder, with its top.

    ``center`` is the middle of its base.
    """
    foot = np.asarray(center, float)
    angles = 2 * np.pi * np.arange(corners + 1) / corners
    ring = foot + np.stack([radius_m * np.cos(angles), radius_m * np.sin(angles), np.full(corners + 1, height_m)], 1)
    down = np.array([0.0, 0.0, -height_m])
    walls = [Face(ring[i], ring[i + 1] - ring[i], down, painter) for i in range(corners)]
    corner = foot + np.array([-radius_m, radius_m, height_m])
    outline = np.stack([0.5 + 0.5 * np.cos(angles[:-1]), 0.5 - 0.5 * np.sin(angles[:-1])], 1)
    size = 2 * radius_m
    lid = Face(corner, np.array([size, 0, 0]), np.array([0, -size, 0]), top, outline=outline)
    return [*walls, lid]


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
