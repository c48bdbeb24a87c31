# SPDX-License-Identifier: Apache-2.0
"""Topics for eyes: made only for who subscribes, and in a thread of their own, so that no pose waits for a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from geometry_msgs.msg import Point
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import Image, PointCloud2, PointField
from visualization_msgs.msg import Marker, MarkerArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.place import MapInfo
from kfloc_ros.messages.clouds import fill_cloud
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame
from kfloc_ros.nodes.worker import Gate, LatestWorker
from kfloc_ros.types import PoseEstimate
from kfloc_ros.visualization.cells import flow_view, noise_view
from kfloc_ros.visualization.clouds import FRUSTUM_DEPTH_M, camera_symbols, cell_cloud, map_cloud
from kfloc_ros.visualization.overlay import OverlayPainter

PacketT = TypeVar("PacketT")


class View(NamedTuple, Generic[PacketT]):
    """A topic's message type, and what makes a message of a packet; None: there is nothing to see this time."""

    kind: type
    make: Callable[[PacketT], Any | None]


class Spectators(Generic[PacketT]):
    """Publishes views of packets; a packet that comes while the one before is being drawn may be left out.

    Args:
        name: of the thread, which begins when somebody first looks.
        views: by topic.
        warn: told of a view that could not be made, which is no fault of the localizer's.
    """

    def __init__(self, node: Node, name: str, views: Mapping[str, View[PacketT]], warn: Callable[[str], None]) -> None:
        self._views = [
            (topic, node.create_publisher(view.kind, topic, qos.results(1)), view.make) for topic, view in views.items()
        ]
        self._name, self._warn = name, warn
        self._worker: LatestWorker[PacketT] | None = None

    def offer(self, packet: PacketT) -> None:
        """Have a packet shown, if anybody looks; from one thread."""
        if not any(publisher.get_subscription_count() for _, publisher, _ in self._views):
            return
        if self._worker is None:
            self._worker = LatestWorker(self._name, self._publish, self._on_error)
        self._worker.submit(packet)

    def pause(self) -> None:
        """Forget the packet that waits, and let the one in work come to its end."""
        if self._worker is not None:
            self._worker.pause()

    def stop(self) -> None:
        """End the thread; after the last offer."""
        if self._worker is not None:
            self._worker.stop()

    def _publish(self, packet: PacketT) -> None:
        for _, publisher, make in self._views:
            if publisher.get_subscription_count():
                message = make(packet)
                if message is not None:
                    publisher.publish(message)

    def _on_error(self, error: Exception) -> None:
        self._warn(f"A picture for the topics of {self._name} could not be made: {type(error).__name__}: {error}")


def cell_publisher(node: Node, map_frame: str, warn: Callable[[str], None]) -> Spectators[CoarseFrame]:
    """What publishes the filter's views."""

    def scene_coordinates(packet: CoarseFrame) -> Any | None:
        coordinates = packet.result.scene_coordinates
        if coordinates is None:
            return None
        message = fill_cloud(PointCloud2(), cell_cloud(coordinates, packet.camera.frame.image), PointField)
        fill_stamp(message.header.stamp, packet.result.stamp_ns)
        message.header.frame_id = map_frame
        return message

    def image(view: Callable[[CoarseResult], NDArray[np.uint8] | None]) -> View[CoarseFrame]:
        def make(packet: CoarseFrame) -> Any | None:
            picture = view(packet.result)
            if picture is None:
                return None
            message = fill_image(Image(), picture)
            fill_stamp(message.header.stamp, packet.result.stamp_ns)
            message.header.frame_id = packet.camera.frame_id
            return message

        return View(Image, make)

    views = {
        "scene_coordinates": View(PointCloud2, scene_coordinates),
        "flow_image": image(flow_view),
        "noise_image": image(noise_view),
    }
    return Spectators(node, "cells", views, warn)


@dataclass(frozen=True, eq=False)
class Localized:
    """A frame with what was made of it."""

    camera: CameraFrame
    estimate: PoseEstimate
    features: BackboneFeatures


def overlay_publisher(node: Node, painter: OverlayPainter, warn: Callable[[str], None]) -> Spectators[Localized]:
    """What publishes ``overlay``."""

    def overlay(localized: Localized) -> Any:
        camera = localized.camera
        message = fill_image(Image(), painter.paint(camera.frame.image, localized.estimate, localized.features))
        fill_stamp(message.header.stamp, camera.frame.stamp_ns)
        message.header.frame_id = camera.frame_id
        return message

    return Spectators(node, "overlay", {"overlay": View(Image, overlay)}, warn)


_PERIOD_S = 0.5
_LINE_WIDTH_M = 0.004
_COLOUR = {"r": 0.85, "g": 0.35, "b": 0.15, "a": 0.8}


class MapPublisher:
    """Publishes what a map holds, once each."""

    def __init__(self, node: Node, scene_map: MapInfo, map_frame: str, gate: Gate) -> None:
        self._node, self._map, self._frame, self._gate = node, scene_map, map_frame, gate
        views: tuple[tuple[str, type, Callable[[], Any]], ...] = (
            ("map_points", PointCloud2, self._points),
            ("reference_views", MarkerArray, self._views),
        )
        self._waiting = [(node.create_publisher(kind, topic, qos.latched()), make) for topic, kind, make in views]
        # On the steady clock: a map can be looked at before there is any /clock.
        self._timer = node.create_timer(_PERIOD_S, self._look, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def _look(self) -> None:
        if not self._gate.active:
            return
        asked = [item for item in self._waiting if item[0].get_subscription_count()]
        for publisher, make in asked:
            publisher.publish(make())
            self._waiting.remove((publisher, make))
        if not self._waiting:
            self._timer.cancel()

    def _points(self) -> Any:
        message = fill_cloud(PointCloud2(), map_cloud(self._map), PointField)
        self._fill_header(message.header)
        return message

    def _views(self) -> Any:
        marker = Marker(ns="reference_views", type=Marker.LINE_LIST, action=Marker.ADD)
        self._fill_header(marker.header)
        marker.pose.orientation.w = 1.0
        marker.scale.x = _LINE_WIDTH_M
        for channel, value in _COLOUR.items():
            setattr(marker.color, channel, value)
        lines = camera_symbols(self._map.references.T_map_camera, self._map.camera, FRUSTUM_DEPTH_M)
        marker.points = [Point(x=x, y=y, z=z) for x, y, z in lines.reshape(-1, 3).tolist()]
        return MarkerArray(markers=[marker])

    def _fill_header(self, header: Any) -> None:
        # Stamp 0: true at any time, whatever the clock says.
        header.frame_id = self._frame
