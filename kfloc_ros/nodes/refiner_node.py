# SPDX-License-Identifier: Apache-2.0
"""The refiner component: coarse poses to the poses that are published, with a status for every frame."""

from __future__ import annotations

import time

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node

from kfloc_ros.errors import FrameError
from kfloc_ros.localizer import RefineStage
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, Report
from kfloc_ros.nodes.filter_node import check_camera
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.packets import CoarseFrame
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_publisher import Outcome, PosePublisher
from kfloc_ros.nodes.runtime import run_node
from kfloc_ros.nodes.status_messages import (
    LEVELS,
    WARN,
    Value,
    counter_values,
    estimate_values,
    make_status,
    timing_values,
)
from kfloc_ros.nodes.time_watch import TimeWatch
from kfloc_ros.nodes.topics import (
    COARSE_TOPICS,
    FRAME_TOPICS,
    Messages,
    StampJoiner,
    coarse_is_complete,
    read_coarse,
    subscribe,
)
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.warm_up import warm_up
from kfloc_ros.nodes.worker import LatestWorker
from kfloc_ros.types import PoseEstimate


class RefinerComponent:
    """Takes coarse frames and publishes ``pose``, ``/tf``, ``path``, ``status`` and ``/diagnostics``."""

    def __init__(
        self, node: Node, parameters: ParameterServer, scene_map: SceneMap, stage: RefineStage, health: Health
    ) -> None:
        self._stage, self._health, self._map_name = stage, health, scene_map.name
        self._map_frame = parameters.node.map_frame or scene_map.frame_id
        self._listener = TransformListener(node, health.warn)
        self._publisher = PosePublisher(node, parameters, self._map_frame, self._listener, health)
        self._statuses = node.create_publisher(DiagnosticArray, "status", qos.results())
        self._watch = TimeWatch(node)
        self._report = Report(WARN, "no frame was processed yet", {"map": scene_map.name, "state": "INITIALIZING"})
        self._diagnostics = DiagnosticsPublisher(node, health, scene_map.name, lambda: self._report)

    def accept(self, packet: CoarseFrame) -> None:
        """Work on one frame, in the caller's thread. Raises FrameError for one that cannot be used."""
        reason = self._watch.reset_reason(packet.result.stamp_ns)
        if reason:
            self.reset(reason)
            self._publisher.clear()
        estimate = self._stage.process(packet.camera.frame, packet.result)
        start = time.perf_counter()
        outcome = self._publisher.publish(estimate, packet.camera.frame_id)
        publish_ms = 1e3 * (time.perf_counter() - start)
        latency_ms = packet.camera.latency_ms()
        self._health.answered(latency_ms)
        self._publish_status(packet, estimate, outcome, publish_ms, latency_ms)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames; in the thread that calls ``accept``."""
        self._stage.reset(reason)

    def _publish_status(
        self, packet: CoarseFrame, estimate: PoseEstimate, outcome: Outcome, publish_ms: float, latency_ms: float
    ) -> None:
        reason = outcome.pose or outcome.transform or estimate.reason
        values: dict[str, Value] = {"state": estimate.state.value, "reason": reason, "published": not outcome.pose}
        values |= timing_values({**packet.camera.timings_ms, **estimate.timings_ms, "publish": publish_ms})
        values["latency_ms"] = round(latency_ms, 3)
        values |= counter_values(packet.camera.counters(self._health.counters))
        values |= estimate_values(estimate)
        held_back = outcome.pose or outcome.transform
        level = max(LEVELS[estimate.state], WARN) if held_back else LEVELS[estimate.state]
        self._report = Report(level, reason, {"map": self._map_name, "state": estimate.state.value, "reason": reason})
        self._statuses.publish(
            make_status(
                estimate.stamp_ns,
                "localization",
                values,
                level=level,
                message=reason,
                hardware_id=self._map_name,
                frame_id=packet.camera.frame_id,
            )
        )


class _RefinerApplication:
    """The refiner component as a node of its own: frames and coarse poses come in over topics."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: SceneMap) -> None:
        self._health = Health(node.get_logger())
        self._camera = scene_map.camera
        warm_up(scene_map, parameters.localizer)
        stage = RefineStage(scene_map, parameters.localizer)
        self._component = RefinerComponent(node, parameters, scene_map, stage, self._health)
        self._worker = LatestWorker("refiner", self._process, self._on_error)
        subscribe(node, {**FRAME_TOPICS, **COARSE_TOPICS}, StampJoiner(coarse_is_complete, self._on_coarse))

    def stop(self) -> None:
        self._worker.stop()

    def _on_coarse(self, messages: Messages) -> None:
        self._health.count("received")
        if self._worker.submit(messages):
            self._health.count("dropped")

    def _process(self, messages: Messages) -> None:
        packet = read_coarse(messages)
        check_camera(packet.camera, self._camera)
        self._component.accept(packet)

    def _on_error(self, error: Exception) -> None:
        self._health.fault(error)
        if not isinstance(error, FrameError):
            self._component.reset("an internal error")


def main() -> int:
    """Run ``refiner_node``."""
    return run_node("refiner_node", _RefinerApplication)


if __name__ == "__main__":
    raise SystemExit(main())
