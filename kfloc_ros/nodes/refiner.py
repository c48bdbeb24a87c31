# SPDX-License-Identifier: Apache-2.0
"""``refiner_node``, and the output of poses that it shares with the composed node."""

from __future__ import annotations

import time
from dataclasses import replace

from rclpy.node import Node

from kfloc_ros.device import choose_device
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.place_localizer import AnyLocalizer
from kfloc_ros.localization.results import Localization
from kfloc_ros.maps.place import AnyMap, MapInfo, single_map
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, StatusPublisher
from kfloc_ros.nodes.filter import check_camera
from kfloc_ros.nodes.handover import (
    COARSE_TOPICS,
    FRAME_TOPICS,
    CameraFrame,
    FeedbackPublisher,
    Messages,
    StampJoiner,
    coarse_is_complete,
    read_coarse,
    subscribe,
)
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.initial_pose import InitialPoseInput
from kfloc_ros.nodes.managed_node import RESET, warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_file import PoseKeeper
from kfloc_ros.nodes.pose_publisher import PosePublisher
from kfloc_ros.nodes.time_watch import WENT_BACKWARDS, TimeWatch
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.views import Localized, MapPublisher, overlay_publisher
from kfloc_ros.nodes.worker import Gate, Intake
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState
from kfloc_ros.visualization.overlay import OverlayPainter


class PoseOutput:
    """Localizations in; ``pose``, ``/tf``, ``path``, ``status``, ``overlay`` and ``/diagnostics`` out.

    It also keeps what poses may start from: ``initialpose`` and the saved pose.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        scene_map: MapInfo,
        localizer: AnyLocalizer,
        health: Health,
        gate: Gate,
    ) -> None:
        self._localizer, self._health = localizer, health
        map_frame = parameters.node.map_frame or scene_map.frame_id
        listener = TransformListener(node, health.warn, reliability=parameters.node.tf_reliability)
        self._publisher = PosePublisher(node, parameters, map_frame, listener, health, gate)
        self._keeper = PoseKeeper(node, parameters, scene_map, health)
        self._initial = InitialPoseInput(
            node, parameters, map_frame, scene_map.references.T_map_camera, listener, health
        )
        self._status = StatusPublisher(node, scene_map.name, health)
        self._watch = TimeWatch(node)
        self._map = MapPublisher(node, scene_map, map_frame, gate)
        options = parameters.localizer
        painter = OverlayPainter(
            lambda: localizer.references,
            scene_map.camera,
            count=options.num_references,
            device=choose_device(options.device),
        )
        self._overlay = overlay_publisher(node, painter, health.warn)
        self._diagnostics = DiagnosticsPublisher(node, health, gate, scene_map.name, lambda: self._status.report)

    def begin(self, packet: CameraFrame) -> list[Matrix]:
        """Reset what time demands, once a frame, and return the poses that the frame may start from."""
        stamp_ns = packet.frame.stamp_ns
        reason = self._watch.reset_reason(stamp_ns)
        if reason:
            self.reset(reason)
        return self._initial.take(packet.frame_id, stamp_ns, self._publisher.last) or self._keeper.take()

    def publish(self, packet: CameraFrame, localization: Localization) -> PoseEstimate:
        """Publish the result of a frame; in the thread that calls :meth:`begin`.

        Returns:
            The estimate as it was published; the odometry may have cast doubt on it.
        """
        estimate = localization.estimate
        self._initial.judge(estimate.T_map_camera is not None)
        start = time.perf_counter()
        outcome = self._publisher.publish(estimate, packet.frame_id)
        publish_ms = 1e3 * (time.perf_counter() - start)
        if outcome.doubted:
            estimate = replace(estimate, state=TrackingState.DEGRADED, reason=outcome.transform)
        self._keeper.offer(estimate)
        latency_ms = packet.latency_ms()
        self._health.answered(latency_ms)
        self._status.publish(packet, estimate, outcome, publish_ms, latency_ms)
        self._overlay.offer(Localized(packet, estimate, localization.features))
        return estimate

    def start_anew(self, reason: str) -> None:
        """Have the next frame stand on its own; for any thread."""
        self._watch.start_anew(reason)
        if reason == RESET:  # at once: no frame need ever come
            self._publisher.forget()
            self._keeper.forget()

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames; in the thread that calls :meth:`begin`."""
        self._localizer.reset(reason)
        if reason in (RESET, WENT_BACKWARDS):
            self._publisher.clear()

    def pause(self) -> None:
        """Let the picture in work come to its end; after the last frame."""
        self._overlay.pause()

    def stop(self) -> None:
        """Save what is to be saved; after the last frame."""
        self._overlay.stop()
        self._keeper.stop()


class RefinerApplication:
    """The refine half of the localizer as a node of its own: frames and coarse poses come in over topics."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, gate: Gate) -> None:
        scene_map = single_map(scene_map)
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = Localizer(scene_map, parameters.localizer)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, gate)
        self._send_back = FeedbackPublisher(node, parameters.node.map_frame or scene_map.frame_id)
        self._intake = Intake("refiner", health, gate, parameters, self._process, self._output.reset)
        subscribe(node, {**FRAME_TOPICS, **COARSE_TOPICS}, StampJoiner(coarse_is_complete, self._intake.offer))

    def pause(self) -> None:
        self._intake.pause()
        self._output.pause()

    def stop(self) -> None:
        self._intake.stop()
        self._output.stop()

    def start_anew(self, reason: str) -> None:
        self._output.start_anew(reason)

    def _process(self, messages: Messages) -> None:
        packet = read_coarse(messages)
        check_camera(packet.camera, self._localizer.camera)
        hints = self._output.begin(packet.camera)
        localization = self._localizer.refine_half(packet.camera.frame, packet.result, hints)
        self._send_back(self._output.publish(packet.camera, localization))
