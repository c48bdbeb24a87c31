# SPDX-License-Identifier: Apache-2.0
"""Views are made only for who looks, away from the caller, and one that fails harms nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from kfloc_ros.nodes.views import View, VisualizationPublisher

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
