# SPDX-License-Identifier: Apache-2.0
"""What a callback raises does not end the node, unless nothing else happens any more."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node

from kfloc_ros.nodes.runtime import _MAX_FAILURES, _spin, make_executor
from kfloc_ros.replay.processes import free_domain

pytestmark = pytest.mark.ros


class Failing(Node):
    """A node with a callback that fails every time, and that is asked to stop after ``turns`` turns."""

    def __init__(self, turns: int) -> None:
        super().__init__("failing_test")
        self.failed, self._turns, self.stop_requested = 0, turns, threading.Event()
        self.create_timer(1e-4, self._fail)

    def _fail(self) -> None:
        self.failed += 1
        raise ValueError("as planned")

    def apply_pending(self) -> None:
        if self.failed >= self._turns:
            self.stop_requested.set()


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    rclpy.init(domain_id=free_domain(os.getpid()))
    yield
    rclpy.try_shutdown()


def test_a_callback_that_fails_is_told_and_survived(ros: None, capfd: pytest.CaptureFixture[str]) -> None:
    node = Failing(turns=5)
    _spin(node, node.stop_requested)  # type: ignore[arg-type]
    node.destroy_node()
    told = capfd.readouterr().err
    assert node.failed == 5
    assert told.count("A callback failed; the node continues") == 1 and "ValueError: as planned" in told


def test_a_node_that_does_nothing_but_fail_ends(ros: None) -> None:
    node = Failing(turns=10 * _MAX_FAILURES)
    with pytest.raises(ValueError, match="as planned"):
        _spin(node, node.stop_requested)  # type: ignore[arg-type]
    node.destroy_node()
    assert node.failed <= 2 * _MAX_FAILURES


def test_the_executor_can_be_chosen_in_the_environment(ros: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLOC_EXECUTOR", "single_threaded")
    executor = make_executor()
    assert type(executor) is SingleThreadedExecutor
    node = Failing(turns=5)
    _spin(node, node.stop_requested)  # type: ignore[arg-type]
    node.destroy_node()
    assert node.failed == 5
