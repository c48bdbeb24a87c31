# SPDX-License-Identifier: Apache-2.0
"""What comes in to be worked on: the newest of it, counted, in a thread of its own, and nothing that fails ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from kfloc_ros.errors import FrameError
from kfloc_ros.nodes.gate import Gate
from kfloc_ros.nodes.gpu_memory import explained
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import ItemT, LatestWorker


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
