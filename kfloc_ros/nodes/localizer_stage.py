# SPDX-License-Identifier: Apache-2.0
"""``localizer``: camera, filter and refiner in one node, and the pose output that ``refiner_node`` shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar

from rclpy.node import Node

from kfloc_ros.device import choose_device
from kfloc_ros.localization.place_localizer import AnyLocalizer, localizer_for
from kfloc_ros.localization.results import Localization
from kfloc_ros.maps.place import AnyMap, MapInfo
from kfloc_ros.nodes.camera import ImageReceiver
from kfloc_ros.nodes.diagnostics import NO_IMAGES, OFF, DiagnosticsPublisher, Report, StatusPublisher
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame, CoarsePublisher
from kfloc_ros.nodes.health import (
    WARN,
    Health,
)
from kfloc_ros.nodes.initial_pose import InitialPoseInput
from kfloc_ros.nodes.managed_node import RESET, tell_runtime, warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_file import PosePersistence
from kfloc_ros.nodes.pose_publisher import PosePublisher
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.views import Localized, MapPublisher, cell_publisher, overlay_publisher
from kfloc_ros.nodes.worker import WENT_BACKWARDS, EnableSwitch, TimeWatch
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState
from kfloc_ros.visualization.overlay import OverlayPainter


@dataclass(frozen=True, eq=False)
class Starts:
    """Start poses ``T_map_camera`` (4, 4) of a frame."""

    hints: list[Matrix]
    """From ``initialpose`` or the saved pose."""
    predicted: Matrix | None
    """By odometry from the last pose; None if it is not known."""


class PoseOutput:
    """Publisher of localizations on ``pose``, ``/tf``, ``path``, ``status``, ``overlay`` and ``/diagnostics``.

    It also holds the start poses for a frame: ``initialpose`` and the saved pose.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        scene_map: MapInfo,
        localizer: AnyLocalizer,
        health: Health,
        switch: EnableSwitch,
    ) -> None:
        self._localizer, self._health, self._switch = localizer, health, switch
        map_frame = parameters.node.map_frame or scene_map.frame_id
        listener = TransformListener(node, health.warn, reliability=parameters.node.tf_reliability)
        self._publisher = PosePublisher(node, parameters, map_frame, listener, health, switch)
        self._persistence = PosePersistence(node, parameters, scene_map, health) if parameters.node.pose_file else None
        self._initial = InitialPoseInput(
            node, parameters, map_frame, scene_map.references.T_map_camera, listener, health
        )
        self._status = StatusPublisher(node, scene_map.name, health)
        self._watch = TimeWatch(node)
        self._map = MapPublisher(node, scene_map, map_frame, switch)
        options = parameters.localizer
        painter = OverlayPainter(
            lambda: localizer.references,
            scene_map.camera,
            count=options.num_references,
            device=choose_device(options.device),
        )
        self._overlay = overlay_publisher(node, painter, health.warn)
        self._diagnostics = DiagnosticsPublisher(node, health, switch, scene_map.name, self._report)

    def begin(self, camera_frame: CameraFrame) -> Starts:
        """Reset if time or a service demands it, and return the start poses of the frame; once per frame."""
        stamp_ns = camera_frame.frame.stamp_ns
        reason = self._watch.reset_reason(stamp_ns)
        if reason:
            self.reset(reason)
        hints: list[Matrix] = []
        if self._initial.waiting is not None:
            hints = self._initial.take(camera_frame.frame_id, stamp_ns, self._publisher.last)
            self._publisher.allow_jump()
        if not hints and self._persistence is not None:
            hints = self._persistence.take()
        return Starts(hints, self._publisher.predict(camera_frame.frame_id, stamp_ns))

    def publish(self, camera_frame: CameraFrame, localization: Localization) -> PoseEstimate:
        """Publish the result of a frame; in the thread that calls :meth:`begin`.

        Returns:
            The estimate as published; DEGRADED if the odometry contradicts it.
        """
        estimate = localization.estimate
        if self._initial.tried is not None:
            self._initial.judge(estimate.T_map_camera is not None)
        start = time.perf_counter()
        outcome = self._publisher.publish(estimate, camera_frame.frame_id)
        publish_ms = 1e3 * (time.perf_counter() - start)
        if outcome.suspect:
            estimate = replace(estimate, state=TrackingState.DEGRADED, reason=outcome.suspect)
        if self._persistence is not None:
            self._persistence.offer(estimate)
        if self._localizer.camera_note:
            self._health.warn(f"The camera does not fit: {self._localizer.camera_note}.")
        latency_ms = camera_frame.latency_ms()
        self._health.count_processed(latency_ms)
        self._status.publish(camera_frame, estimate, outcome, publish_ms, latency_ms)
        self._overlay.offer(Localized(camera_frame, estimate, localization.features))
        return estimate

    def _report(self) -> Report:
        """Return the report for ``/diagnostics``, which also tells of a second localizer; once a second."""
        report, rival = self._status.report, self._publisher.rival()
        if not self._switch.is_on:
            self._status.send_state(OFF)
        elif not self._health.receives:
            self._status.send_state(NO_IMAGES)
        if not rival:
            return report
        self._health.warn(rival)
        return replace(report, level=max(report.level, WARN), message=rival)

    def request_reset(self, reason: str) -> None:
        """Request that the next frame starts without a prior. Thread-safe."""
        self._watch.request_reset(reason)
        self._publisher.allow_jump()
        if reason == RESET:  # at once: there may never be another frame
            self._publisher.reset_pose()
            if self._persistence is not None:
                self._persistence.delete()

    def reset(self, reason: str) -> None:
        """Discard the state carried over from earlier frames; in the thread that calls :meth:`begin`."""
        self._localizer.reset(reason)
        if reason in (RESET, WENT_BACKWARDS):
            self._publisher.reset()

    def pause(self) -> None:
        """Wait until the current overlay is published; after the last frame."""
        self._overlay.pause()

    def stop(self) -> None:
        """Save the last pose and end the threads; after the last frame."""
        self._overlay.stop()
        if self._persistence is not None:
            self._persistence.stop()


class LocalizerStage:
    """Localizer on every frame, in the camera's worker thread."""

    IS_WHOLE: ClassVar[bool] = True
    """The node needs no other node."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = localizer_for(scene_map, parameters.localizer)
        tell_runtime(health, self._localizer.runtime_note)
        map_frame = parameters.node.map_frame or scene_map.frame_id
        self._publish_coarse = CoarsePublisher(node, map_frame, lambda: health.counters, for_refiner=False)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, switch)
        self._cells = cell_publisher(node, map_frame, health.warn)
        # The camera comes last: once its subscriptions are visible, everything else is ready.
        self._camera = ImageReceiver(
            node, parameters, self._localizer.camera, health, switch, self._process, on_failure=self._localizer.reset
        )

    def pause(self) -> None:
        self._camera.pause()
        self._cells.pause()
        self._output.pause()

    def stop(self) -> None:
        self._camera.stop()
        self._cells.stop()
        self._output.stop()

    def request_reset(self, reason: str) -> None:
        self._camera.reset()
        self._output.request_reset(reason)

    def _process(self, camera_frame: CameraFrame) -> None:
        starts = self._output.begin(camera_frame)
        localization = self._localizer.process(
            camera_frame.frame, starts.hints, predicted=starts.predicted, correct=False
        )
        estimate = self._output.publish(camera_frame, localization)  # the pose first
        self._localizer.correct_belief(estimate.stamp_ns, estimate.refined_pose)
        if localization.coarse is not None:
            coarse = CoarseFrame(camera_frame, localization.coarse)
            self._publish_coarse(coarse)
            self._cells.offer(coarse)
