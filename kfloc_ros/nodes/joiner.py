# SPDX-License-Identifier: Apache-2.0
"""Messages of one stamp from several topics, joined by ROS's ``message_filters`` where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rclpy.node import Node

from kfloc_ros.messages.poses import stamp_to_ns
from kfloc_ros.nodes import qos

try:
    import message_filters
except ImportError:
    message_filters = None

Messages = Mapping[str, Any]
"""Messages of one stamp, by topic."""

MAX_INCOMPLETE = 8
"""Limit on incomplete stamps; the oldest is discarded for a new one."""
JUMP_BACK_NS = 1_000_000_000


class Joiner(Protocol):
    """Collector of the messages of one stamp, which passes complete sets on."""

    def add(self, topic: str, message: Any) -> None:
        """Take a message of a topic."""


class StampJoiner:
    """Joiner for where ``message_filters`` is not installed. A complete stamp discards all that arrived before it.

    Args:
        topics: topics that every set has.
        pass_on: called with each complete set.
        also: topic that some sets have.
        wanted: called with a set of ``topics``; True if it has ``also``, too.
    """

    def __init__(
        self,
        topics: Sequence[str],
        pass_on: Callable[[Messages], None],
        also: str = "",
        wanted: Callable[[Messages], bool] = lambda messages: False,
    ) -> None:
        self._topics, self._pass_on, self._also, self._wanted = set(topics), pass_on, also, wanted
        self._parts: dict[int, dict[str, Any]] = {}

    def add(self, topic: str, message: Any) -> None:
        stamp_ns = stamp_to_ns(message.header.stamp)
        parts = self._parts.setdefault(stamp_ns, {})
        parts[topic] = message
        if self._topics <= parts.keys() and (self._also in parts or not self._wanted(parts)):
            # By order of arrival, not by stamp: after a jump back in time, later messages have smaller stamps.
            for key in list(self._parts):
                del self._parts[key]
                if key == stamp_ns:
                    break
            self._pass_on(parts)
        while len(self._parts) > MAX_INCOMPLETE:
            del self._parts[next(iter(self._parts))]


class _Set:
    """Messages of one stamp, as one input of a second synchronizer."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.header = next(iter(messages.values())).header


class FilterJoiner:
    """Joiner by ``message_filters.TimeSynchronizer``, with the arguments of :class:`StampJoiner`.

    A topic that some sets have is joined in a second step. Two things that the synchronizer lacks are added: it is
    renewed when time jumps back, since it would discard what has smaller stamps than what it holds; and sets are
    passed on outside its lock, which an exception would leave closed.
    """

    def __init__(
        self,
        topics: Sequence[str],
        pass_on: Callable[[Messages], None],
        also: str = "",
        wanted: Callable[[Messages], bool] = lambda messages: False,
    ) -> None:
        self._topics, self._pass_on, self._also, self._wanted = tuple(topics), pass_on, also, wanted
        self._complete: list[Messages] = []
        self._newest_ns = 0
        self._inputs: dict[str, Any] = {}
        self._connect()

    def add(self, topic: str, message: Any) -> None:
        stamp_ns = stamp_to_ns(message.header.stamp)
        if stamp_ns < self._newest_ns - JUMP_BACK_NS:
            self._connect()
        self._newest_ns = max(self._newest_ns, stamp_ns)
        self._inputs[topic].signalMessage(message)
        while self._complete:
            self._pass_on(self._complete.pop(0))

    def _connect(self) -> None:
        """Make inputs and synchronizers anew."""
        self._newest_ns = 0
        self._inputs = {topic: message_filters.SimpleFilter() for topic in (*self._topics, self._also) if topic}
        self._first = message_filters.TimeSynchronizer([self._inputs[topic] for topic in self._topics], MAX_INCOMPLETE)
        self._first.registerCallback(self._on_first)
        self._synchronizers = [self._first]
        if self._also:
            self._sets = message_filters.SimpleFilter()
            second = message_filters.TimeSynchronizer([self._sets, self._inputs[self._also]], MAX_INCOMPLETE)
            second.registerCallback(lambda found, message: self._finish({**found.messages, self._also: message}))
            self._synchronizers.append(second)

    def _on_first(self, *found: Any) -> None:
        messages = dict(zip(self._topics, found, strict=True))
        if self._also and self._wanted(messages):
            self._sets.signalMessage(_Set(messages))
        else:
            self._finish(messages)

    def _finish(self, messages: Messages) -> None:
        self._complete.append(messages)
        stamp_ns = stamp_to_ns(next(iter(messages.values())).header.stamp)
        for queue in (queue for item in self._synchronizers for queue in item.queues):
            for older_ns in [key for key in queue if key < stamp_ns]:
                del queue[older_ns]


def make_joiner(
    topics: Sequence[str],
    pass_on: Callable[[Messages], None],
    also: str = "",
    wanted: Callable[[Messages], bool] = lambda messages: False,
) -> Joiner:
    """Return a joiner by ``message_filters`` if that is installed, else our own; see :class:`StampJoiner`."""
    return (StampJoiner if message_filters is None else FilterJoiner)(topics, pass_on, also, wanted)


def subscribe(node: Node, topics: Mapping[str, type], joiner: Joiner) -> None:
    """Connect a joiner to its topics."""
    for topic, kind in topics.items():
        node.create_subscription(kind, topic, lambda message, topic=topic: joiner.add(topic, message), qos.results())
