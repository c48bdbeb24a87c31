# SPDX-License-Identifier: Apache-2.0
"""Views are made only for who looks, away from the caller, and one that fails harms nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textured_room import ROOM_MAP, Room

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.views import Collecting, View, VisualizationPublisher
from kfloc_ros.types import Alignment, PoseEstimate, TrackingState

pytestmark = pytest.mark.ros


class Topic:
    """A publisher with so many subscribers."""

    def __init__(self) -> None:
        self.watchers = 0
        self.messages: list[Any] = []

    def get_subscription_count(self) -> int:
        return self.watchers

    def publish(self, message: Any) -> None:
        self.messages.append(message)


class Node:
    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}

    def create_publisher(self, kind: type, topic: str, profile: Any) -> Topic:
        self.topics[topic] = Topic()
        return self.topics[topic]


def test_only_what_is_watched_is_made_and_not_in_the_callers_thread() -> None:
    node, made, threads = Node(), [], []

    def make(packet: int) -> int:
        made.append(packet)
        threads.append(threading.get_ident())
        return packet

    def never(packet: int) -> int:
        raise AssertionError("nobody looks")

    warnings: list[str] = []
    spectators = VisualizationPublisher(
        node, "views", {"seen": View(int, make), "unseen": View(int, never)}, warnings.append
    )
    try:
        spectators.offer(1)
        spectators.pause()
        node.topics["seen"].watchers = 1
        spectators.offer(2)
        _wait(lambda: node.topics["seen"].messages == [2])
    finally:
        spectators.stop()
    assert made == [2] and warnings == [] and node.topics["unseen"].messages == []
    assert threads[0] != threading.get_ident()


def test_a_view_that_has_nothing_or_fails_is_left_out_and_the_next_one_comes() -> None:
    node, warnings = Node(), []

    def make(packet: int) -> int | None:
        return None if packet == 0 else 10 // (packet - 1)

    spectators = VisualizationPublisher(node, "views", {"a": View(int, make)}, warnings.append)
    node.topics["a"].watchers = 1
    try:
        spectators.offer(0)
        spectators.offer(1)  # divides by zero
        _wait(lambda: len(warnings) == 1)
        spectators.offer(3)
        _wait(lambda: node.topics["a"].messages == [5])
    finally:
        spectators.stop()
    assert "ZeroDivisionError" in warnings[0] and "views" in warnings[0]


def _wait(condition: Any) -> None:
    event = threading.Event()
    for _ in range(500):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("not in time")


def test_frames_that_the_map_lacks_are_collected_only_when_asked_for(tmp_path: Path) -> None:
    scene_map, warnings = SceneMap.load(ROOM_MAP), list[str]()
    folder = tmp_path / "lacking"
    off = Collecting(NodeConfig(), scene_map, warnings.append)
    on = Collecting(NodeConfig(collect_dir=str(folder), collect_mb=1.0), scene_map, warnings.append)
    aligned = Alignment(True, "", np.eye(4), np.eye(6), 0.2, 0.1, 1.0, 3, (0,))
    for k in range(9):
        frame = replace(Room(40).at(3.0 * k, k), stamp_ns=10**9 + k * 100_000_000)
        confidence = 0.5 if k % 2 else 0.95
        estimate = PoseEstimate(
            frame.stamp_ns, TrackingState.TRACKING, "", frame.T_map_camera, np.eye(6), alignment=aligned,
            confidence=confidence,
        )  # fmt: skip
        off.offer(frame, estimate)
        on.offer(frame, estimate)
        time.sleep(0.1)  # as a camera: one that is not written in time is left out
    off.stop()
    on.stop()
    assert (folder / "rgb.txt").is_file() and [path.name for path in tmp_path.iterdir()] == ["lacking"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 1.1e6 and (not warnings or "limit of 1 MB" in warnings[0])
