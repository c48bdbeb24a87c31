# SPDX-License-Identifier: Apache-2.0
"""The scene of a room, or of several side by side: faces, their pictures, and baked light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.simulation.atlas import TextureAtlas
from kfloc_ros.simulation.caster import RayCaster
from kfloc_ros.simulation.faces import Face
from kfloc_ros.simulation.lighting import LightMap, bake
from kfloc_ros.simulation.room import door_faces, lights, own_faces, room

TEXELS_PER_M = 320.0
"""A texel is as wide as a pixel at 1.6 m."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything a renderer needs."""

    faces: Sequence[Face]
    caster: RayCaster
    atlas: TextureAtlas
    picture_px: NDArray[np.int64]
    """(n, 2) width and height of each face's picture."""
    picture_of: NDArray[np.int64]
    """(n,) which of the atlas's pictures each face shows."""
    light_map: LightMap
    patch_of: NDArray[np.int64]
    """(n,) which of the light map's faces has the light of each face."""
    emission: NDArray[np.float32]
    """(n,) see :class:`Face`."""
    light_of: NDArray[np.int32]
    """(n,) which light a face is, -1 for none."""


@dataclass(frozen=True)
class RoomInBuilding:
    """One of several rooms that differ in a few posters alone, and which of its doors stand open."""

    number: int
    offset_m: tuple[float, float, float]
    """Where its frame's origin lies; the axes are the building's."""
    open_east: bool
    open_west: bool


@lru_cache(maxsize=2)
def build_room(seed: int = 0, texels_per_m: float = TEXELS_PER_M) -> Scene:
    """The demo's room; the same seed gives the same room, also on another machine with the same libraries.

    Args:
        seed: of everything to be seen.
        texels_per_m: resolution of the pictures.

    Raises:
        SourceError: the ray caster is not installed.
    """
    faces = room()
    same = np.arange(len(faces))
    caster = RayCaster(faces)
    return _scene(faces, caster, _paintings(faces, seed, texels_per_m), same, _baked(faces, caster, seed), same)


def build_rooms(rooms: Sequence[RoomInBuilding], seed: int = 0, texels_per_m: float = TEXELS_PER_M) -> Scene:
    """Several rooms side by side, seen through their doorways; pictures and light that they have in common are shared.

    Light is baked with all doors closed.

    Args:
        rooms: in the building.
        seed: of everything to be seen.
        texels_per_m: resolution of the pictures.

    Raises:
        SourceError: the ray caster is not installed.
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
    """Doors that are not there."""
    return {face for face, is_open in ((east, item.open_east), (west, item.open_west)) if is_open}


def _baked(faces: Sequence[Face], caster: RayCaster, seed: int) -> LightMap:
    return bake(faces, lights(), caster, np.random.default_rng(seed))


def _paintings(faces: Sequence[Face], seed: int, texels_per_m: float) -> list[NDArray[np.uint8]]:
    """Each face has a generator of its own, so that changing one thing in the room changes no other."""
    return [_paint(face, (seed, i), texels_per_m) for i, face in enumerate(faces)]


def _paint(face: Face, seed: tuple[int, ...], texels_per_m: float) -> NDArray[np.uint8]:
    density = texels_per_m * face.detail
    width, height = (max(4, round(size * density)) for size in face.size_m)
    return face.painter(np.random.default_rng(seed), width, height, density)
