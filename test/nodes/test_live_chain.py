# SPDX-License-Identifier: Apache-2.0
"""Three nodes in processes of their own, one of which is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.poses import pose_from_message

pytestmark = [pytest.mark.ros, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    for module in ("filter_node", "refiner_node", "camera_node"):
        world.start(module, f"map:={room_map}")
    world.wait_ready()
    wait_for_the_chain(world.harness)
    return world


def wait_for_the_chain(harness: Any) -> None:
    harness.wait(harness.listens, 90.0)
    harness.wait(lambda: harness.node.count_subscribers("coarse_status") > 0, 90.0)
    harness.wait(lambda: harness.node.count_subscribers("frame/image") > 1, 90.0)
    harness.spin(1.0)


@pytest.mark.parametrize("victim", ["filter_node", "refiner_node", "camera_node"])
def test_a_node_in_the_middle_is_killed_and_started_again(world: Any, room: Any, room_map: Path, victim: str) -> None:
    harness = world.harness
    harness.localize(room[4])
    position = next(i for i, node in enumerate(world.nodes) if victim in node.log_path.name)
    killed = world.nodes.pop(position)
    killed.process.kill()
    killed.process.wait()
    after = {"camera_node": "filter_node", "filter_node": "refiner_node"}.get(victim)
    harness.diagnostics.clear()
    for number in range(12):
        stamp_ns = harness.send(room[number % 8])
        harness.spin(0.6)
        assert stamp_ns not in harness.poses
    assert all(node.process.poll() is None for node in world.nodes), "the others stay"
    if after is not None:  # what comes after the gap says that nothing comes in
        harness.wait(lambda: "no images" in getattr(harness.diagnostics.get(f"{after}: localization"), "message", ""))
    world.start(victim, f"map:={room_map}")
    wait_for_the_chain(harness)
    T = pose_from_message(harness.localize(room[5], tries=10).pose.pose)
    assert np.linalg.norm(T[:3, 3] - room[5].T_map_camera[:3, 3]) < 0.05


def test_they_end_well(world: Any) -> None:
    for node in world.nodes:
        assert node.end() == 0 and "Traceback" not in node.log, node.log
