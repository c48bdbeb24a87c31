# SPDX-License-Identifier: Apache-2.0
"""The localizer node takes a place of several maps for its map; the nodes that cannot say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.messages.poses import pose_from_message

pytestmark = pytest.mark.ros

MOTION = make_pose(so3_exp([0.0, 0.0, 0.8]), [12.0, -3.0, 4.0])
NewWorld = Callable[[], Any]


@pytest.fixture(scope="module")
def place(room_map: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place([room_map], tmp_path_factory.mktemp("places") / "house", T_place_submaps={"room": MOTION}).path


def test_poses_come_in_the_frame_of_the_place(new_world: NewWorld, place: Path, room: Any) -> None:
    world = new_world()
    world.start_localizer(f"map:={place}")
    T = pose_from_message(world.harness.localize(room[4]).pose.pose)
    truth = MOTION @ room[4].T_map_camera
    assert np.linalg.norm(T[:3, 3] - truth[:3, 3]) < 0.03
    assert rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("node", ["filter_node", "refiner_node"])
def test_nodes_that_need_a_single_map_say_so(new_world: NewWorld, place: Path, node: str) -> None:
    started = new_world().start(node, f"map:={place}")
    assert started.process.wait(40) == 1
    assert "which only the node `localizer` accepts" in started.log
