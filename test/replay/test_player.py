# SPDX-License-Identifier: Apache-2.0
"""Pacing: when messages go out and how the clock ticks, on a clock of the test's own."""

from __future__ import annotations

import pytest

from kfloc_ros.bags.stream import BagEvent
from kfloc_ros.replay.agent import CLOCK_PERIOD_S, play


class FakeTime:
    """Time that passes only by sleeping, and by ``cost_s`` for every message published."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.now = 100.0
        self.cost_s = cost_s
        self.sent: list[tuple[float, int]] = []
        self.ticks: list[int] = []

    def sleep(self, seconds: float) -> None:
        assert seconds <= CLOCK_PERIOD_S
        self.now += seconds

    def publish(self, event: BagEvent) -> None:
        self.sent.append((self.now - 100.0, event.log_ns))
        self.now += self.cost_s

    def play(self, events, rate: float = 1.0, stopped=lambda: False) -> int:
        return play(
            events, rate=rate, publish=self.publish, tick=self.ticks.append, stopped=stopped,
            now_s=lambda: self.now, sleep_s=self.sleep,
        )  # fmt: skip


def events(*log_s: float) -> list[BagEvent]:
    return [BagEvent(round(t * 1e9), 0, True, b"") for t in log_s]


@pytest.mark.parametrize("rate", [0.5, 1.0, 4.0])
def test_messages_keep_their_distances_over_the_rate(rate: float) -> None:
    time = FakeTime()
    assert time.play(events(7.0, 7.2, 9.0), rate) == 3
    assert [wall for wall, _ in time.sent] == pytest.approx([0.0, 0.2 / rate, 2.0 / rate])


def test_a_slow_publisher_does_not_shift_what_follows() -> None:
    time = FakeTime(cost_s=0.15)
    time.play(events(0.0, 0.1, 0.5))
    assert [wall for wall, _ in time.sent] == pytest.approx([0.0, 0.15, 0.5])


def test_the_clock_ticks_forward_and_shows_a_messages_time_before_the_message() -> None:
    time = FakeTime()
    time.play(events(1.0, 1.5))
    assert time.ticks == sorted(time.ticks)
    assert time.ticks[0] == 1_000_000_000 and time.ticks[-1] == 1_500_000_000
    assert len(time.ticks) == pytest.approx(0.5 / CLOCK_PERIOD_S, abs=2)


def test_stopping_ends_the_play_in_the_middle_of_a_pause() -> None:
    time = FakeTime()
    assert time.play(events(0.0, 1000.0), stopped=lambda: time.now > 101.0) == 1
    assert time.now < 102.0


def test_nothing_to_play() -> None:
    assert FakeTime().play([]) == 0
