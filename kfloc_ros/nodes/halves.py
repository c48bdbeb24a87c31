# SPDX-License-Identifier: Apache-2.0
"""``filter_node`` and ``refiner_node``: the two halves of the localizer, each in a process of its own.

``filter_node`` turns frames into coarse poses; ``refiner_node`` turns frames and coarse poses into poses.
"""

from __future__ import annotations

from typing import ClassVar

from rclpy.node import Node
from sensor_msgs.msg import CompressedImage

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.place_localizer import preparer
from kfloc_ros.maps.place import AnyMap, single_map
from kfloc_ros.messages import features
from kfloc_ros.nodes.adapters import Messages
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, Report
from kfloc_ros.nodes.handover import (
    CameraFrame,
    CoarseFrame,
    CoarsePublisher,
    FeaturesPublisher,
    FeedbackPublisher,
    FeedbackQueue,
    join_coarse,
    join_frames,
    read_coarse,
    read_frame,
)
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.localizer_stage import PoseOutput, Prepared
from kfloc_ros.nodes.managed_node import tell_runtime, warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.views import cell_publisher
from kfloc_ros.nodes.worker import EnableSwitch, LatestQueue, TimeWatch


class FilterStage:
    """Coarse half of the localizer in a node of its own."""

    ONE_MAP_ONLY: ClassVar[bool] = True
    """A place of several maps is refused."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        scene_map = single_map(scene_map)
        self._health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = Localizer(scene_map, parameters.localizer)
        tell_runtime(self._health, self._localizer.runtime_note)
        map_frame = parameters.node.map_frame or scene_map.frame_id
        self._publish = CoarsePublisher(node, map_frame, lambda: self._health.counters, for_refiner=True)
        self._publish_features = FeaturesPublisher(node)
        self._cells = cell_publisher(node, map_frame, self._health.warn)
        self._watch = TimeWatch(node)
        self._prepare_ahead = preparer(self._localizer)
        self._queue = LatestQueue("filter", self._health, switch, parameters, self._process, self._localizer.reset)
        self._frames = LatestQueue("frames", self._health, switch, parameters, self._prepare)
        self._diagnostics = DiagnosticsPublisher(node, self._health, switch, scene_map.name, Report)
        self._feedback = FeedbackQueue(node, self._health.warn)
        join_frames(node, self._frames.offer)

    def pause(self) -> None:
        self._frames.pause()
        self._queue.pause()
        self._cells.pause()

    def stop(self) -> None:
        self._frames.stop()
        self._queue.stop()
        self._cells.stop()

    def request_reset(self, reason: str) -> None:
        """Request that the next frame starts without a prior. Thread-safe."""
        self._watch.request_reset(reason)

    def _prepare(self, messages: Messages) -> None:
        """Read a frame and run the networks on it, beside the frame before."""
        camera_frame = read_frame(messages)
        check_camera(camera_frame, self._localizer.camera)
        with self._queue.helpers(others_idle=not self._feedback.refiner_is_busy):
            ahead = None if self._prepare_ahead is None else self._prepare_ahead(camera_frame.frame)
        prepared = Prepared(camera_frame, ahead)

        def help_with() -> None:
            if ahead is not None:  # the refiner's process reads them meanwhile
                self._publish_features(camera_frame, ahead.features)
            prepared.help()

        self._queue.hand_over(prepared, help_with)

    def _process(self, prepared: Prepared) -> None:
        camera_frame = prepared.camera_frame
        for refined in self._feedback.take():
            self._localizer.correct_belief(refined.stamp_ns, refined.T_map_camera)
        reason = self._watch.reset_reason(camera_frame.frame.stamp_ns)
        if reason:
            self._localizer.reset(reason)
        coarse = CoarseFrame(camera_frame, self._localizer.coarse_half(camera_frame.frame, ahead=prepared.ahead))
        if prepared.ahead is None:
            self._publish_features(camera_frame, coarse.result.features)
        self._feedback.expect(coarse.result.stamp_ns)
        self._publish(coarse)
        self._cells.offer(coarse)
        self._health.count_processed(camera_frame.latency_ms())


def check_camera(camera_frame: CameraFrame, expected: Camera) -> None:
    """Refuse a received frame that is not of the map's camera.

    Raises:
        FrameError: the frame is of another camera.
    """
    if camera_frame.frame.camera != expected:
        raise FrameError(
            "A frame is not of this map's camera; give camera_node, filter_node and refiner_node the same map."
        )


class RefinerStage:
    """Refine half of the localizer in a node of its own."""

    ONE_MAP_ONLY: ClassVar[bool] = True
    """A place of several maps is refused."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        scene_map = single_map(scene_map)
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = Localizer(scene_map, parameters.localizer)
        features.warm_up(CompressedImage(), self._localizer.camera)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, switch)
        self._send_back = FeedbackPublisher(node, parameters.node.map_frame or scene_map.frame_id)
        self._queue = LatestQueue("refiner", health, switch, parameters, self._process, self._output.reset)
        join_coarse(node, self._queue.offer)

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
        starts = self._output.begin(coarse.camera)
        localization = self._localizer.refine_half(coarse.camera.frame, coarse.result, starts.hints, starts.predicted)
        self._send_back(self._output.publish(coarse.camera, localization))
