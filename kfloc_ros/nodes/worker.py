# SPDX-License-Identifier: Apache-2.0
"""Whether a node works: its lifecycle state, and the switch of ``~/enable``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

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
