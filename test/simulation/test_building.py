# SPDX-License-Identifier: Apache-2.0
"""The building's rooms are alike but for their posters, and lie side by side in one frame."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.simulation.building import ROOMS, BuildingSource, T_building_room
from kfloc_ros.simulation.room import own_faces, room
from kfloc_ros.simulation.scene import build_room

CAMERA = Camera(96, 64, 70.0, 70.0, 47.5, 31.5)
pytest.importorskip("embreex", reason="embreex, the ray caster, is not installed")


def test_rooms_do_not_overlap_and_poses_are_the_buildings() -> None:
    middles = np.array([T_building_room(k)[:3, 3] for k in range(1, ROOMS + 1)])
    apart = np.abs(middles[:, None] - middles[None])[np.triu_indices(ROOMS, 1)]
    assert ((apart[:, 0] >= 5.0) | (apart[:, 1] >= 4.0)).all()
    source = BuildingSource(7, camera=CAMERA, texels_per_m=10.0)
    assert 40 <= len(source) <= 60
    T = source[5].T_map_camera
    assert (np.abs(T[:3, 3] - T_building_room(7)[:3, 3]) < [2.5, 2.0, 2.6]).all()


def test_rooms_differ_in_a_few_posters_alone() -> None:
    one, other = (build_room(0, 10.0, number) for number in (1, 2))
    assert one.caster is other.caster and len(own_faces(room())) == 5
    a, b = (scene.atlas._image for scene in (one, other))
    differing = np.flatnonzero((a != b).any(axis=2).any(axis=1))
    assert 0 < (a != b).any(axis=2).mean() < 0.1 and len(differing)


def test_sources_are_named_by_room() -> None:
    assert open_source("sim:building-3").name == "building-3"
    assert open_source("sim:building-10-localize").name == "building-10-localize"
    for name in ("sim:building-0", "sim:building-11", "sim:building-2-dance", "sim:building", "sim:building-x"):
        with pytest.raises(SourceError, match="building"):
            open_source(name)
