# SPDX-License-Identifier: Apache-2.0
"""Paces recorded messages in real time and keeps a clock ticking in between. Needs no ROS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from rclpy.node import Node
from tf2_msgs.msg import TFMessage

from kfloc_ros.bags.truth import BagTransforms, Edge, TransformEvent
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.transforms import stamped


class Timed(Protocol):
    """Something that was recorded."""

    @property
    def log_ns(self) -> int:
        """When."""
        ...


TimedT = TypeVar("TimedT", bound=Timed)
CLOCK_PERIOD_S = 0.025
"""Wall time between two ticks of /clock while nothing is played, as `ros2 bag play --clock` has it."""


def play(
    events: Iterable[TimedT],
    *,
    rate: float,
    publish: Callable[[TimedT], None],
    tick: Callable[[int], None],
    stopped: Callable[[], bool],
    now_s: Callable[[], float] = time.monotonic,
    sleep_s: Callable[[float], None] = time.sleep,
) -> int:
    """Hand every event to ``publish`` when its time has come.

    Args:
        rate: 1 plays as recorded, 2 twice as fast.
        tick: takes the replay's time in nanoseconds, at least every ``CLOCK_PERIOD_S`` and before each event.
        stopped: asked before every wait; True ends the play.

    Returns:
        How many events were published.
    """
    count = 0
    origin_ns: int | None = None
    origin_s = now_s()
    for event in events:
        if origin_ns is None:
            origin_ns, origin_s = event.log_ns, now_s()
        due_s = origin_s + (event.log_ns - origin_ns) * 1e-9 / rate
        while not stopped() and (wait_s := due_s - now_s()) > 0:
            sleep_s(min(wait_s, CLOCK_PERIOD_S))
            if due_s - now_s() > 0:
                tick(origin_ns + int((now_s() - origin_s) * rate * 1e9))
        if stopped():
            break
        tick(event.log_ns)
        publish(event)
        count += 1
    return count


class TransformPlayer:
    """Says ``/tf_static`` at once, to all who come, and ``/tf`` when it is told to."""

    def __init__(self, node: Node, source: BagTransforms) -> None:
        self.source = source
        self._moving = node.create_publisher(TFMessage, "/tf", qos.results(100))
        self._static = node.create_publisher(TFMessage, "/tf_static", qos.static_transforms())
        self._static.publish(_message(source.static))

    def publish(self, event: TransformEvent) -> None:
        """Publish one recorded message."""
        self._moving.publish(_message(event.edges))


def _message(edges: Iterable[Edge]) -> TFMessage:
    return TFMessage(transforms=[stamped(e.parent, e.child, e.stamp_ns, e.T_parent_child) for e in edges])
