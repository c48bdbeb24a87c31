# SPDX-License-Identifier: Apache-2.0
"""The room, ready to be rendered: geometry, pictures and light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.simulation.atlas import TextureAtlas
from kfloc_ros.simulation.caster import RayCaster
from kfloc_ros.simulation.faces import Face
from kfloc_ros.simulation.lighting import LightMap, bake
from kfloc_ros.simulation.room import lights, own_faces, room

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
    light_map: LightMap
    emission: NDArray[np.float32]
    """(n,) see :class:`Face`."""
    light_of: NDArray[np.int32]
    """(n,) which light a face is, -1 for none."""


@dataclass(frozen=True, eq=False)
class _Shell:
    """What the rooms of a building have in common: shape, light, and the pictures on most faces."""

    faces: Sequence[Face]
    caster: RayCaster
    pictures: Sequence[NDArray[np.uint8]]
    light_map: LightMap


@lru_cache(maxsize=2)
def build_room(seed: int = 0, texels_per_m: float = TEXELS_PER_M, number: int = 0) -> Scene:
    """The demo's room; the same seed gives the same room, also on another machine with the same libraries.

    Args:
        seed: of everything to be seen.
        texels_per_m: resolution of the pictures.
        number: of a room in a building, from 1, which differs from the demo's in a few posters alone.

    Raises:
        SourceError: the ray caster is not installed.
    """
    shell = _kept_shell(seed, texels_per_m) if number else _shell(seed, texels_per_m)
    faces, pictures = shell.faces, list(shell.pictures)
    for i in own_faces(faces) if number else ():
        pictures[i] = _paint(faces[i], (seed, i, number), texels_per_m)
    return Scene(
        faces=faces,
        caster=shell.caster,
        atlas=TextureAtlas(pictures),
        picture_px=np.array([(p.shape[1], p.shape[0]) for p in pictures]),
        light_map=shell.light_map,
        emission=np.array([face.emission for face in faces], np.float32),
        light_of=np.array([face.light for face in faces], np.int32),
    )


def _shell(seed: int, texels_per_m: float) -> _Shell:
    faces = room()
    caster = RayCaster(faces)
    # Each face has a generator of its own, so that changing one thing in the room changes no other.
    pictures = [_paint(face, (seed, i), texels_per_m) for i, face in enumerate(faces)]
    return _Shell(faces, caster, pictures, bake(faces, lights(), caster, np.random.default_rng(seed)))


_kept_shell = lru_cache(maxsize=1)(_shell)


def _paint(face: Face, seed: tuple[int, ...], texels_per_m: float) -> NDArray[np.uint8]:
    density = texels_per_m * face.detail
    width, height = (max(4, round(size * density)) for size in face.size_m)
    return face.painter(np.random.default_rng(seed), width, height, density)
