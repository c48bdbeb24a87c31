# SPDX-License-Identifier: Apache-2.0
"""Camera stage: converts image messages into frames of the map's camera; hosted by ``camera_node`` or ``localizer``."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kfloc_ros.bags.topics import COMPRESSED, RAW, Topic
from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.maps.place import MapInfo
from kfloc_ros.messages.camera_info import camera_from_info, check_view, in_words
from kfloc_ros.messages.images import decode_compressed, decode_depth_message
from kfloc_ros.messages.poses import StampGuard, stamp_to_ns
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.adapters import decode
from kfloc_ros.nodes.diagnostics import DiagnosticsPublisher, Report
from kfloc_ros.nodes.handover import CameraFrame, FramePublisher
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import EnableSwitch, LatestQueue, TimeWatch
from kfloc_ros.types import Frame

_FIRST_INFO_WAIT_S = 0.5
"""Wait for the first camera_info, in seconds: the first image may arrive shortly before it."""
_CHANGES, _CHANGES_S = 3, 10.0
"""Changes of the camera in a time, in seconds, that are no more those of one camera."""
_AHEAD_S = 0.5
"""Stamps further in the future than this, in seconds, cause a warning."""


_DEPTH_APART_S, _DEPTH_WAIT_S, _KEPT_DEPTHS = 0.02, 0.05, 8
"""Depth of an image: largest difference of the stamps, wait for it, in seconds, and number of kept messages."""


@dataclass(frozen=True, eq=False)
class _Arrival:
    """Image message with its time of receipt."""

    message: Any
    receipt_unix_ns: int


class DepthReceiver:
    """Receiver of depth images that are registered to the colour image, for the image of about the same time.

    Args:
        prefix: name of the camera in a rig, with a slash; empty: the only camera.
    """

    def __init__(self, node: Node, parameters: ParameterServer, health: Health, prefix: str) -> None:
        self._health, self._messages = health, deque[Any](maxlen=_KEPT_DEPTHS)
        self._arrived, self._expected = threading.Condition(), True
        config = parameters.node
        self._compressed = config.image_transport == "compressed"
        self._topic, kind = node.resolve_topic_name(f"{prefix}depth"), Image
        if self._compressed:
            self._topic, kind = f"{self._topic}/compressedDepth", CompressedImage
        profile = qos.newest(config.image_reliability)
        events = qos.on_mismatch(self._topic, "image_reliability", health.warn)
        node.create_subscription(kind, self._topic, self._on_depth, profile, event_callbacks=events)

    def near(self, stamp_ns: int, frame_id: str, adapter: ImageAdapter) -> NDArray[np.float32] | None:
        """Return the depth (H, W) of an image's time, of the adapter's target; None if there is none.

        The worker waits a moment for the depth image, unless none came for the image before either.
        """
        with self._arrived:
            found = self._arrived.wait_for(lambda: self._nearest(stamp_ns), _DEPTH_WAIT_S if self._expected else 0.0)
        self._expected = found is not None
        if found is None:
            self._health.warn(
                f"No depth image on '{self._topic}' is within {1e3 * _DEPTH_APART_S:.0f} ms of an image; the images "
                "are localized without depth."
            )
            return None
        own_frame = found.header.frame_id.lstrip("/")
        if "" not in (own_frame, frame_id) and own_frame != frame_id:
            self._health.warn(
                f"The depth images on '{self._topic}' are of the frame '{own_frame}', the images of '{frame_id}': they "
                "are not used. Publish depth that is registered to the colour image, such as aligned_depth_to_color."
            )
            return None
        try:
            return adapter.nearest(decode_depth_message(found, self._compressed))
        except FrameError as error:
            self._health.warn(
                f"A depth image on '{self._topic}' is not used, which must have the image's size. {error}"
            )
            return None

    def _on_depth(self, message: Any) -> None:
        with self._arrived:
            self._messages.append(message)
            self._expected = True
            self._arrived.notify_all()

    def _nearest(self, stamp_ns: int) -> Any:
        """Return the message that is nearest in time, or None."""
        apart_ns = {id(message): abs(stamp_to_ns(message.header.stamp) - stamp_ns) for message in self._messages}
        nearest = min(self._messages, key=lambda message: apart_ns[id(message)], default=None)
        return nearest if nearest is not None and apart_ns[id(nearest)] <= 1e9 * _DEPTH_APART_S else None


class ImageReceiver:
    """Receiver that subscribes to ``image`` and ``camera_info`` and passes frames to ``output``, in its own thread.

    Args:
        camera: pinhole camera of the map; images are undistorted and scaled to it.
        output: called with each frame; its exceptions are counted and logged here.
        name: name of the camera in a rig, which precedes its topics; empty: the only camera.
        on_failure: called with a reason after an internal error, so that the stages reset.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        camera: Camera,
        health: Health,
        switch: EnableSwitch,
        output: Callable[[CameraFrame], None],
        on_failure: Callable[[str], None] = lambda reason: None,
        name: str = "",
    ) -> None:
        self._clock, self._parameters, self._health = node.get_clock(), parameters, health
        self._target, self._output = camera, output
        self._camera: Camera | None = None
        self._changes: deque[float] = deque(maxlen=_CHANGES)
        self._info_frame = ""
        self._info_came = threading.Event()
        self._adapter = ImageAdapter(camera, camera)
        self._index = 0
        prefix = f"{name}/" if name else ""
        self._queue = LatestQueue(f"camera {name}".strip(), health, switch, parameters, self._process, on_failure)
        self._stamps = StampGuard(parameters.localizer.max_gap_s)
        self._watch = TimeWatch(node, on_jump=self._on_jump)

        config = parameters.node
        profile = qos.newest(config.image_reliability)
        info_profile = qos.newest(config.camera_info_reliability, config.camera_info_durability)
        self._info_topic = node.resolve_topic_name(f"{prefix}camera_info")
        parameter_names = "camera_info_reliability or camera_info_durability"
        events = qos.on_mismatch(self._info_topic, parameter_names, health.warn)
        node.create_subscription(CameraInfo, self._info_topic, self._on_info, info_profile, event_callbacks=events)
        self._node, self._hears_latched = node, config.camera_info_durability == "transient_local"
        self._depth = DepthReceiver(node, parameters, health, prefix) if parameters.localizer.use_depth else None
        topic, kind = node.resolve_topic_name(f"{prefix}image"), Image
        if config.image_transport == "compressed":
            # As image_transport does: the suffix is appended to the remapped name, so that remapping `image` is
            # enough.
            self._decode, topic, kind = decode_compressed, f"{topic}/compressed", CompressedImage
        else:
            self._decode = decode
        if Topic(topic, COMPRESSED if kind is CompressedImage else RAW, 0).is_rectified and not config.rectified:
            health.warn(
                f"'{topic}' is called rectified, and the parameter `rectified` is false: if its images are rectified, "
                "camera_info's K and distortion are not theirs, and poses will be wrong. Set `rectified` to true."
            )
        events = qos.on_mismatch(topic, "image_reliability", health.warn)
        node.create_subscription(kind, topic, self._on_image, profile, event_callbacks=events)

    def pause(self) -> None:
        """Discard the waiting image and wait until the current one is processed."""
        self._queue.pause()

    def stop(self) -> None:
        self._queue.stop()

    def reset(self) -> None:
        """Accept the next image regardless of its stamp: after a reset, the same bag may be played again."""
        self._stamps.forget()

    def _on_info(self, message: Any) -> None:
        try:
            camera = camera_from_info(message, rectified=self._parameters.node.rectified)
        except FrameError as error:
            self._health.warn(str(error))
            return
        if self._camera is not None and self._camera.is_other(camera):
            self._changes.append(time.monotonic())
            self._health.warn(
                f"The camera changes: '{self._info_topic}' said {in_words(self._camera)}, and now {in_words(camera)}. "
                "Did its zoom change, did its driver load a calibration late, or do two drivers publish there?"
            )
        self._camera = camera
        self._info_frame = message.header.frame_id.lstrip("/")
        self._info_came.set()

    def _on_image(self, message: Any) -> None:
        if self._camera is None and not self._hears_latched:
            self._hear_latched()
        self._queue.offer(_Arrival(message, time.time_ns()))

    def _hear_latched(self) -> None:
        """Subscribe to a camera_info that was latched before, if there is one; the executor's thread only.

        Not at once: publishers that do not latch would warn of a subscription that asks for it.
        """
        offers = self._node.get_publishers_info_by_topic(self._info_topic)
        if any(offer.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers):
            self._hears_latched = True
            self._node.create_subscription(CameraInfo, self._info_topic, self._on_info, qos.latched())

    def _on_jump(self) -> None:
        self._stamps.forget()
        self._queue.discard()

    def _process(self, arrival: _Arrival) -> None:
        """Process one image. Raises FrameError for an image that cannot be used."""
        message = arrival.message
        stamp_ns = stamp_to_ns(message.header.stamp)
        if self._is_too_old(stamp_ns) or self._is_out_of_order(stamp_ns):
            self._health.count("dropped")
            return
        start = time.perf_counter()
        image = self._decode(message)
        decoded = time.perf_counter()
        adapter = self._adapter_for(image.shape[1], image.shape[0])
        frame_id = message.header.frame_id.lstrip("/")
        self._check_frame(frame_id)
        depth_m = None if self._depth is None else self._depth.near(stamp_ns, frame_id, adapter)
        frame = Frame(
            adapter(image), self._target, stamp_ns, self._index, depth_m=depth_m, source_camera=adapter.source
        )
        timings = {"decode": 1e3 * (decoded - start), "rectify": 1e3 * (time.perf_counter() - decoded)}
        self._index += 1
        self._output(CameraFrame(frame, message.header.frame_id, arrival.receipt_unix_ns, timings))

    def _adapter_for(self, width: int, height: int) -> ImageAdapter:
        self._info_came.wait(_FIRST_INFO_WAIT_S)
        camera = self._camera
        if camera is None:
            raise FrameError(
                f"No usable camera_info was received on '{self._info_topic}', so images cannot be used. Check that "
                "the topic is published and that its K is filled in."
            )
        if len(self._changes) == _CHANGES and time.monotonic() - self._changes[0] < _CHANGES_S:
            raise FrameError(
                f"camera_info on '{self._info_topic}' changes again and again between cameras, the last of them "
                f"{in_words(camera)}: images are not used. Do two drivers publish there? Give each a topic of its own."
            )
        if (camera.width, camera.height) != (width, height):
            raise FrameError(
                f"An image is {width}x{height} but the last camera_info on '{self._info_topic}' is for "
                f"{camera.width}x{camera.height}; both must come from the same camera."
            )
        if self._adapter.source != camera:
            mismatch = check_view(camera, self._target)
            if mismatch:
                self._health.warn(mismatch)
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
                "Synchronize the clocks of the camera and of this machine."
            )
        if max_age_s == 0.0 or age_s <= max_age_s:
            return False
        self._health.warn(
            f"Images are dropped: they are {age_s:.1f} s old on this node's clock, more than max_age_s {max_age_s:g}. "
            "If they come from a bag, set use_sim_time and play it with --clock."
        )
        return True


class CameraStage:
    """Stage of ``camera_node``: publishes each frame on the ``frame/...`` topics."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: MapInfo, switch: EnableSwitch) -> None:
        self._health = Health(node.get_logger())
        self._publish = FramePublisher(node, lambda: self._health.counters)
        self._diagnostics = DiagnosticsPublisher(node, self._health, switch, scene_map.name, Report)
        self._receiver = ImageReceiver(node, parameters, scene_map.camera, self._health, switch, self._pass_on)

    def pause(self) -> None:
        self._receiver.pause()

    def stop(self) -> None:
        self._receiver.stop()

    def request_reset(self, reason: str) -> None:
        self._receiver.reset()

    def _pass_on(self, camera_frame: CameraFrame) -> None:
        self._publish(camera_frame)
        self._health.count_processed(camera_frame.latency_ms())
