# SPDX-License-Identifier: Apache-2.0
"""The few quality-of-service profiles in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
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
    """Sensor input: only the newest message is of use.

    ``reliability``: best_effort or reliable; ``durability``: volatile or transient_local.
    """
    kept = DurabilityPolicy.TRANSIENT_LOCAL if durability == "transient_local" else DurabilityPolicy.VOLATILE
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=_reliability(reliability), durability=kept)


def on_mismatch(topic: str, parameters: str, warn: Callable[[str], None]) -> SubscriptionEventCallbacks:
    """Says in a sentence that a publisher of ``topic`` cannot be heard, and which parameters would change that."""

    def say(event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        warn(
            f"Nothing is heard from a publisher on '{topic}': it offers a lesser {policy} than is asked for here. "
            f"Set {parameters} to what it offers (`ros2 topic info -v {topic}` shows it), or change the publisher."
        )

    return SubscriptionEventCallbacks(incompatible_qos=say)


def results(depth: int = 10, reliability: str = "reliable") -> QoSProfile:
    """What must arrive, in order: poses, states, and images between our own nodes.

    ``reliability``: best_effort to hear a publisher that offers no more, too.
    """
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=_reliability(reliability))


def static_transforms() -> QoSProfile:
    """``/tf_static``: also what was published before we came."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=100,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )


def latched() -> QoSProfile:
    """What is published once: also for who comes later."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )
