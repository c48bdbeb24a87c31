# SPDX-License-Identifier: Apache-2.0
"""The worker takes the newest item, outlives errors, and ends when asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from kfloc_ros.jobs import HELPERS
from kfloc_ros.nodes.worker import EnableSwitch, LatestQueue, LatestWorker

PATIENCE_S = 5.0


@dataclass
class HeldUp:
    """Worker whose work on an item ends when the test says so."""

    seen: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.worker = LatestWorker("test", self.handle, _fail)

    def handle(self, item: int) -> None:
        self.seen.append(item)
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)
        self.done.append(item)


@pytest.fixture
def held() -> Iterator[HeldUp]:
    held = HeldUp()
    yield held
    held.may_end.set()
    held.worker.stop()


def test_the_newest_item_wins_and_overwritten_ones_are_reported(held: HeldUp) -> None:
    assert not held.worker.submit(0)
    assert held.begun.wait(PATIENCE_S)
    assert [held.worker.submit(item) for item in (1, 2, 3)] == [False, True, True]
    held.may_end.set()
    _wait(lambda: held.seen == [0, 3])
    held.worker.stop()
    assert held.seen == [0, 3]


def test_an_error_is_handed_over_and_the_next_item_is_worked_on() -> None:
    errors: list[Exception] = []
    done = threading.Event()

    def handle(item: str) -> None:
        if item == "bad":
            raise ValueError("as planned")
        done.set()

    worker = LatestWorker("test", handle, errors.append)
    worker.submit("bad")
    _wait(lambda: bool(errors))
    worker.submit("good")
    assert done.wait(PATIENCE_S)
    worker.stop()
    assert [str(error) for error in errors] == ["as planned"]


def test_a_discarded_item_is_never_worked_on(held: HeldUp) -> None:
    held.worker.submit(0)
    assert held.begun.wait(PATIENCE_S)
    held.worker.submit(1)
    assert held.worker.discard() and not held.worker.discard()
    held.may_end.set()
    held.worker.stop()
    assert held.seen == [0]


def test_stopping_leaves_no_thread() -> None:
    before = threading.active_count()
    worker = LatestWorker[int]("test", lambda item: None, _fail)
    worker.stop()
    assert threading.active_count() == before


def _fail(error: Exception) -> None:
    raise AssertionError(f"unexpected: {error}")


def test_a_pause_ends_with_the_item_in_work_and_forgets_the_one_that_waits(held: HeldUp) -> None:
    held.worker.submit(0)
    assert held.begun.wait(PATIENCE_S)
    held.worker.submit(1)
    threading.Timer(0.05, held.may_end.set).start()
    held.worker.pause()
    assert held.done == [0]
    held.worker.submit(2)
    _wait(lambda: held.done == [0, 2])


def test_an_item_handed_over_waits_until_it_is_taken_or_a_newer_one_is_due(held: HeldUp) -> None:
    assert not held.worker.hand_over(0, PATIENCE_S)
    assert held.begun.wait(PATIENCE_S) and held.seen == [0]
    assert not held.worker.hand_over(1, 0.01), "the worker is held up: the item waits, its maker goes on"
    assert held.worker.hand_over(2, 0.01), "a newer item takes its place"
    threading.Timer(0.05, held.may_end.set).start()
    assert held.worker.hand_over(3, PATIENCE_S)
    _wait(lambda: held.seen == [0, 3])


def test_a_worker_is_idle_while_no_item_waits_or_is_in_work(held: HeldUp) -> None:
    assert held.worker.is_idle
    held.worker.submit(0)
    assert held.begun.wait(PATIENCE_S) and not held.worker.is_idle
    held.may_end.set()
    _wait(lambda: held.worker.is_idle)


def test_helpers_are_lent_while_neither_the_worker_nor_another_process_works(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, health = threading.Event(), threading.Event(), SimpleNamespace(count=lambda what: None, fault=_fail)
    monkeypatch.setattr(HELPERS, "spare", 1)

    def handle(item: int) -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)

    queue: LatestQueue[int] = LatestQueue("test", health, EnableSwitch(active=True), None, handle)  # type: ignore[arg-type]

    def at_hand(**others: bool) -> int:
        with queue.helpers(**others):
            return HELPERS.at_hand

    try:
        assert (at_hand(), at_hand(others_idle=False)) == (1, 0)
        queue.offer(0)
        assert begun.wait(PATIENCE_S) and at_hand() == 0
    finally:
        may_end.set()
        queue.stop()


def test_a_pause_lets_go_of_who_hands_over(held: HeldUp) -> None:
    held.worker.submit(0)
    assert held.begun.wait(PATIENCE_S)
    maker = threading.Thread(target=held.worker.hand_over, args=(1, 100.0))
    maker.start()
    _wait(held.worker.discard)
    maker.join(PATIENCE_S)
    assert not maker.is_alive()


def _wait(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(500):
        if condition():
            return
        waiting.wait(PATIENCE_S / 500)
    raise AssertionError("nothing happened in time")
