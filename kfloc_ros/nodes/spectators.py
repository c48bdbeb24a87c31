# SPDX-License-Identifier: Apache-2.0
"""Topics for eyes: made only for who subscribes, and in a thread of their own, so that no pose waits for a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.worker import LatestWorker

PacketT = TypeVar("PacketT")


class View(NamedTuple, Generic[PacketT]):
    """A topic's message type, and what makes a message of a packet; None: there is nothing to see this time."""

    kind: type
    make: Callable[[PacketT], Any | None]


class Spectators(Generic[PacketT]):
    """Publishes views of packets; a packet that comes while the one before is being drawn may be left out.

    Args:
        name: of the thread, which begins when somebody first looks.
        views: by topic.
        warn: told of a view that could not be made, which is no fault of the localizer's.
    """

    def __init__(self, node: Node, name: str, views: Mapping[str, View[PacketT]], warn: Callable[[str], None]) -> None:
        self._views = [
            (topic, node.create_publisher(view.kind, topic, qos.results(1)), view.make) for topic, view in views.items()
        ]
        self._name, self._warn = name, warn
        self._worker: LatestWorker[PacketT] | None = None

    def offer(self, packet: PacketT) -> None:
        """Have a packet shown, if anybody looks; from one thread."""
        if not any(publisher.get_subscription_count() for _, publisher, _ in self._views):
            return
        if self._worker is None:
            self._worker = LatestWorker(self._name, self._publish, self._on_error)
        self._worker.submit(packet)

    def pause(self) -> None:
        """Forget the packet that waits, and let the one in work come to its end."""
        if self._worker is not None:
            self._worker.pause()

    def stop(self) -> None:
        """End the thread; after the last offer."""
        if self._worker is not None:
            self._worker.stop()

    def _publish(self, packet: PacketT) -> None:
        for _, publisher, make in self._views:
            if publisher.get_subscription_count():
                message = make(packet)
                if message is not None:
                    publisher.publish(message)

    def _on_error(self, error: Exception) -> None:
        self._warn(f"A picture for the topics of {self._name} could not be made: {type(error).__name__}: {error}")
