# SPDX-License-Identifier: Apache-2.0
"""Notices that time went backwards: a bag that loops, a simulator that was reset, a clock that was set."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node

WENT_BACKWARDS = "time went backwards"


class TimeWatch:
    """Watches the node's clock and the stamps of its frames.

    Args:
        on_jump: called in the executor's thread when the node's clock jumps back.
    """

    def __init__(self, node: Node, on_jump: Callable[[], None] = lambda: None) -> None:
        self._jumped = threading.Event()
        self._on_jump = on_jump
        self._last_ns: int | None = None
        threshold = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False)
        # The clock forgets a callback whose handle is no longer held.
        self._handle = node.get_clock().create_jump_callback(threshold, post_callback=self._on_clock)

    def reset_reason(self, stamp_ns: int) -> str:
        """Why everything carried over from earlier frames is void, or empty. For the worker, once a frame."""
        jumped = self._jumped.is_set()
        self._jumped.clear()
        if self._last_ns is not None and stamp_ns < self._last_ns:
            jumped = True
        self._last_ns = stamp_ns
        return WENT_BACKWARDS if jumped else ""

    def _on_clock(self, _: Any) -> None:
        self._jumped.set()
        self._on_jump()
