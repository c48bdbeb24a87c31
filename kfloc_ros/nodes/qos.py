# SPDX-License-Identifier: Apache-2.0
"""The few quality-of-service profiles in use."""

from __future__ import annotations

from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy


def newest(reliability: str) -> QoSProfile:
    """Sensor input: only the newest message is of use. ``reliability``: best_effort or reliable."""
    policy = ReliabilityPolicy.RELIABLE if reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=policy)


def results(depth: int = 10) -> QoSProfile:
    """What must arrive, in order: poses, states, and images between our own nodes."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=ReliabilityPolicy.RELIABLE)


def static_transforms() -> QoSProfile:
    """``/tf_static``: also what was published before we came."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=100,
        reliability=ReliabilityPolicy.RELIABLE,
        durability=DurabilityPolicy.TRANSIENT_LOCAL,
    )
