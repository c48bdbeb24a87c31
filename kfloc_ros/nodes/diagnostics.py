# SPDX-License-Identifier: Apache-2.0
"""Publishers of ``/diagnostics`` (once a second) and of ``status`` (once per frame)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import (
    OK,
    WARN,
    Health,
    Value,
    counter_values,
    make_status,
)
from kfloc_ros.nodes.worker import EnableSwitch

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
        elif not self._health.receives:
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
            message=message or "images are processed",
            hardware_id=self._hardware_id,
        )
        self._publisher.publish(array)
