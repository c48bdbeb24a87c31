# SPDX-License-Identifier: Apache-2.0
"""The filter component, frames to coarse poses, and the node of its own around it."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.coarse import CoarseStage
from kfloc_ros.localization.stages import CoarseSteps, Observation
from kfloc_ros.maps.place import AnyMap, single_map
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, Report
from kfloc_ros.nodes.handover import (
    FRAME_TOPICS,
    CameraFrame,
    CoarseFrame,
    CoarsePublisher,
    FeedbackQueue,
    Messages,
    StampJoiner,
    frame_is_complete,
    read_frame,
    subscribe,
)
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.managed_node import warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.time_watch import TimeWatch
from kfloc_ros.nodes.views import cell_publisher
from kfloc_ros.nodes.worker import Gate, Intake
from kfloc_ros.types import PoseEstimate


class FilterComponent:
    """Takes frames, publishes ``coarse_pose`` and gives coarse frames to ``output``, in the caller's thread.

    The stage learns from what ``output`` makes of a coarse pose, if it says so.
    Where ``track`` answers a frame after the backbone alone, it has no coarse pose.
    """

    def __init__(
        self,
        node: Node,
        stage: CoarseSteps,
        publish: Callable[[CoarseFrame], None],
        output: Callable[[CoarseFrame], PoseEstimate | None] = lambda packet: None,
        track: Callable[[CameraFrame, Observation], bool] = lambda packet, observation: False,
    ) -> None:
        self._stage, self._publish, self._output, self._track = stage, publish, output, track
        self._watch = TimeWatch(node)

    def accept(self, packet: CameraFrame) -> None:
        """Work on one frame. Raises FrameError for one that cannot be used."""
        reason = self._watch.reset_reason(packet.frame.stamp_ns)
        if reason:
            self._stage.reset(reason)
        observation = self._stage.observe(packet.frame)
        if self._track(packet, observation):
            self._stage.pass_by(packet.frame.stamp_ns, observation)
            return
        coarse = CoarseFrame(packet, self._stage.process(packet.frame, observation))
        self._publish(coarse)
        estimate = self._output(coarse)
        if estimate is not None and estimate.refined_pose is not None:
            self._stage.learn(estimate.stamp_ns, estimate.refined_pose)

    def start_anew(self, reason: str) -> None:
        """Have the next frame stand on its own; for any thread."""
        self._watch.start_anew(reason)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames; in the thread that calls ``accept``."""
        self._stage.reset(reason)


class FilterApplication:
    """The filter component as a node of its own: frames come in over topics, coarse poses go out."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, gate: Gate) -> None:
        scene_map = single_map(scene_map)
        self._health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        stage = CoarseStage(scene_map, parameters.localizer)
        if stage.note:
            self._health.warn(stage.note)
        self._stage, self._camera = stage, stage.camera
        map_frame = parameters.node.map_frame or scene_map.frame_id
        publish = CoarsePublisher(node, map_frame, lambda: self._health.counters, for_refiner=True)
        self._cells = cell_publisher(node, map_frame, self._health.warn)
        self._component = FilterComponent(node, stage, publish, self._cells.offer)
        self._intake = Intake("filter", self._health, gate, parameters, self._process, self._component.reset)
        self._diagnostics = DiagnosticsPublisher(node, self._health, gate, scene_map.name, Report)
        self._feedback = FeedbackQueue(node, self._health.warn)
        subscribe(node, FRAME_TOPICS, StampJoiner(frame_is_complete, self._intake.offer))

    def pause(self) -> None:
        self._intake.pause()
        self._cells.pause()

    def stop(self) -> None:
        self._intake.stop()
        self._cells.stop()

    def start_anew(self, reason: str) -> None:
        self._component.start_anew(reason)

    def _process(self, messages: Messages) -> None:
        packet = read_frame(messages)
        check_camera(packet, self._camera)
        for refined in self._feedback.take():
            self._stage.learn(refined.stamp_ns, refined.T_map_camera)
        self._component.accept(packet)
        self._health.answered(packet.latency_ms())


def check_camera(packet: CameraFrame, expected: Camera) -> None:
    """Raises FrameError if a frame that came over topics is not of the map's camera."""
    if packet.frame.camera != expected:
        raise FrameError(
            "A frame is not of this map's camera; camera_node, filter_node and refiner_node must be given the same map."
        )
