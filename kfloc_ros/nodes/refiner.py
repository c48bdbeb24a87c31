# SPDX-License-Identifier: Apache-2.0
"""``refiner_node``: subscribes to frames and coarse poses and publishes poses."""

from __future__ import annotations

from typing import ClassVar

from rclpy.node import Node

from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.place import AnyMap, single_map
from kfloc_ros.nodes.filter import check_camera
from kfloc_ros.nodes.handover import (
    COARSE_TOPICS,
    FRAME_TOPICS,
    FeedbackPublisher,
    Messages,
    StampJoiner,
    coarse_is_complete,
    read_coarse,
    subscribe,
)
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.localizer_stage import PoseOutput
from kfloc_ros.nodes.managed_node import warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import EnableSwitch, LatestQueue


class RefinerStage:
    """Refine half of the localizer in a node of its own."""

    ONE_MAP_ONLY: ClassVar[bool] = True
    """A place of several maps is refused."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        scene_map = single_map(scene_map)
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = Localizer(scene_map, parameters.localizer)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, switch)
        self._send_back = FeedbackPublisher(node, parameters.node.map_frame or scene_map.frame_id)
        self._queue = LatestQueue("refiner", health, switch, parameters, self._process, self._output.reset)
        subscribe(node, {**FRAME_TOPICS, **COARSE_TOPICS}, StampJoiner(coarse_is_complete, self._queue.offer))

    def pause(self) -> None:
        self._queue.pause()
        self._output.pause()

    def stop(self) -> None:
        self._queue.stop()
        self._output.stop()

    def request_reset(self, reason: str) -> None:
        self._output.request_reset(reason)

    def _process(self, messages: Messages) -> None:
        coarse = read_coarse(messages)
        check_camera(coarse.camera, self._localizer.camera)
        hints = self._output.begin(coarse.camera)
        localization = self._localizer.refine_half(coarse.camera.frame, coarse.result, hints)
        self._send_back(self._output.publish(coarse.camera, localization))
