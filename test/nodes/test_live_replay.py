# SPDX-License-Identifier: Apache-2.0
"""A replay from bag to results: real nodes, real DDS, one process and three."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from robot_bag import add_robot

from kfloc_ros.bags.writer import write_bag
from kfloc_ros.errors import ReplayError
from kfloc_ros.replay import ReplayConfig, run_replay

pytestmark = [
    pytest.mark.ros,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("rclpy") is None, reason="rclpy is not installed"),
]


@pytest.fixture(scope="module")
def room_bag(room, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "room"
    write_bag(room, path, depth=False)
    return path


@pytest.mark.parametrize("separate", [False, True])
def test_a_bag_is_localized_by_live_nodes(separate: bool, room_bag: Path, room_map: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = ReplayConfig(bag=room_bag, map=str(room_map), out=tmp_path, separate=separate, rate=0.5)
    run_replay(config, command="test", progress=lambda text, done, total: said.append(text))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["options"]["played"] == 40
    assert summary["processed"] >= 10
    assert summary["received"] == summary["processed"] + summary["dropped"]
    assert summary["localized"] >= 0.8 * summary["processed"]
    assert summary["median_translation_m"] < 0.05
    assert sum(summary["options"]["transforms"].values()) == summary["localized"]
    assert summary["latency_ms"]["p50"] > 0
    assert {"backbone", "refine"} <= summary["stage_ms"].keys()
    assert summary["options"]["processes_left"] == 0
    assert all(ending == {"code": 0, "forced": ""} for ending in summary["options"]["node_exits"].values())
    assert len((tmp_path / "frames.csv").read_text().splitlines()) == 41
    assert {"starting the nodes", "playing", "evaluating"} <= set(said)


def test_a_robots_bag_is_played_with_its_tf(room, room_map: Path, tmp_path: Path) -> None:
    """The base's pose goes out, and map -> odom, and both are right about the camera."""
    bag = tmp_path / "robot"
    write_bag(room, bag, depth=False)
    add_robot(bag)
    config = ReplayConfig(bag=bag, map=str(room_map), out=tmp_path / "out", base_frame="base_link", every_frame=True)
    run_replay(config, command="test")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    options = summary["options"]
    assert (options["base_frame"], options["tf_mode"], options["odom_frame"]) == ("base_link", "map_to_odom", "odom")
    assert options["transforms"]["map -> odom"] > 10
    assert "map -> camera_ground_truth" not in options["transforms"], "what the bag says of the map is not played"
    assert summary["localized"] >= 30 and summary["median_translation_m"] < 0.05
    assert summary["transform"]["localized"] >= 20 and summary["transform"]["median_translation_m"] < 0.05


def test_a_node_that_cannot_start_ends_the_replay_with_its_reason(
    room_bag: Path, room_map: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "map"
    damaged.mkdir()
    for file in room_map.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "scoordnet.safetensors").write_bytes(b"nothing")
    with pytest.raises(ReplayError, match=r"localizer ended with exit code 1.*scoordnet\.safetensors"):
        run_replay(ReplayConfig(bag=room_bag, map=str(damaged), out=tmp_path / "out"))
