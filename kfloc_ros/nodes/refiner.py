# SPDX-License-Identifier: Apache-2.0
"""``refiner_node``: frames and coarse poses come in over topics, poses go out."""

from __future__ import annotations

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
from kfloc_ros.nodes.localizer_app import PoseOutput
from kfloc_ros.nodes.managed_node import warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import Gate, Intake


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
