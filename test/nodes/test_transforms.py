# SPDX-License-Identifier: Apache-2.0
"""Chains of static transforms, and the joining of messages by stamp."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from kfloc_ros.nodes.topics import StampJoiner
from kfloc_ros.nodes.transforms import StaticTree, TransformUnknownError

pytestmark = pytest.mark.ros


def pose(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return make_pose(so3_exp(rng.normal(size=3)), rng.normal(size=3))


@pytest.fixture
def tree() -> StaticTree:
    tree = StaticTree()
    tree.add("base", "mast", pose(1))
    tree.add("mast", "camera", pose(2))
    tree.add("base", "/imu", pose(3))
    tree.add("elsewhere", "lamp", pose(4))
    return tree


def test_up_down_and_across(tree: StaticTree) -> None:
    assert np.allclose(tree.lookup("base", "camera"), pose(1) @ pose(2))
    assert np.allclose(tree.lookup("camera", "base"), np.linalg.inv(pose(1) @ pose(2)))
    assert np.allclose(tree.lookup("imu", "camera"), np.linalg.inv(pose(3)) @ pose(1) @ pose(2))
    assert np.allclose(tree.lookup("camera", "camera"), np.eye(4))


def test_unconnected_frames_are_refused_and_the_known_ones_named(tree: StaticTree) -> None:
    with pytest.raises(TransformUnknownError, match="base, camera, elsewhere, imu, lamp, mast"):
        tree.lookup("camera", "lamp")
    with pytest.raises(TransformUnknownError, match="Known frames: none"):
        StaticTree().lookup("camera", "base")


def test_a_loop_ends_in_words() -> None:
    tree = StaticTree()
    tree.add("a", "b", pose(1))
    tree.add("b", "a", pose(2))
    with pytest.raises(TransformUnknownError):
        tree.lookup("c", "a")


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
