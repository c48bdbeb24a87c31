# SPDX-License-Identifier: Apache-2.0
"""The joining of messages by stamp."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from kfloc_ros.nodes.handover import StampJoiner

pytestmark = pytest.mark.ros


def stamped(seconds: int) -> SimpleNamespace:
    return SimpleNamespace(header=SimpleNamespace(stamp=SimpleNamespace(sec=seconds, nanosec=0)))


def test_a_joiner_hands_on_what_is_complete_once_and_forgets_what_is_older() -> None:
    complete: list[Any] = []
    joiner = StampJoiner(lambda parts: {"a", "b"} <= parts.keys(), complete.append)
    first, second = stamped(1), stamped(2)
    joiner.add("a", first)
    joiner.add("a", second)
    joiner.add("b", second)
    joiner.add("b", first)  # too late: its frame was overtaken
    assert [parts["a"] for parts in complete] == [second]


def test_a_joiner_stays_small_and_works_after_a_jump_back() -> None:
    complete: list[Any] = []
    joiner = StampJoiner(lambda parts: {"a", "b"} <= parts.keys(), complete.append)
    for seconds in range(100, 1100):
        joiner.add("a", stamped(seconds))
    assert len(joiner._parts) <= 8
    joiner.add("a", stamped(5))
    joiner.add("b", stamped(5))
    assert len(complete) == 1
