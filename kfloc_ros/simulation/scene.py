# SPDX-License-Identifier: Apache-2.0
"""Scene of a room, or of several side by side: faces, their pictures, and baked light.

Light is baked into coarse maps, with soft shadows: each lamp, the window and the ambient light separately. A frame's
light is then a weighted sum, so lamps can be switched during a recording.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop, has_numba
from kfloc_ros.errors import SourceError
from kfloc_ros.simulation.faces import Face, TextureAtlas, pack
from kfloc_ros.simulation.room import door_faces, lights, own_faces, room

Array = NDArray[np.float32]
Exact = NDArray[np.float64]


_EDGE = -1e-7
"""Barycentric coordinate down to which a point counts as inside of a triangle: rays must not slip between two."""
_NEAREST_M = 1e-6


@compiled_loop
def _first_triangles(origins: Exact, directions: Exact, triangles: Exact, reach_m: float) -> tuple[Any, Any]:
    """Return index (n,), -1 for none, and distance (n,) of the first triangle of each ray, by Moeller and Trumbore."""
    found = np.full(len(origins), -1, np.int64)
    distances = np.full(len(origins), reach_m, np.float64)
    for i in range(len(origins)):
        ox, oy, oz = origins[i, 0], origins[i, 1], origins[i, 2]
        dx, dy, dz = directions[i, 0], directions[i, 1], directions[i, 2]
        for k in range(len(triangles)):
            ax, ay, az = triangles[k, 0, 0], triangles[k, 0, 1], triangles[k, 0, 2]
            bx, by, bz = triangles[k, 1, 0] - ax, triangles[k, 1, 1] - ay, triangles[k, 1, 2] - az
            cx, cy, cz = triangles[k, 2, 0] - ax, triangles[k, 2, 1] - ay, triangles[k, 2, 2] - az
            px, py, pz = dy * cz - dz * cy, dz * cx - dx * cz, dx * cy - dy * cx
            det = bx * px + by * py + bz * pz
            if abs(det) < 1e-12:
                continue
            tx, ty, tz = ox - ax, oy - ay, oz - az
            u = (tx * px + ty * py + tz * pz) / det
            if u < _EDGE or u > 1.0 - _EDGE:
                continue
            qx, qy, qz = ty * bz - tz * by, tz * bx - tx * bz, tx * by - ty * bx
            v = (dx * qx + dy * qy + dz * qz) / det
            if v < _EDGE or u + v > 1.0 - _EDGE:
                continue
            t = (cx * qx + cy * qy + cz * qz) / det
            if _NEAREST_M < t < distances[i]:
                distances[i], found[i] = t, k
    return found, distances


class RayCaster:
    """Caster of rays at a set of faces, by Embree; where it is not installed, as on ARM, by compiled loops.

    Args:
        faces: the faces.
        embree: use Embree; None: if it is installed.

    Raises:
        SourceError: neither Embree nor Numba is installed.
    """

    def __init__(self, faces: Sequence[Face], *, embree: bool | None = None) -> None:
        triangles = [face.triangles() for face in faces]
        self._face_of = np.repeat(np.arange(len(faces)), [len(t) for t in triangles]).astype(np.int32)
        self._triangles = np.concatenate(triangles)
        self._scene: Any = None
        if embree is None:
            embree = importlib.util.find_spec("embreex") is not None
        if embree:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene

            self._scene = EmbreeScene()
            TriangleMesh(self._scene, self._triangles.astype(np.float32))
        elif not has_numba():
            raise SourceError("The simulated room needs a ray caster; install one with `pip install embreex` or numba.")

    def hit_face(self, origin: NDArray[np.float64], directions: Array) -> NDArray[np.int32]:
        """Return the index of the face that each ray (n, 3) from ``origin`` (3,) hits first; -1 for none."""
        origins = np.ascontiguousarray(np.broadcast_to(origin.astype(np.float32), directions.shape))
        directions = np.ascontiguousarray(directions, np.float32)
        if self._scene is None:
            triangle, _ = self._cast(origins, directions, np.inf)
        else:
            triangle = self._scene.run(origins, directions)
        return np.where(triangle >= 0, self._face_of[triangle], -1).astype(np.int32)

    def distance(self, origins: Array, directions: Array, reach_m: float) -> Array:
        """Return the distance along unit rays (n, 3) from ``origins`` (n, 3) to the first face, at most ``reach_m``."""
        if self._scene is None:
            return np.asarray(self._cast(origins, directions, reach_m)[1], np.float32)
        limits = np.full(len(origins), reach_m, np.float32)
        result = self._scene.run(origins, directions, dists=limits, output=1)
        return np.where(result["primID"] >= 0, result["tfar"], np.float32(reach_m)).astype(np.float32)

    def _cast(self, origins: Array, directions: Array, reach_m: float) -> tuple[Any, Any]:
        exact = np.ascontiguousarray(origins, np.float64), np.ascontiguousarray(directions, np.float64)
        return _first_triangles(*exact, self._triangles, float(reach_m))


LUXELS_PER_M = 16.0
AMBIENT_REACH_M = 1.2
"""Distance within which surfaces block ambient light, which makes corners darker."""
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
        faces: faces of the scene, the lights among them.
        lights: three faces; each radiates from its whole area, with the same total for each.
        caster: ray caster of ``faces``.
        rng: random generator of the sample rays.
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
    """Return positions (n, 3) and normals (n, 3) of all luxels; slightly inside each face's edges and above it."""
    points, normals = [], []
    for face, across, down in zip(faces, columns, rows, strict=True):
        a, b = np.meshgrid((np.arange(across) + 0.5) / across, (np.arange(down) + 0.5) / down)
        spots = face.corner + a[..., None] * face.right + b[..., None] * face.down + _LIFT_M * face.normal
        points.append(spots.reshape(-1, 3))
        normals.append(np.broadcast_to(face.normal, (across * down, 3)))
    return np.concatenate(points).astype(np.float32), np.concatenate(normals).astype(np.float32)


def _direct(points: Array, normals: Array, light: Face, caster: RayCaster, rng: np.random.Generator) -> Array:
    """Return the light (n,) from a face that shines to its front; 1 at two metres straight in front of it."""
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
    """Return the share (n,) of directions free within :data:`AMBIENT_REACH_M`; nearer surfaces count in part."""
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


TEXELS_PER_M = 320.0
"""Texels per metre; a texel is as wide as a pixel at 1.6 m."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Scene as the renderer needs it."""

    faces: Sequence[Face]
    caster: RayCaster
    atlas: TextureAtlas
    picture_px: NDArray[np.int64]
    """(n, 2) width and height of each face's picture."""
    picture_of: NDArray[np.int64]
    """(n,) index of each face's picture in the atlas."""
    light_map: LightMap
    patch_of: NDArray[np.int64]
    """(n,) index of the light map's face with the light of each face."""
    emission: NDArray[np.float32]
    """(n,) emission of each face; see :class:`Face`."""
    light_of: NDArray[np.int32]
    """(n,) light that a face is, -1 for none."""


@dataclass(frozen=True)
class RoomInBuilding:
    """Room of a building, in which rooms differ only in a few posters and in their open doors."""

    number: int
    offset_m: tuple[float, float, float]
    """Position of its frame's origin; the axes are the building's."""
    open_east: bool
    open_west: bool


@lru_cache(maxsize=2)
def build_room(seed: int = 0, texels_per_m: float = TEXELS_PER_M) -> Scene:
    """Return the demo's room; equal seeds give equal rooms, also on another machine with the same libraries.

    Args:
        seed: seed of all pictures and of the light.
        texels_per_m: resolution of the pictures.

    Raises:
        SourceError: no ray caster is installed.
    """
    return scene_of(room(), seed, texels_per_m)


def scene_of(faces: Sequence[Face], seed: int, texels_per_m: float, others: Mapping[int, int] | None = None) -> Scene:
    """Return a scene of faces, lit by the room's lights; ``others`` has seeds of other pictures, by face."""
    same = np.arange(len(faces))
    caster = RayCaster(faces)
    pictures = _paintings(faces, seed, texels_per_m)
    for i, other in (others or {}).items():
        pictures[i] = _paint(faces[i], (seed, i, other), texels_per_m)
    return _scene(faces, caster, pictures, same, _baked(faces, caster, seed), same)


def build_rooms(rooms: Sequence[RoomInBuilding], seed: int = 0, texels_per_m: float = TEXELS_PER_M) -> Scene:
    """Return several rooms side by side, connected by doorways; they share equal pictures and light.

    Light is baked with all doors closed.

    Args:
        rooms: rooms of the building.
        seed: seed of all pictures and of the light.
        texels_per_m: resolution of the pictures.

    Raises:
        SourceError: no ray caster is installed.
    """
    shell = room(doorways=True)
    own, (east, west) = own_faces(shell), door_faces(shell)
    pictures, faces = _paintings(shell, seed, texels_per_m), []
    picture_of, patch_of = [], []
    for item in rooms:
        gone = _open(item, east, west)
        for i, face in enumerate(shell):
            if i in gone:
                continue
            faces.append(replace(face, corner=face.corner + np.array(item.offset_m)))
            patch_of.append(i)
            picture_of.append(i)
            if i in own:
                picture_of[-1] = len(pictures)
                pictures.append(_paint(face, (seed, i, item.number), texels_per_m))
    light_map = _baked(shell, RayCaster(shell), seed)
    return _scene(faces, RayCaster(faces), pictures, np.array(picture_of), light_map, np.array(patch_of))


def _scene(
    faces: Sequence[Face],
    caster: RayCaster,
    pictures: Sequence[NDArray[np.uint8]],
    picture_of: NDArray[np.int64],
    light_map: LightMap,
    patch_of: NDArray[np.int64],
) -> Scene:
    return Scene(
        faces=faces,
        caster=caster,
        atlas=TextureAtlas(pictures),
        picture_px=np.array([(p.shape[1], p.shape[0]) for p in pictures])[picture_of],
        picture_of=picture_of,
        light_map=light_map,
        patch_of=patch_of,
        emission=np.array([face.emission for face in faces], np.float32),
        light_of=np.array([face.light for face in faces], np.int32),
    )


def _open(item: RoomInBuilding, east: int, west: int) -> set[int]:
    """Return the doors that are left out."""
    return {face for face, is_open in ((east, item.open_east), (west, item.open_west)) if is_open}


def _baked(faces: Sequence[Face], caster: RayCaster, seed: int) -> LightMap:
    return bake(faces, lights(), caster, np.random.default_rng(seed))


def _paintings(faces: Sequence[Face], seed: int, texels_per_m: float) -> list[NDArray[np.uint8]]:
    """Paint every face with a generator of its own, so that a change of one face changes no other."""
    return [_paint(face, (seed, i), texels_per_m) for i, face in enumerate(faces)]


def _paint(face: Face, seed: tuple[int, ...], texels_per_m: float) -> NDArray[np.uint8]:
    density = texels_per_m * face.detail
    width, height = (max(4, round(size * density)) for size in face.size_m)
    return face.painter(np.random.default_rng(seed), width, height, density)
