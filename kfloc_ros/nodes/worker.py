# SPDX-License-Identifier: Apache-2.0
"""A worker thread that always takes the newest item: callbacks stay short, nothing queues up.

rclpy's multi-threaded executor makes things slower, and a heavy callback starves ``/clock`` and TF; so
callbacks only put a message here, and this one thread computes (torch releases the interpreter lock).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class LatestWorker(Generic[ItemT]):
    """Runs ``handle`` on the newest submitted item, one at a time, in a thread of its own.

    Args:
        handle: the work.
        on_error: called with what ``handle`` raised; the thread then goes on with the next item.
    """

    def __init__(self, name: str, handle: Callable[[ItemT], None], on_error: Callable[[Exception], None]) -> None:
        self._handle, self._on_error = handle, on_error
        self._item: ItemT | None = None
        self._working = False
        self._stopping = False
        self._condition = threading.Condition()
        # Not a daemon: one that still publishes while the interpreter ends aborts the process.
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def submit(self, item: ItemT) -> bool:
        """Leave an item for the worker; True if one that it had not begun was overwritten."""
        with self._condition:
            overwritten = self._item is not None
            self._item = item
            self._condition.notify_all()
        return overwritten

    def discard(self) -> bool:
        """Forget the item that waits; True if there was one."""
        with self._condition:
            waiting = self._item is not None
            self._item = None
        return waiting

    def pause(self) -> None:
        """Forget the item that waits, and wait until the one in work is done; not for the worker's own thread."""
        with self._condition:
            self._item = None
            self._condition.wait_for(lambda: not self._working)

    def stop(self) -> None:
        """Finish the item in work, forget the one that waits, and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopping or self._item is not None)
                if self._stopping:
                    return
                item, self._item = self._item, None
                self._working = True
            assert item is not None
            try:
                self._handle(item)
            except Exception as error:
                self._on_error(error)
            finally:
                with self._condition:
                    self._working = False
                    self._condition.notify_all()
