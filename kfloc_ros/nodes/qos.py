# SPDX-License-Identifier: Apache-2.0
"""Quality-of-service profiles of all topics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)


def _reliability(name: str) -> ReliabilityPolicy:
    return ReliabilityPolicy.RELIABLE if name == "reliable" else ReliabilityPolicy.BEST_EFFORT


def newest(reliability: str, durability: str = "volatile") -> QoSProfile:
    """Return the profile of sensor input, of which only the newest message is used.

    Args:
        reliability: best_effort or reliable.
        durability: volatile or transient_local.
    """
    kept = DurabilityPolicy.TRANSIENT_LOCAL if durability == "transient_local" else DurabilityPolicy.VOLATILE
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=_reliability(reliability), durability=kept)


def on_mismatch(topic: str, parameters: str, warn: Callable[[str], None]) -> SubscriptionEventCallbacks:
    """Return callbacks that warn of an incompatible publisher of ``topic`` and name the parameters to change."""

    def say(event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        warn(
            f"No messages can be received from a publisher on '{topic}': it offers a lower {policy} than this node "
            f"requests. Set {parameters} to its value (`ros2 topic info -v {topic}` shows it), or change the "
            "publisher."
        )

    return SubscriptionEventCallbacks(incompatible_qos=say)


def results(depth: int = 10, reliability: str = "reliable") -> QoSProfile:
    """Return the profile of data that must arrive, in order: poses, states, and images between our own nodes.

    Args:
        reliability: best_effort also matches a publisher that offers only best_effort.
    """
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=_reliability(reliability))


def services() -> QoSProfile:
    """Return the profile of services, whose queue holds the calls of a hundred callers at once."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1000, reliability=ReliabilityPolicy.RELIABLE)


def static_transforms() -> QoSProfile:
    """Return the profile of ``/tf_static``, which includes messages from before the subscription."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=100,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


def latched() -> QoSProfile:
    """Return the profile of data that is published once and delivered to late subscribers."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


def matching(node: Node, topic: str) -> list[QoSProfile]:
    """Return the profiles of subscriptions to all publishers of a topic, as strict as they are.

    Static transforms that some publishers latch and others do not need two: a volatile subscription receives nothing
    from before it.
    """
    offers = [info.qos_profile for info in node.get_publishers_info_by_topic(topic)]
    is_reliable = all(offer.reliability == ReliabilityPolicy.RELIABLE for offer in offers)
    kept = {offer.durability for offer in offers}
    if topic.endswith("/tf_static"):
        kept.add(DurabilityPolicy.TRANSIENT_LOCAL)
    elif len(kept) != 1:
        kept = {DurabilityPolicy.VOLATILE}
    return [
        QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=100,
            reliability=ReliabilityPolicy.RELIABLE if is_reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=durability,
        )
        for durability in (DurabilityPolicy.TRANSIENT_LOCAL, DurabilityPolicy.VOLATILE)
        if durability in kept
    ]
