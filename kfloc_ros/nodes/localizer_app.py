# SPDX-License-Identifier: Apache-2.0
"""The three components in one node: frames and features are handed over in memory."""

from __future__ import annotations

from rclpy.node import Node

from kfloc_ros.localization.place_localizer import localizer_for
from kfloc_ros.maps.place import AnyMap
from kfloc_ros.nodes.camera import CameraComponent
from kfloc_ros.nodes.filter import FilterComponent
from kfloc_ros.nodes.handover import CoarseFrame, CoarsePublisher
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.managed_node import warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.refiner import RefinerComponent
from kfloc_ros.nodes.views import cell_publisher
from kfloc_ros.nodes.worker import Gate
from kfloc_ros.types import PoseEstimate


class LocalizerApplication:
    """Camera, filter and refiner, one after the other in the camera's worker thread."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, gate: Gate) -> None:
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        localizer = localizer_for(scene_map, parameters.localizer)
        if localizer.coarse.note:
            health.warn(localizer.coarse.note)
        map_frame = parameters.node.map_frame or scene_map.frame_id
        publish_coarse = CoarsePublisher(node, map_frame, lambda: health.counters, for_refiner=False)
        self._refiner = RefinerComponent(node, parameters, scene_map, localizer.refine, health, gate)
        self._filter = FilterComponent(
            node, localizer.coarse, publish_coarse, self._refine_and_show, self._refiner.track
        )
        self._cells = cell_publisher(node, map_frame, health.warn)
        # The camera comes last: whoever sees its subscriptions knows that everything else is ready.
        self._camera = CameraComponent(
            node, parameters, localizer.camera, health, gate, self._filter.accept, on_failure=localizer.reset
        )

    def pause(self) -> None:
        self._camera.pause()
        self._cells.pause()
        self._refiner.pause()

    def stop(self) -> None:
        self._camera.stop()
        self._cells.stop()
        self._refiner.stop()

    def start_anew(self, reason: str) -> None:
        self._camera.start_anew()
        self._filter.start_anew(reason)
        self._refiner.start_anew(reason)

    def _refine_and_show(self, packet: CoarseFrame) -> PoseEstimate:
        estimate = self._refiner.accept(packet)
        self._cells.offer(packet)  # the pose first
        return estimate
