# SPDX-License-Identifier: Apache-2.0
"""Three rooms of the simulated building: mapped, joined, walked through, and never taken for one another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import PlaceLocalizer
from kfloc_ros.mapping.build import MapBuildConfig, build_map
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.maps.place import Place
from kfloc_ros.simulation.building import BuildingSource, WalkSource

pytestmark = pytest.mark.slow

CAMERA = Camera(320, 256, 262.5, 262.5, 159.5, 127.5)
ROOMS = (1, 2, 3)


@pytest.fixture(scope="module")
def building(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root: Path = tmp_path_factory.mktemp("building")
    config = MapBuildConfig(train_seconds=120.0, train_steps=60, augmentations=0, device="cpu")
    for room in ROOMS:
        build_map(BuildingSource(room, camera=CAMERA, texels_per_m=160.0), root / f"room_{room}", config)
    return make_place([root / f"room_{room}" for room in ROOMS], root / "place")


def test_a_cold_start_is_in_the_right_room_or_in_none(building: Place) -> None:
    localizer = PlaceLocalizer(building, LocalizerConfig(device="cpu", loaded_submaps=2))
    right = alike = 0
    for room in ROOMS:
        source = BuildingSource(room, "localize", camera=CAMERA, texels_per_m=160.0)
        for position in np.linspace(10, len(source) - 1, 7).astype(int).tolist():
            frame = replace(source[position], depth_m=None)
            assert frame.T_map_camera is not None
            localizer.reset("a cold start")
            estimate = localizer.process(frame).estimate
            assert len(localizer.guide.cache.loaded) <= 2
            if estimate.T_map_camera is None:
                alike += "look alike" in estimate.reason
                continue
            assert np.linalg.norm(estimate.T_map_camera[:3, 3] - frame.T_map_camera[:3, 3]) < 0.2
            assert localizer.submap == f"room_{room}"
            right += 1
    assert right >= 1 and alike >= 3


def test_a_walk_through_the_doors_is_followed_from_submap_to_submap(building: Place) -> None:
    localizer = PlaceLocalizer(building, LocalizerConfig(device="cpu", loaded_submaps=2))
    walk = WalkSource(1, 3, camera=CAMERA, texels_per_m=160.0)
    hints = [walk.pose(0)]
    submaps, lost, errors = [], 0, []
    for position in range(0, len(walk), 3):
        estimate = localizer.process(replace(walk[position], depth_m=None), hints).estimate
        hints = []
        if estimate.T_map_camera is None:
            lost += 1
            continue
        truth = walk.pose(position)[:3, 3]
        errors.append(np.linalg.norm(estimate.T_map_camera[:3, 3] - truth))
        submaps.append(localizer.submap)
        assert errors[-1] < 0.5, f"{localizer.submap} at {truth}"
    assert list(dict.fromkeys(submaps)) == ["room_1", "room_2", "room_3"]
    assert lost < 0.1 * len(walk) / 3 and np.median(errors) < 0.03
