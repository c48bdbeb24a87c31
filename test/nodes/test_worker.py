# SPDX-License-Identifier: Apache-2.0
"""The worker takes the newest item, outlives errors, and ends when asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kfloc_ros.nodes.worker import LatestWorker

PATIENCE_S = 5.0


def test_the_newest_item_wins_and_overwritten_ones_are_reported() -> None:
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def handle(item: int) -> None:
        seen.append(item)
        begun.set()
        assert may_end.wait(PATIENCE_S)

    worker = LatestWorker("test", handle, _fail)
    try:
        assert not worker.submit(0)
        assert begun.wait(PATIENCE_S)
        assert [worker.submit(item) for item in (1, 2, 3)] == [False, True, True]
        may_end.set()
        _wait(lambda: seen == [0, 3])
    finally:
        may_end.set()
        worker.stop()
    assert seen == [0, 3]


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


def test_a_discarded_item_is_never_worked_on() -> None:
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def handle(item: int) -> None:
        seen.append(item)
        begun.set()
        assert may_end.wait(PATIENCE_S)

    worker = LatestWorker("test", handle, _fail)
    worker.submit(0)
    assert begun.wait(PATIENCE_S)
    worker.submit(1)
    assert worker.discard() and not worker.discard()
    may_end.set()
    worker.stop()
    assert seen == [0]


def test_stopping_leaves_no_thread() -> None:
    before = threading.active_count()
    worker = LatestWorker[int]("test", lambda item: None, _fail)
    worker.stop()
    assert threading.active_count() == before


def _fail(error: Exception) -> None:
    raise AssertionError(f"unexpected: {error}")


def test_a_pause_ends_with_the_item_in_work_and_forgets_the_one_that_waits() -> None:
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def handle(item: int) -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        seen.append(item)

    worker = LatestWorker("test", handle, _fail)
    try:
        worker.submit(0)
        assert begun.wait(PATIENCE_S)
        worker.submit(1)
        threading.Timer(0.05, may_end.set).start()
        worker.pause()
        assert seen == [0]
        worker.submit(2)
        _wait(lambda: seen == [0, 2])
    finally:
        may_end.set()
        worker.stop()


def test_an_item_handed_over_waits_until_it_is_taken_or_a_newer_one_is_due() -> None:
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def handle(item: int) -> None:
        seen.append(item)
        begun.set()
        assert may_end.wait(PATIENCE_S)

    worker = LatestWorker("test", handle, _fail)
    try:
        assert not worker.hand_over(0, PATIENCE_S)
        assert begun.wait(PATIENCE_S) and seen == [0]
        assert not worker.hand_over(1, 0.01), "the worker is held up: the item waits, its maker goes on"
        assert worker.hand_over(2, 0.01), "a newer item takes its place"
        threading.Timer(0.05, may_end.set).start()
        assert worker.hand_over(3, PATIENCE_S)
        _wait(lambda: seen == [0, 3])
    finally:
        may_end.set()
        worker.stop()


def test_a_pause_lets_go_of_who_hands_over() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def handle(item: int) -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)

    worker = LatestWorker("test", handle, _fail)
    try:
        worker.submit(0)
        assert begun.wait(PATIENCE_S)
        maker = threading.Thread(target=worker.hand_over, args=(1, 100.0))
        maker.start()
        _wait(worker.discard)
        maker.join(PATIENCE_S)
        assert not maker.is_alive()
    finally:
        may_end.set()
        worker.stop()


def _wait(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(500):
        if condition():
            return
        waiting.wait(PATIENCE_S / 500)
    raise AssertionError("nothing happened in time")
