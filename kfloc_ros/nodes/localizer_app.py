# SPDX-License-Identifier: Apache-2.0
"""``localizer``: camera, filter and refiner in one node, and the output of poses that ``refiner_node`` shares."""

from __future__ import annotations

import time
from dataclasses import replace

from rclpy.node import Node

from kfloc_ros.device import choose_device
from kfloc_ros.localization.place_localizer import AnyLocalizer, localizer_for
from kfloc_ros.localization.results import Localization
from kfloc_ros.maps.place import AnyMap, MapInfo
from kfloc_ros.nodes.camera import CameraComponent
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, StatusPublisher
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame, CoarsePublisher
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.initial_pose import InitialPoseInput
from kfloc_ros.nodes.managed_node import RESET, warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_file import PoseKeeper
from kfloc_ros.nodes.pose_publisher import PosePublisher
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.views import Localized, MapPublisher, cell_publisher, overlay_publisher
from kfloc_ros.nodes.worker import WENT_BACKWARDS, Gate, TimeWatch
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
        self._keeper = PoseKeeper(node, parameters, scene_map, health) if parameters.node.pose_file else None
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
        hints: list[Matrix] = []
        if self._initial.waiting is not None:
            hints = self._initial.take(packet.frame_id, stamp_ns, self._publisher.last)
        if not hints and self._keeper is not None:
            hints = self._keeper.take()
        return hints

    def publish(self, packet: CameraFrame, localization: Localization) -> PoseEstimate:
        """Publish the result of a frame; in the thread that calls :meth:`begin`.

        Returns:
            The estimate as it was published; the odometry may have cast doubt on it.
        """
        estimate = localization.estimate
        if self._initial.tried is not None:
            self._initial.judge(estimate.T_map_camera is not None)
        start = time.perf_counter()
        outcome = self._publisher.publish(estimate, packet.frame_id)
        publish_ms = 1e3 * (time.perf_counter() - start)
        if outcome.doubted:
            estimate = replace(estimate, state=TrackingState.DEGRADED, reason=outcome.transform)
        if self._keeper is not None:
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
            if self._keeper is not None:
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
        if self._keeper is not None:
            self._keeper.stop()


class LocalizerApplication:
    """Runs the localizer on every frame, in the camera's worker thread."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, gate: Gate) -> None:
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = localizer_for(scene_map, parameters.localizer)
        if self._localizer.note:
            health.warn(self._localizer.note)
        map_frame = parameters.node.map_frame or scene_map.frame_id
        self._publish_coarse = CoarsePublisher(node, map_frame, lambda: health.counters, for_refiner=False)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, gate)
        self._cells = cell_publisher(node, map_frame, health.warn)
        # The camera comes last: whoever sees its subscriptions knows that everything else is ready.
        self._camera = CameraComponent(
            node, parameters, self._localizer.camera, health, gate, self._process, on_failure=self._localizer.reset
        )

    def pause(self) -> None:
        self._camera.pause()
        self._cells.pause()
        self._output.pause()

    def stop(self) -> None:
        self._camera.stop()
        self._cells.stop()
        self._output.stop()

    def start_anew(self, reason: str) -> None:
        self._camera.start_anew()
        self._output.start_anew(reason)

    def _process(self, packet: CameraFrame) -> None:
        localization = self._localizer.process(packet.frame, self._output.begin(packet), correct=False)
        estimate = self._output.publish(packet, localization)  # the pose first
        self._localizer.correct_belief(estimate.stamp_ns, estimate.refined_pose)
        if localization.coarse is not None:
            coarse = CoarseFrame(packet, localization.coarse)
            self._publish_coarse(coarse)
            self._cells.offer(coarse)
