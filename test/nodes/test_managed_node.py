# SPDX-License-Identifier: Apache-2.0
"""A live change that cannot be applied is refused, or undone: the node goes on with what it had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from rclpy.parameter import Parameter

from kfloc_ros.nodes import managed_node
from kfloc_ros.nodes.managed_node import SUCCESS, ManagedNode
from kfloc_ros.replay.processes import free_domain

pytestmark = pytest.mark.ros


class Stage:
    """Notes what it was made of; cannot be made with what is in ``broken``."""

    made: list[tuple[int, str]]
    broken: set[Any]

    def __init__(self, node: Any, parameters: Any, scene_map: Any, switch: Any) -> None:
        self.made.append((parameters.localizer.num_references, scene_map.name))
        if self.broken.intersection(self.made[-1]):
            raise OverflowError("int too large to convert")
        node.create_timer(1.0, lambda: None)

    def pause(self) -> None: ...
    def stop(self) -> None: ...
    def request_reset(self, reason: str) -> None: ...


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[ManagedNode]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setattr(managed_node, "load_map", lambda path: SimpleNamespace(name=path))
    monkeypatch.setattr(managed_node, "resolve_map", lambda name: name)
    rclpy.init(args=["--ros-args", "-p", "map:=room"], domain_id=free_domain(os.getpid()))
    Stage.made, Stage.broken = [], set()
    node = ManagedNode("change_test", Stage)
    assert node.trigger_configure() == SUCCESS and node.trigger_activate() == SUCCESS
    yield node
    node.close()
    rclpy.try_shutdown()


def change(node: ManagedNode, **values: Any) -> list[Any]:
    results = node.set_parameters([Parameter(name, value=value) for name, value in values.items()])
    node.apply_pending()
    return results


def state(node: ManagedNode) -> str:
    return str(node._state_machine.current_state[1])


def test_a_change_that_fails_is_undone_and_a_good_one_after_it_works(node: ManagedNode) -> None:
    Stage.broken = {5, "cellar"}
    for values in ({"num_references": 5}, {"map": "cellar"}, {"map": "cellar", "num_references": 5}):
        change(node, **values)
        assert Stage.made[-1] == (3, "room") and state(node) == "active" and node.fault == ""
        assert node.get_parameter("num_references").value == 3 and node.get_parameter("map").value == "room"
        assert node.parameters.node.map == "room"
    assert len(list(node.timers)) == 1, "what the failed stage made is gone"
    change(node, num_references=4, map="attic")
    assert Stage.made[-1] == (4, "attic") and state(node) == "active"


def test_undoing_keeps_what_was_changed_at_once(node: ManagedNode) -> None:
    Stage.broken = {5}
    change(node, max_age_s=7.0, num_references=5)
    assert node.parameters.node.max_age_s == 7.0 and node.get_parameter("max_age_s").value == 7.0


def test_without_a_way_back_the_node_is_unconfigured_with_the_reason(node: ManagedNode) -> None:
    Stage.broken = {5, 3}
    change(node, num_references=5)
    assert state(node) == "unconfigured" and "OverflowError" in node.fault
    Stage.broken = set()
    assert node.trigger_configure() == SUCCESS


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"transform_rate_hz": 1e-300}, "must be 0 or lie in"),
        ({"num_references": 0}, "range"),
        ({"base_frame": "a\x00b"}, "printable"),
        ({"pose_file": "/dev/null"}, "not a pose file"),
        ({"pose_file": "~nobody-of-this-name/pose.json"}, "unknown user"),
    ],
)
def test_what_can_be_seen_beforehand_is_refused_with_the_reason(
    node: ManagedNode, values: dict[str, Any], said: str
) -> None:
    (result,) = change(node, **values)
    assert not result.successful and said in result.reason
    assert len(Stage.made) == 1 and state(node) == "active"


def test_a_pose_file_that_is_another_file_is_refused(node: ManagedNode, tmp_path: Path) -> None:
    other = tmp_path / "thesis.txt"
    other.write_text("three years of work")
    (result,) = change(node, pose_file=str(other))
    assert not result.successful and "name another" in result.reason and len(Stage.made) == 1
    (result,) = change(node, pose_file=str(tmp_path / "pose.json"))
    assert result.successful and len(Stage.made) == 2


def test_a_place_is_refused_where_one_map_is_taken(node: ManagedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfloc_ros.maps.place import Place

    place = Place.__new__(Place)
    object.__setattr__(place, "name", "campus")
    monkeypatch.setattr(Stage, "ONE_MAP_ONLY", True, raising=False)
    monkeypatch.setattr(managed_node, "load_map", lambda path: place)
    (result,) = change(node, map="campus")
    assert not result.successful and "place of several maps" in result.reason and len(Stage.made) == 1
