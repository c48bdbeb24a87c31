# SPDX-License-Identifier: Apache-2.0
"""Publishers of ``/diagnostics`` (once a second), ``status`` (once per frame) and ``localization_state``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from std_msgs.msg import String

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
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState

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


_CHANGE_S = 1.0
"""Shortest time between two logged changes of state, in seconds."""
NO_IMAGES, OFF = "NO_IMAGES", "OFF"
"""Values of ``localization_state`` besides the names of :class:`TrackingState`."""
_GOOD_SIGMA_M = 0.05
"""Standard deviation of a position, in metres, up to which a pose counts as known."""


def score(state: TrackingState, deviation_m: float) -> float:
    """Return the share, from 0 (unknown) to 1 (known), that fleet managers such as VDA 5050's show for a pose.

    Args:
        state: state of the frame; DEGRADED counts half.
        deviation_m: largest standard deviation of the position on the ground; NaN without a pose.
    """
    known = {TrackingState.TRACKING: 1.0, TrackingState.DEGRADED: 0.5}.get(state, 0.0)
    return known * min(1.0, _GOOD_SIGMA_M / deviation_m) if deviation_m > 0.0 else 0.0


class StateLog:
    """Log of the first pose and of every change of state; at most one change a second, so that it does not flood.

    Args:
        inform: called with each sentence.
        clock: steady time in seconds.
    """

    def __init__(self, map_name: str, inform: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._map_name, self._inform, self._clock = map_name, inform, clock
        self._has_pose = False
        self._state: TrackingState | None = None
        self._changed_s = -math.inf

    def note_pose(self, T_map_camera: Matrix, latency_ms: float) -> None:
        """Log the first pose (4, 4)."""
        if self._has_pose:
            return
        self._has_pose = True
        x, y, z = T_map_camera[:3, 3]
        self._inform(
            f"First pose in map '{self._map_name}': the camera is at ({x:.2f}, {y:.2f}, {z:.2f}) m; latency "
            f"{latency_ms:.0f} ms."
        )

    def note_state(self, state: TrackingState, reason: str) -> None:
        """Log the state of a frame if it differs from the last one logged."""
        now_s = self._clock()
        if state is self._state or now_s - self._changed_s < _CHANGE_S:
            return
        change = state.value if self._state is None else f"{self._state.value} -> {state.value}"
        self._state, self._changed_s = state, now_s
        self._inform(f"State {change}" + (f": {reason.rstrip('.')}." if reason else "."))


class StatusPublisher:
    """Publisher of the result of every frame on ``status``, and of changes of the state on ``localization_state``."""

    def __init__(self, node: Node, map_name: str, health: Health) -> None:
        self._map_name, self._health = map_name, health
        self._log = StateLog(map_name, health.inform)
        self._publisher = node.create_publisher(DiagnosticArray, "status", qos.results())
        self._states = node.create_publisher(String, "localization_state", qos.latched())
        self._sent_state = ""
        self.report = Report(WARN, "no frame was processed yet", {"map": map_name, "state": "INITIALIZING"})

    def send_state(self, state: str) -> None:
        """Publish a state if it differs from the last one."""
        if state != self._sent_state:
            self._sent_state = state
            self._states.publish(String(data=state))

    def publish(
        self, camera_frame: CameraFrame, estimate: PoseEstimate, outcome: Outcome, publish_ms: float, latency_ms: float
    ) -> None:
        """Publish the status of one frame."""
        reason = outcome.pose or outcome.transform or estimate.reason
        summary: dict[str, Value] = {
            "map": self._map_name, "state": estimate.state.value, "reason": reason,
            "published": not outcome.pose, "transform": outcome.transform_text,
        }  # fmt: skip
        has_pose = estimate.T_map_camera is not None and not outcome.pose
        deviation_m = outcome.deviation_m if has_pose else math.nan
        summary |= {
            "localized": has_pose and estimate.state in (TrackingState.TRACKING, TrackingState.DEGRADED),
            "localization_score": round(score(estimate.state, deviation_m), 3), "deviation_m": deviation_m,
        }  # fmt: skip
        details = estimate_values(estimate)
        values: dict[str, Value] = dict(summary)
        values |= timing_values({**camera_frame.timings_ms, **estimate.timings_ms, "publish": publish_ms})
        values["latency_ms"] = round(latency_ms, 3)
        values |= counter_values(camera_frame.counters(self._health.counters))
        values |= asdict(self._health.rates()) | details
        if self._health.runtime:
            values["runtime"] = self._health.runtime
        level = LEVELS[estimate.state]
        if outcome.pose or outcome.transform:
            level = max(level, WARN)
        message = reason or estimate.state.value
        self.report = Report(level, message, {**summary, **details})
        if estimate.T_map_camera is not None and has_pose:
            self._log.note_pose(estimate.T_map_camera, latency_ms)
        self._log.note_state(estimate.state, estimate.reason)
        self.send_state(estimate.state.value if has_pose or estimate.T_map_camera is None else "INITIALIZING")
        self._publisher.publish(
            make_status(
                estimate.stamp_ns,
                "localization",
                values,
                level=level,
                message=message,
                hardware_id=self._map_name,
                frame_id=camera_frame.frame_id,
            )
        )
