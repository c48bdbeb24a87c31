# SPDX-License-Identifier: Apache-2.0
"""The camera component, image messages to frames of the map's camera, and the node of its own around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kfloc_ros.bags.topics import COMPRESSED, RAW, Topic
from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.maps.place import MapInfo
from kfloc_ros.messages.camera_info import camera_from_info, check_view
from kfloc_ros.messages.images import decode_compressed, decode_image
from kfloc_ros.messages.poses import StampGuard, stamp_to_ns
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, Report
from kfloc_ros.nodes.handover import CameraFrame, FramePublisher
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import Gate, Intake, TimeWatch
from kfloc_ros.types import Frame

_FIRST_INFO_WAIT_S = 0.5
"""The first image may come just before the first camera_info."""
_AHEAD_S = 0.5
"""Stamps further in the future than this are worth a warning."""


@dataclass(frozen=True, eq=False)
class _Arrival:
    """An image message and when it came."""

    message: Any
    receipt_unix_ns: int


class CameraComponent:
    """Takes ``image`` and ``camera_info`` of a node and gives frames to ``output``, in its own thread.

    Args:
        camera: the pinhole camera of the map; images are undistorted and scaled to it.
        output: takes each frame; what it raises is counted and logged here.
        on_failure: told when something failed that should not have, so that stages start anew.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        camera: Camera,
        health: Health,
        gate: Gate,
        output: Callable[[CameraFrame], None],
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._clock, self._parameters, self._health = node.get_clock(), parameters, health
        self._target, self._output = camera, output
        self._camera: Camera | None = None
        self._info_frame = ""
        self._info_came = threading.Event()
        self._adapter = ImageAdapter(camera, camera)
        self._index = 0
        self._intake = Intake("camera", health, gate, parameters, self._process, on_failure)
        self._stamps = StampGuard(parameters.localizer.max_gap_s)
        self._watch = TimeWatch(node, on_jump=self._on_jump)

        config = parameters.node
        profile = qos.newest(config.image_reliability)
        info_profile = qos.newest(config.camera_info_reliability, config.camera_info_durability)
        self._info_topic = node.resolve_topic_name("camera_info")
        asked = "camera_info_reliability or camera_info_durability"
        events = qos.on_mismatch(self._info_topic, asked, health.warn)
        node.create_subscription(CameraInfo, "camera_info", self._on_info, info_profile, event_callbacks=events)
        topic, kind = node.resolve_topic_name("image"), Image
        if config.image_transport == "compressed":
            # As image_transport does: the suffix goes to the remapped name, so that remapping `image` is enough.
            self._decode, topic, kind = decode_compressed, f"{topic}/compressed", CompressedImage
        else:
            self._decode = decode_image
        if Topic(topic, COMPRESSED if kind is CompressedImage else RAW, 0).is_rectified and not config.rectified:
            health.warn(
                f"'{topic}' is called rectified, and the parameter `rectified` is false: if its images are rectified, "
                "camera_info's K and distortion are not theirs, and poses will be wrong. Set `rectified` to true."
            )
        events = qos.on_mismatch(topic, "image_reliability", health.warn)
        node.create_subscription(kind, topic, self._on_image, profile, event_callbacks=events)

    def pause(self) -> None:
        """Forget the image that waits, and let the one in work come to its end."""
        self._intake.pause()

    def stop(self) -> None:
        self._intake.stop()

    def start_anew(self) -> None:
        """Take the next image whatever its stamp: whoever asks for a new start may be playing the same bag again."""
        self._stamps.forget()

    def _on_info(self, message: Any) -> None:
        try:
            self._camera = camera_from_info(message, rectified=self._parameters.node.rectified)
        except FrameError as error:
            self._health.warn(str(error))
            return
        self._info_frame = message.header.frame_id.lstrip("/")
        self._info_came.set()

    def _on_image(self, message: Any) -> None:
        self._intake.offer(_Arrival(message, time.time_ns()))

    def _on_jump(self) -> None:
        self._stamps.forget()
        self._intake.discard()

    def _process(self, arrival: _Arrival) -> None:
        """Raises FrameError for an image that cannot be used."""
        message = arrival.message
        stamp_ns = stamp_to_ns(message.header.stamp)
        if self._is_too_old(stamp_ns) or self._is_out_of_order(stamp_ns):
            self._health.count("dropped")
            return
        start = time.perf_counter()
        image = self._decode(message)
        decoded = time.perf_counter()
        adapter = self._adapter_for(image.shape[1], image.shape[0])
        self._check_frame(message.header.frame_id.lstrip("/"))
        frame = Frame(image=adapter(image), camera=self._target, stamp_ns=stamp_ns, index=self._index)
        timings = {"decode": 1e3 * (decoded - start), "rectify": 1e3 * (time.perf_counter() - decoded)}
        self._index += 1
        self._output(CameraFrame(frame, message.header.frame_id, arrival.receipt_unix_ns, timings))

    def _adapter_for(self, width: int, height: int) -> ImageAdapter:
        self._info_came.wait(_FIRST_INFO_WAIT_S)
        camera = self._camera
        if camera is None:
            raise FrameError(
                f"No usable camera_info has come on '{self._info_topic}', so images cannot be used. "
                "Is the topic published, and its K filled in?"
            )
        if (camera.width, camera.height) != (width, height):
            raise FrameError(
                f"An image is {width}x{height} but the last camera_info on '{self._info_topic}' says "
                f"{camera.width}x{camera.height}; they must be of the same camera."
            )
        if self._adapter.source != camera:
            doubt = check_view(camera, self._target)
            if doubt:
                self._health.warn(doubt)
            self._adapter = ImageAdapter(camera, self._target)
        return self._adapter

    def _check_frame(self, frame_id: str) -> None:
        if "" not in (frame_id, self._info_frame) and frame_id != self._info_frame:
            self._health.warn(
                f"Images are of the frame '{frame_id}', camera_info on '{self._info_topic}' is of "
                f"'{self._info_frame}': is it the calibration of another camera? Remap camera_info to the images' own, "
                "or correct its frame_id."
            )

    def _is_out_of_order(self, stamp_ns: int) -> bool:
        fault = self._stamps.fault(stamp_ns)
        if fault:
            self._health.warn(f"An image is dropped: {fault}.")
        return bool(fault)

    def _is_too_old(self, stamp_ns: int) -> bool:
        max_age_s = self._parameters.node.max_age_s
        age_s = 1e-9 * (self._clock.now().nanoseconds - stamp_ns)
        if age_s < -_AHEAD_S:
            self._health.warn(
                f"Images are stamped {-age_s:.1f} s ahead of this node's clock, so TF is not known at their time. "
                "Have the camera's clock and this machine's follow the same source."
            )
        if max_age_s == 0.0 or age_s <= max_age_s:
            return False
        self._health.warn(
            f"Images are dropped: they are {age_s:.1f} s old on this node's clock, more than max_age_s {max_age_s:g}. "
            "If they come from a bag, set use_sim_time and play it with --clock."
        )
        return True


class CameraApplication:
    """The camera component as a node of its own: frames go out over topics."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: MapInfo, gate: Gate) -> None:
        self._health = Health(node.get_logger())
        self._publish = FramePublisher(node, lambda: self._health.counters)
        self._diagnostics = DiagnosticsPublisher(node, self._health, gate, scene_map.name, Report)
        self._component = CameraComponent(node, parameters, scene_map.camera, self._health, gate, self._hand_on)

    def pause(self) -> None:
        self._component.pause()

    def stop(self) -> None:
        self._component.stop()

    def start_anew(self, reason: str) -> None:
        self._component.start_anew()

    def _hand_on(self, packet: CameraFrame) -> None:
        self._publish(packet)
        self._health.answered(packet.latency_ms())
