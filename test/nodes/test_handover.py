# SPDX-License-Identifier: Apache-2.0
"""The filter tells from the refiner's answers whether the refiner works."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from geometry_msgs.msg import PoseStamped

from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes import halves
from kfloc_ros.nodes.handover import FeedbackQueue


class Chain:
    """Queue of a filter, a clock, and a refiner that answers when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.stamp_ns = 50.0, 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        self.queue = FeedbackQueue(self, pytest.fail)  # type: ignore[arg-type]

    def create_subscription(self, kind: type, topic: str, receive: Any, profile: Any) -> None:
        self.receive = receive

    def ask(self) -> None:
        self.stamp_ns += 33_000_000
        self.queue.expect(self.stamp_ns)

    def answer(self, after_s: float) -> None:
        self.now_s += after_s
        message = PoseStamped()
        message.pose.orientation.w = 1.0
        fill_stamp(message.header.stamp, self.stamp_ns)
        self.receive(message)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    return Chain(monkeypatch)


def busy_for_s(chain: Chain) -> float:
    """Time for which the refiner counts as busy, in steps of a millisecond."""
    for passed in range(1000):
        if not chain.queue.refiner_is_busy:
            return 1e-3 * passed
        chain.now_s += 1e-3
    return 1.0


def test_the_refiner_is_busy_until_shortly_before_its_usual_answer_or_the_answer_itself(chain: Chain) -> None:
    for _ in range(60):
        chain.ask()
        chain.answer(0.015)
        assert not chain.queue.refiner_is_busy
    chain.ask()
    assert chain.queue.refiner_is_busy
    chain.answer(0.004)
    assert not chain.queue.refiner_is_busy
    chain.ask()
    assert busy_for_s(chain) == pytest.approx(0.010, abs=0.0021)
    assert [pose.stamp_ns for pose in chain.queue.take()][-1] == chain.stamp_ns - 33_000_000


def test_frames_without_an_answer_and_a_filter_without_a_refiner_leave_no_one_busy(chain: Chain) -> None:
    for _ in range(20):
        chain.ask()
        assert busy_for_s(chain) == 0.0
    chain.answer(0.5)  # by a search of the map
    chain.ask()
    assert 0.0 < busy_for_s(chain) < 0.1


def test_an_answer_to_an_earlier_frame_is_none_to_the_last_one(chain: Chain) -> None:
    for _ in range(20):
        chain.ask()
        chain.answer(0.02)
    chain.ask()
    late = chain.stamp_ns
    chain.ask()
    chain.stamp_ns, last = late, chain.stamp_ns
    chain.answer(0.001)
    assert chain.queue.refiner_is_busy
    chain.stamp_ns = last
    chain.answer(0.001)
    assert not chain.queue.refiner_is_busy


@pytest.mark.parametrize("busy", [False, True])
def test_the_filter_enlists_helpers_while_the_refiner_is_not_busy(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    camera_frame, said = SimpleNamespace(frame=SimpleNamespace(camera="the map's")), []
    monkeypatch.setattr(halves, "read_frame", lambda messages: camera_frame)
    stage = object.__new__(halves.FilterStage)
    stage._localizer, stage._feedback = SimpleNamespace(camera="the map's"), SimpleNamespace(refiner_is_busy=busy)
    queue = {"helpers": lambda **given: said.append(given) or nullcontext(), "hand_over": lambda *given: None}
    stage._queue, stage._prepare_ahead = SimpleNamespace(**queue), lambda frame: said.append(frame)
    stage._prepare({})
    assert said == [{"others_idle": not busy}, camera_frame.frame]
