# SPDX-License-Identifier: Apache-2.0
"""Worker thread of a node: enable switch, queue of the newest item, clock jumps, GPU memory.

rclpy's multi-threaded executor makes things slower, and a heavy callback starves ``/clock`` and TF. Callbacks therefore
only queue a message here, and one thread computes (torch releases the interpreter lock).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from rclpy.clock import JumpThreshold
from rclpy.duration import Duration
from rclpy.node import Node

from kfloc_ros.errors import FrameError, KflocError
from kfloc_ros.jobs import HELPERS
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer


@dataclass
class EnableSwitch:
    """Enable switch of a node; written in the executor's thread, read in any."""

    active: bool = False
    """The lifecycle state is active."""
    enabled: bool = True
    """``~/enable`` has not switched processing off."""

    @property
    def is_on(self) -> bool:
        """True if frames are processed."""
        return self.active and self.enabled

    @property
    def off_reason(self) -> str:
        """Reason why frames are not processed; empty if they are."""
        if not self.active:
            return "the node is not active"
        return "" if self.enabled else "switched off by ~/enable"


ItemT = TypeVar("ItemT")


class LatestWorker(Generic[ItemT]):
    """Worker that runs ``handle`` on the newest submitted item, one at a time, in a thread of its own.

    Args:
        handle: called with each item.
        on_error: called with an exception of ``handle``; the thread continues with the next item.
    """

    def __init__(self, name: str, handle: Callable[[ItemT], None], on_error: Callable[[Exception], None]) -> None:
        self._handle, self._on_error = handle, on_error
        self._item: ItemT | None = None
        self._working = False
        self._stopping = False
        self._condition = threading.Condition()
        # Not a daemon: a thread that publishes while the interpreter ends aborts the process.
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """True if no item is being handled or waits."""
        return self._item is None and not self._working

    def submit(self, item: ItemT) -> bool:
        """Queue an item for the worker; return True if it overwrites one that was not started."""
        with self._condition:
            overwritten = self._item is not None
            self._item = item
            self._condition.notify_all()
        return overwritten

    def hand_over(self, item: ItemT, patience_s: float, help_with: Callable[[], None] = lambda: None) -> bool:
        """Queue an item, help with it, and wait until the worker takes it; return True if it overwrote one.

        A thread that prepares items thus stays one item ahead, and prepares a newer one where the worker is held up.

        Args:
            item: the item.
            patience_s: longest wait, in seconds.
            help_with: does a share of the work on the item that both threads may do.
        """
        overwritten = self.submit(item)
        help_with()
        with self._condition:
            self._condition.wait_for(lambda: self._item is not item or self._stopping, patience_s)
        return overwritten

    def discard(self) -> bool:
        """Discard the waiting item; return True if there was one."""
        with self._condition:
            waiting = self._item is not None
            self._item = None
            self._condition.notify_all()
        return waiting

    def pause(self) -> None:
        """Discard the waiting item and wait until the current one is done; not from the worker's own thread."""
        with self._condition:
            self._item = None
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._working)

    def stop(self) -> None:
        """Finish the current item, discard the waiting one, and end the thread."""
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
                self._condition.notify_all()
            assert item is not None
            try:
                self._handle(item)
            except Exception as error:
                self._on_error(error)
            finally:
                with self._condition:
                    self._working = False
                    self._condition.notify_all()


HAND_OVER_S = 0.1
"""Time, in seconds, for which a prepared item waits before a newer one is prepared in its place."""


class LatestQueue(Generic[ItemT]):
    """Queue of length one before a worker thread, behind the node's enable switch.

    Args:
        name: name of the thread.
        work: called with each item; raises FrameError for an item that cannot be used.
        on_failure: called with a reason after any other exception, so that the stages reset.
    """

    def __init__(
        self,
        name: str,
        health: Health,
        switch: EnableSwitch,
        parameters: ParameterServer,
        work: Callable[[ItemT], None],
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._health, self._switch, self._parameters, self._on_failure = health, switch, parameters, on_failure
        self._worker = LatestWorker(name, work, self._on_error)

    def offer(self, item: ItemT) -> None:
        """Queue an item in place of one that waits."""
        if not self._switch.is_on:
            return
        self._health.count("received")
        if self._worker.submit(item):
            self._health.count("dropped")

    def hand_over(self, item: ItemT, help_with: Callable[[], None] = lambda: None) -> None:
        """Queue an item that another queue received, help with it, and wait until it is taken: ``HAND_OVER_S``."""
        if self._worker.hand_over(item, HAND_OVER_S, help_with):
            self._health.count("dropped")

    def helpers(self, *, others_idle: bool = True) -> AbstractContextManager[None]:
        """Return a context in which threads of the free cores can be enlisted, if the worker and others are idle now.

        Args:
            others_idle: no other process of the chain computes, as far as is known.
        """
        return HELPERS.lending() if others_idle and self._worker.is_idle else nullcontext()

    def discard(self) -> None:
        """Discard the waiting item."""
        if self._worker.discard():
            self._health.count("dropped")

    def pause(self) -> None:
        """Discard the waiting item and wait until the current one is done; not from the worker's own thread."""
        self.discard()
        self._worker.pause()

    def stop(self) -> None:
        """Finish the current item and end the thread."""
        self._worker.stop()

    def _on_error(self, error: Exception) -> None:
        self._health.fault(reported_error(error, self._parameters))
        if not isinstance(error, FrameError):
            self._on_failure("an internal error")


class GpuMemoryError(KflocError):
    """Error: the GPU is out of memory."""


def reported_error(error: Exception, parameters: ParameterServer) -> Exception:
    """Return the error to report for an exception of a stage; exceptions other than out-of-memory are returned as is.

    If ``device`` is ``auto``, it becomes ``cpu`` at the executor's next turn, which builds the stage again. If the
    user chose the device, nothing changes: the next frame tries again.
    """
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return error
    torch.cuda.empty_cache()
    if parameters.localizer.device == "auto":
        parameters.request("device", "cpu")
        return GpuMemoryError(
            "The GPU is out of memory. device is now 'cpu', which is slower per frame; set it to 'auto' again when "
            "there is memory."
        )
    return GpuMemoryError(
        "The GPU is out of memory, and device is 'cuda'. Free memory on the GPU, or set device to 'cpu'; with 'auto' "
        "the node switches by itself."
    )


WENT_BACKWARDS = "time went backwards"


class _ClockJumps:
    """Dispatcher of clock jumps to the watches of one node.

    One jump handle lives as long as the node: the clock keeps a bare pointer to a handle, which a dropped handle
    would leave dangling, while stages come and go with the lifecycle.
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
    """Watch on the node's clock and the stamps of its frames.

    Args:
        on_jump: called in the executor's thread when the node's clock jumps back.
    """

    def __init__(self, node: Node, on_jump: Callable[[], None] = lambda: None) -> None:
        self._jumped = threading.Event()
        self._on_jump = on_jump
        self._last_ns: int | None = None
        self._requested = ""
        if node not in _jumps_of:
            _jumps_of[node] = _ClockJumps(node)
        _jumps_of[node].watches.add(self)

    def reset_reason(self, stamp_ns: int) -> str:
        """Return the reason why the state of earlier frames is void; empty if it is valid. Worker thread, once per
        frame.
        """
        requested, self._requested = self._requested, ""
        jumped = self._jumped.is_set()
        self._jumped.clear()
        if self._last_ns is not None and stamp_ns < self._last_ns:
            jumped = True
        self._last_ns = stamp_ns
        return WENT_BACKWARDS if jumped else requested

    def request_reset(self, reason: str) -> None:
        """Request a reset at the next frame. Thread-safe."""
        self._requested = reason

    def jump(self) -> None:
        """Record that the clock went back; executor thread only."""
        self._jumped.set()
        self._on_jump()
