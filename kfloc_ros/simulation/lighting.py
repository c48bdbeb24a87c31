# SPDX-License-Identifier: Apache-2.0
"""Light baked into coarse maps: each lamp, the window and the sky-like rest separately, with soft shadows.

A frame's light is then a weighted sum, so that lamps can be switched while recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.simulation.atlas import pack
from kfloc_ros.simulation.caster import RayCaster
from kfloc_ros.simulation.faces import Face

Array = NDArray[np.float32]

LUXELS_PER_M = 16.0
AMBIENT_REACH_M = 1.2
"""Nearer surfaces than this keep light that comes from everywhere away: corners get darker."""
_SHADOW_RAYS, _AMBIENT_RAYS = 9, 25
_LIFT_M = 2e-3


@dataclass(frozen=True, eq=False)
class LightMap:
    """Irradiance of every face per light source.

    ``values`` (H, W, 4): the three lights, then the ambient share. Face i's map starts at (``left``, ``top``)[i] and
    has ``columns`` x ``rows``[i] values, spread over the face from edge to edge.
    """

    values: Array
    left: NDArray[np.int64]
    top: NDArray[np.int64]
    columns: NDArray[np.int64]
    rows: NDArray[np.int64]


def bake(faces: Sequence[Face], lights: Sequence[Face], caster: RayCaster, rng: np.random.Generator) -> LightMap:
    """Compute the light that falls on every face.

    Args:
        faces: of the scene, the lights among them.
        lights: three of them; each radiates from its whole area, with the same total for each.
        caster: over ``faces``.
        rng: places the sample rays.
    """
    columns = np.array([max(3, round(f.size_m[0] * LUXELS_PER_M)) for f in faces])
    rows = np.array([max(3, round(f.size_m[1] * LUXELS_PER_M)) for f in faces])
    packing = pack(list(zip(columns.tolist(), rows.tolist(), strict=True)), 512, 1)
    points, normals = _places(faces, columns, rows)
    layers = [_direct(points, normals, light, caster, rng) for light in lights]
    layers.append(_ambient(points, normals, caster, rng))
    flat = np.stack(layers, axis=-1)
    values = np.zeros((packing.height, packing.width, len(layers)), np.float32)
    start = 0
    for i in range(len(faces)):
        count = int(columns[i] * rows[i])
        one = np.ascontiguousarray(flat[start : start + count].reshape(rows[i], columns[i], -1))
        one = cv2.GaussianBlur(one, (0, 0), 0.8, borderType=cv2.BORDER_REPLICATE)
        padded = cv2.copyMakeBorder(one, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
        y, x = packing.top[i] - 1, packing.left[i] - 1
        values[y : y + rows[i] + 2, x : x + columns[i] + 2] = padded
        start += count
    return LightMap(values, packing.left, packing.top, columns, rows)


def _places(faces: Sequence[Face], columns: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[Array, Array]:
    """Positions (n, 3) and normals (n, 3) of all luxels; slightly inside each face's edges and above it."""
    points, normals = [], []
    for face, across, down in zip(faces, columns, rows, strict=True):
        a, b = np.meshgrid((np.arange(across) + 0.5) / across, (np.arange(down) + 0.5) / down)
        spots = face.corner + a[..., None] * face.right + b[..., None] * face.down + _LIFT_M * face.normal
        points.append(spots.reshape(-1, 3))
        normals.append(np.broadcast_to(face.normal, (across * down, 3)))
    return np.concatenate(points).astype(np.float32), np.concatenate(normals).astype(np.float32)


def _direct(points: Array, normals: Array, light: Face, caster: RayCaster, rng: np.random.Generator) -> Array:
    """Light (n,) from a face that shines to its front, 1 at two metres straight before it."""
    side = int(np.sqrt(_SHADOW_RAYS))
    total = np.zeros(len(points), np.float32)
    for i in range(_SHADOW_RAYS):
        cell = np.array([i % side, i // side]) + rng.random((len(points), 2))
        spots = light.corner + (cell[:, :1] * light.right + cell[:, 1:] * light.down) / side + _LIFT_M * light.normal
        way = spots.astype(np.float32) - points
        length = np.linalg.norm(way, axis=1)
        way /= np.maximum(length, 1e-6)[:, None]
        arriving = np.maximum(np.einsum("ij,ij->i", way, normals), 0)
        leaving = np.maximum(-way @ light.normal.astype(np.float32), 0)
        weight = arriving * leaving * 4.0 / np.maximum(length, 0.35) ** 2
        lit = np.flatnonzero(weight > 1e-4)
        free = caster.distance(points[lit], way[lit], 20.0) >= length[lit] - 0.02
        total[lit] += weight[lit] * free
    return np.asarray(total / _SHADOW_RAYS, dtype=np.float32)


def _ambient(points: Array, normals: Array, caster: RayCaster, rng: np.random.Generator) -> Array:
    """Share (n,) of the surroundings that is farther than :data:`AMBIENT_REACH_M`, near things counting in part."""
    side = int(np.sqrt(_AMBIENT_RAYS))
    upright, sideways = np.array([0, 0, 1], np.float32), np.array([1, 0, 0], np.float32)
    helper = np.where(np.abs(normals[:, 2:]) < 0.9, upright, sideways)
    tangent = np.cross(normals, helper)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    other = np.cross(normals, tangent)
    total = np.zeros(len(points), np.float32)
    for i in range(_AMBIENT_RAYS):
        cell = (np.array([i % side, i // side]) + rng.random((len(points), 2), dtype=np.float32)) / side
        radius, angle = np.sqrt(cell[:, 0]), 2 * np.pi * cell[:, 1]  # density goes with the cosine to the normal
        height = np.sqrt(np.maximum(1 - cell[:, 0], 1e-4))
        way = (
            (radius * np.cos(angle))[:, None] * tangent
            + (radius * np.sin(angle))[:, None] * other
            + height[:, None] * normals
        ).astype(np.float32)
        total += caster.distance(points, np.ascontiguousarray(way), AMBIENT_REACH_M) / AMBIENT_REACH_M
    return np.asarray(total / _AMBIENT_RAYS, dtype=np.float32)
