# SPDX-License-Identifier: Apache-2.0
"""Flat surfaces, and boxes and prisms made of them. Map frame: metres, z up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
