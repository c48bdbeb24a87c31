# SPDX-License-Identifier: Apache-2.0
"""``status`` for every frame, and the report that goes into ``/diagnostics``."""

from __future__ import annotations

from dataclasses import asdict

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.diagnostics import Report
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.packets import CameraFrame
from kfloc_ros.nodes.pose_publisher import Outcome
from kfloc_ros.nodes.status_messages import (
    LEVELS,
    WARN,
    Value,
    counter_values,
    estimate_values,
    make_status,
    timing_values,
)
from kfloc_ros.types import PoseEstimate


class StatusPublisher:
    """Says of every frame what became of it."""

    def __init__(self, node: Node, map_name: str, health: Health) -> None:
        self._map_name, self._health = map_name, health
        self._publisher = node.create_publisher(DiagnosticArray, "status", qos.results())
        self.report = Report(WARN, "no frame was processed yet", {"map": map_name, "state": "INITIALIZING"})

    def publish(
        self, packet: CameraFrame, estimate: PoseEstimate, outcome: Outcome, publish_ms: float, latency_ms: float
    ) -> None:
        """Publish the status of one frame."""
        reason = outcome.pose or outcome.transform or estimate.reason
        summary: dict[str, Value] = {"map": self._map_name, "state": estimate.state.value, "reason": reason}
        details = estimate_values(estimate)
        values: dict[str, Value] = {
            **summary, "published": not outcome.pose, "transform": outcome.transform or "sound",
        }  # fmt: skip
        values |= timing_values({**packet.timings_ms, **estimate.timings_ms, "publish": publish_ms})
        values["latency_ms"] = round(latency_ms, 3)
        values |= counter_values(packet.counters(self._health.counters))
        values |= asdict(self._health.rates()) | details
        level = LEVELS[estimate.state]
        if outcome.pose or outcome.transform:
            level = max(level, WARN)
        self.report = Report(level, reason, {**summary, **details})
        self._publisher.publish(
            make_status(
                estimate.stamp_ns,
                "localization",
                values,
                level=level,
                message=reason,
                hardware_id=self._map_name,
                frame_id=packet.frame_id,
            )
        )
