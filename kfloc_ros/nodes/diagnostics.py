# SPDX-License-Identifier: Apache-2.0
"""Publishers of ``/diagnostics`` (once a second) and of ``status`` (once per frame)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.handover import CameraFrame
from kfloc_ros.nodes.health import (
    LEVELS,
    OK,
    WARN,
    Health,
    Value,
    counter_values,
    estimate_values,
    make_status,
    timing_values,
)
from kfloc_ros.nodes.pose_publisher import Outcome
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.types import PoseEstimate

PERIOD_S = 1.0


@dataclass(frozen=True)
class Report:
    """State of a stage, as reported in ``/diagnostics``."""

    level: bytes = OK
    message: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)


class DiagnosticsPublisher:
    """Publisher of one node's health; its timer runs on the steady clock, so that it also ticks without ``/clock``."""

    def __init__(
        self, node: Node, health: Health, switch: EnableSwitch, hardware_id: str, report: Callable[[], Report]
    ) -> None:
        self._node, self._health, self._switch, self._hardware_id, self._report = (
            node,
            health,
            switch,
            hardware_id,
            report,
        )
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", qos.results())
        self._timer = node.create_timer(PERIOD_S, self._publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _publish(self) -> None:
        report, rates = self._report(), self._health.rates()
        level, message = report.level, report.message
        if not self._switch.is_on:
            level, message = OK, self._switch.off_reason
        elif rates.input_hz == 0.0:
            level, message = max(level, WARN), "no images come in"
        values: dict[str, Value] = {
            "working": self._switch.is_on,
            **report.values,
            **counter_values(self._health.counters),
            **asdict(rates),
        }
        values["last_fault"] = self._health.last_fault
        array = make_status(
            self._node.get_clock().now().nanoseconds,
            f"{self._node.get_fully_qualified_name().lstrip('/')}: localization",
            values,
            level=level,
            message=message,
            hardware_id=self._hardware_id,
        )
        self._publisher.publish(array)


class StatusPublisher:
    """Publisher of the result of every frame on ``status``."""

    def __init__(self, node: Node, map_name: str, health: Health) -> None:
        self._map_name, self._health = map_name, health
        self._publisher = node.create_publisher(DiagnosticArray, "status", qos.results())
        self.report = Report(WARN, "no frame was processed yet", {"map": map_name, "state": "INITIALIZING"})

    def publish(
        self, camera_frame: CameraFrame, estimate: PoseEstimate, outcome: Outcome, publish_ms: float, latency_ms: float
    ) -> None:
        """Publish the status of one frame."""
        reason = outcome.pose or outcome.transform or estimate.reason
        summary: dict[str, Value] = {"map": self._map_name, "state": estimate.state.value, "reason": reason}
        details = estimate_values(estimate)
        values: dict[str, Value] = {
            **summary, "published": not outcome.pose, "transform": outcome.transform or "sound",
        }  # fmt: skip
        values |= timing_values({**camera_frame.timings_ms, **estimate.timings_ms, "publish": publish_ms})
        values["latency_ms"] = round(latency_ms, 3)
        values |= counter_values(camera_frame.counters(self._health.counters))
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
                frame_id=camera_frame.frame_id,
            )
        )
