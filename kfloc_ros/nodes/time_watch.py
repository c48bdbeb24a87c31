# SPDX-License-Identifier: Apache-2.0
"""Notices that time went backwards: a bag that loops, a simulator that was reset, a clock that was set."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node

WENT_BACKWARDS = "time went backwards"


class _ClockJumps:
    """Tells the watches of one node about jumps of its clock.

    One handle for the whole life of the node: the clock keeps a bare pointer to a handle, so that one that is
    dropped leaves it pointing at nothing, and components come and go with the lifecycle.
    """

    def __init__(self, node: Node) -> None:
        self.watches: weakref.WeakSet[TimeWatch] = weakref.WeakSet()
        threshold = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        self._handle = node.get_clock().create_jump_callback(threshold, post_callback=self._on_jump)

    def _on_jump(self, _: Any) -> None:
        for watch in list(self.watches):
            watch.jump()


_jumps_of: weakref.WeakKeyDictionary[Node, _ClockJumps] = weakref.WeakKeyDictionary()


class TimeWatch:
    """Watches the node's clock and the stamps of its frames.

    Args:
        on_jump: called in the executor's thread when the node's clock jumps back.
    """

    def __init__(self, node: Node, on_jump: Callable[[], None] = lambda: None) -> None:
        self._jumped = threading.Event()
        self._on_jump = on_jump
        self._last_ns: int | None = None
        self._asked = ""
        if node not in _jumps_of:
            _jumps_of[node] = _ClockJumps(node)
        _jumps_of[node].watches.add(self)

    def reset_reason(self, stamp_ns: int) -> str:
        """Why everything carried over from earlier frames is void, or empty. For the worker, once a frame."""
        asked, self._asked = self._asked, ""
        jumped = self._jumped.is_set()
        self._jumped.clear()
        if self._last_ns is not None and stamp_ns < self._last_ns:
            jumped = True
        self._last_ns = stamp_ns
        return WENT_BACKWARDS if jumped else asked

    def start_anew(self, reason: str) -> None:
        """Have the next frame start anew, whatever the time; for any thread."""
        self._asked = reason

    def jump(self) -> None:
        """The clock went back; in the executor's thread."""
        self._jumped.set()
        self._on_jump()
