# SPDX-License-Identifier: Apache-2.0
"""The refiner component, coarse poses to the poses that are published, and the node of its own around it."""

from __future__ import annotations

import time
from dataclasses import replace

from rclpy.node import Node

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.localization.refine import RefineStage
from kfloc_ros.localization.stages import Observation, RefineSteps
from kfloc_ros.maps.place import AnyMap, MapInfo, single_map
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, StatusPublisher
from kfloc_ros.nodes.filter import check_camera
from kfloc_ros.nodes.handover import (
    COARSE_TOPICS,
    FRAME_TOPICS,
    CameraFrame,
    CoarseFrame,
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
from kfloc_ros.types import PoseEstimate, TrackingState
from kfloc_ros.visualization.overlay import OverlayPainter


class RefinerComponent:
    """Takes coarse frames and ``initialpose``; publishes ``pose``, ``/tf``, ``path``, ``status``, ``/diagnostics``."""

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        scene_map: MapInfo,
        stage: RefineSteps,
        health: Health,
        gate: Gate,
    ) -> None:
        self._stage, self._health = stage, health
        map_frame = parameters.node.map_frame or scene_map.frame_id
        listener = TransformListener(node, health.warn, reliability=parameters.node.tf_reliability)
        self._publisher = PosePublisher(node, parameters, map_frame, listener, health, gate)
        self._keeper = PoseKeeper(node, parameters, scene_map, health)
        self._initial = InitialPoseInput(
            node, parameters, map_frame, scene_map.references.T_map_camera, listener, health
        )
        self._status = StatusPublisher(node, scene_map.name, health)
        self._watch = TimeWatch(node)
        self._begun: CameraFrame | None = None
        self._map = MapPublisher(node, scene_map, map_frame, gate)
        options = parameters.localizer
        painter = OverlayPainter(
            lambda: stage.references,
            scene_map.camera,
            count=options.num_references,
            device=choose_device(options.device),
        )
        self._overlay = overlay_publisher(node, painter, health.warn)
        self._diagnostics = DiagnosticsPublisher(node, health, gate, scene_map.name, lambda: self._status.report)

    def track(self, packet: CameraFrame, observation: Observation) -> bool:
        """Answer a frame without a coarse pose where the stage can; False if it needs one. In the caller's thread."""
        self._begin(packet)
        estimate = self._stage.track(packet.frame, observation)
        if estimate is None:
            return False
        self._answer(packet, estimate, observation.features)
        return True

    def accept(self, packet: CoarseFrame) -> PoseEstimate:
        """Work on one frame, in the caller's thread. Raises FrameError for one that cannot be used."""
        if packet.camera is not self._begun:
            self._begin(packet.camera)
        estimate = self._stage.process(packet.camera.frame, packet.result)
        return self._answer(packet.camera, estimate, packet.result.features)

    def _begin(self, packet: CameraFrame) -> None:
        """What is due once a frame, before anything is made of it."""
        self._begun = packet
        stamp_ns = packet.frame.stamp_ns
        reason = self._watch.reset_reason(stamp_ns)
        if reason:
            self.reset(reason)
        starts = self._initial.take(packet.frame_id, stamp_ns, self._publisher.last)
        starts = starts or self._keeper.take()
        if starts:
            self._stage.suggest(starts)

    def _answer(self, packet: CameraFrame, estimate: PoseEstimate, features: BackboneFeatures) -> PoseEstimate:
        """Publish what became of a frame, and say it."""
        self._begun = None
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
        self._overlay.offer(Localized(packet, estimate, features))
        return estimate

    def start_anew(self, reason: str) -> None:
        """Have the next frame stand on its own; for any thread."""
        self._watch.start_anew(reason)
        if reason == RESET:  # at once: no frame need ever come
            self._publisher.forget()
            self._keeper.forget()

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames; in the thread that calls ``accept``."""
        self._stage.reset(reason)
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
    """The refiner component as a node of its own: frames and coarse poses come in over topics."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, gate: Gate) -> None:
        scene_map = single_map(scene_map)
        self._health = Health(node.get_logger())
        self._camera = scene_map.camera
        warm_up(scene_map, parameters.localizer)
        stage = RefineStage(scene_map, parameters.localizer)
        self._component = RefinerComponent(node, parameters, scene_map, stage, self._health, gate)
        self._send_back = FeedbackPublisher(node, parameters.node.map_frame or scene_map.frame_id)
        self._intake = Intake("refiner", self._health, gate, parameters, self._process, self._component.reset)
        subscribe(node, {**FRAME_TOPICS, **COARSE_TOPICS}, StampJoiner(coarse_is_complete, self._intake.offer))

    def pause(self) -> None:
        self._intake.pause()
        self._component.pause()

    def stop(self) -> None:
        self._intake.stop()
        self._component.stop()

    def start_anew(self, reason: str) -> None:
        self._component.start_anew(reason)

    def _process(self, messages: Messages) -> None:
        packet = read_coarse(messages)
        check_camera(packet.camera, self._camera)
        self._send_back(self._component.accept(packet))
