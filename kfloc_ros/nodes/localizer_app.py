# SPDX-License-Identifier: Apache-2.0
"""``localizer``: camera, filter and refiner in one node; frames and features are handed over in memory."""

from __future__ import annotations

from rclpy.node import Node

from kfloc_ros.localization.place_localizer import localizer_for
from kfloc_ros.maps.place import AnyMap
from kfloc_ros.nodes.camera import CameraComponent
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame, CoarsePublisher
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.managed_node import warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.refiner import PoseOutput
from kfloc_ros.nodes.views import cell_publisher
from kfloc_ros.nodes.worker import Gate


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
