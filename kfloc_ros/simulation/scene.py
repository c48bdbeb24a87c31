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
from kfloc_ros.simulation.room import lights, room

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


@lru_cache(maxsize=2)
def build_room(seed: int = 0, texels_per_m: float = TEXELS_PER_M) -> Scene:
    """The demo's room; the same seed gives the same room, also on another machine with the same libraries.

    Raises:
        SourceError: the ray caster is not installed.
    """
    faces = room()
    caster = RayCaster(faces)
    pictures = []
    for i, face in enumerate(faces):
        density = texels_per_m * face.detail
        width, height = (max(4, round(size * density)) for size in face.size_m)
        # Each face has a generator of its own, so that changing one thing in the room changes no other.
        pictures.append(face.painter(np.random.default_rng((seed, i)), width, height, density))
    return Scene(
        faces=faces,
        caster=caster,
        atlas=TextureAtlas(pictures),
        picture_px=np.array([(p.shape[1], p.shape[0]) for p in pictures]),
        light_map=bake(faces, lights(), caster, np.random.default_rng(seed)),
        emission=np.array([face.emission for face in faces], np.float32),
        light_of=np.array([face.light for face in faces], np.int32),
    )
