# SPDX-License-Identifier: Apache-2.0
"""Worker thread of a node: enable switch, queue of the newest, clock jumps, GPU memory.

rclpy's multi-threaded executor makes things slower, and a heavy callback starves ``/clock`` and TF. So callbacks only
put a message here, and this one thread computes (torch releases the interpreter lock).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node

from kfloc_ros.errors import FrameError, KflocError
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer


@dataclass
class Gate:
    """Set in the executor's thread, read in any."""

    active: bool = False
    """The lifecycle state is active."""
    enabled: bool = True
    """``~/enable`` has not switched the work off."""

    @property
    def is_open(self) -> bool:
        """Whether frames are worked on."""
        return self.active and self.enabled

    @property
    def closed_reason(self) -> str:
        """Why frames are not worked on, or empty."""
        if not self.active:
            return "the node is not active"
        return "" if self.enabled else "switched off by ~/enable"


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


class Intake(Generic[ItemT]):
    """A worker behind the node's gate.

    Args:
        name: of the thread.
        work: on one item; a FrameError says that the item cannot be used.
        on_failure: told when anything else was raised, so that stages start anew.
    """

    def __init__(
        self,
        name: str,
        health: Health,
        gate: Gate,
        parameters: ParameterServer,
        work: Callable[[ItemT], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._health, self._gate, self._parameters, self._on_failure = health, gate, parameters, on_failure
        self._worker = LatestWorker(name, work, self._on_error)

    def offer(self, item: ItemT) -> None:
        """Have an item worked on, instead of one that waits."""
        if not self._gate.is_open:
            return
        self._health.count("received")
        if self._worker.submit(item):
            self._health.count("dropped")

    def discard(self) -> None:
        """Forget the item that waits."""
        if self._worker.discard():
            self._health.count("dropped")

    def pause(self) -> None:
        """Forget the item that waits, and let the one in work come to its end; not for the worker's own thread."""
        self.discard()
        self._worker.pause()

    def stop(self) -> None:
        """Let the item in work come to its end, and end the thread."""
        self._worker.stop()

    def _on_error(self, error: Exception) -> None:
        self._health.fault(explained(error, self._parameters))
        if not isinstance(error, FrameError):
            self._on_failure("an internal error")


class GpuMemoryError(KflocError):
    """The GPU's memory ran out."""


def explained(error: Exception, parameters: ParameterServer) -> Exception:
    """What to report instead of an error that a stage raised; the error itself if it is of another kind.

    Where the choice of the device was ours, ``device`` becomes ``cpu`` at the next turn of the executor, and with it
    the application is made anew. Where the user chose, nothing is changed: the next frame tries again.
    """
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return error
    torch.cuda.empty_cache()
    if parameters.localizer.device == "auto":
        parameters.ask("device", "cpu")
        return GpuMemoryError(
            "The GPU's memory ran out. From now on device is 'cpu', where a frame takes longer; "
            "set it to 'auto' again when there is memory."
        )
    return GpuMemoryError(
        "The GPU's memory ran out, and device is 'cuda'. Make room on the GPU, or set device to 'cpu'; with 'auto' "
        "this would have been done by itself."
    )


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
