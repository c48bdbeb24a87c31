# SPDX-License-Identifier: Apache-2.0
"""Visualization topics, made only for subscribers, and collected frames: in threads of their own; no pose waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from geometry_msgs.msg import Point
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import Image, PointCloud2, PointField
from visualization_msgs.msg import Marker, MarkerArray

from kfloc_ros.evaluation.collection import Collection, cost_limit
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.place import AnyMap, MapInfo
from kfloc_ros.messages.clouds import fill_cloud
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.adapters import encode
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.worker import EnableSwitch, LatestWorker
from kfloc_ros.types import Frame, Matrix, PoseEstimate
from kfloc_ros.visualization.cells import flow_view, noise_view
from kfloc_ros.visualization.clouds import FRUSTUM_DEPTH_M, camera_symbols, cell_cloud, map_cloud
from kfloc_ros.visualization.overlay import OverlayPainter

ItemT = TypeVar("ItemT")


class View(NamedTuple, Generic[ItemT]):
    """Message type of a visualization topic, and the function that makes its message; None: nothing to show."""

    kind: type
    make: Callable[[ItemT], Any | None]


class VisualizationPublisher(Generic[ItemT]):
    """Publisher of visualization topics; skips an item if the previous one is still being drawn.

    Args:
        name: name of the thread, which starts with the first subscriber.
        views: views by topic.
        warn: called with a sentence if a view could not be made; localization is not affected.
    """

    def __init__(self, node: Node, name: str, views: Mapping[str, View[ItemT]], warn: Callable[[str], None]) -> None:
        self._views = [
            (topic, node.create_publisher(view.kind, topic, qos.results(1)), view.make) for topic, view in views.items()
        ]
        self._name, self._warn = name, warn
        self._worker: LatestWorker[ItemT] | None = None

    def offer(self, item: ItemT) -> None:
        """Publish the views of an item if anybody subscribes; from one thread."""
        if not any(publisher.get_subscription_count() for _, publisher, _ in self._views):
            return
        if self._worker is None:
            self._worker = LatestWorker(self._name, self._publish, self._on_error)
        self._worker.submit(item)

    def pause(self) -> None:
        """Discard the waiting item and wait until the current one is published."""
        if self._worker is not None:
            self._worker.pause()

    def stop(self) -> None:
        """End the thread; after the last offer."""
        if self._worker is not None:
            self._worker.stop()

    def _publish(self, item: ItemT) -> None:
        for _, publisher, make in self._views:
            if publisher.get_subscription_count():
                message = make(item)
                if message is not None:
                    publisher.publish(message)

    def _on_error(self, error: Exception) -> None:
        self._warn(f"A picture for the topics of {self._name} could not be made: {type(error).__name__}: {error}")


def cell_publisher(node: Node, map_frame: str, warn: Callable[[str], None]) -> VisualizationPublisher[CoarseFrame]:
    """Return the publisher of the filter's visualization topics."""

    def scene_coordinates(coarse: CoarseFrame) -> Any | None:
        coordinates = coarse.result.scene_coordinates
        if coordinates is None:
            return None
        message = fill_cloud(PointCloud2(), cell_cloud(coordinates, coarse.camera.frame.image), PointField)
        fill_stamp(message.header.stamp, coarse.result.stamp_ns)
        message.header.frame_id = map_frame
        return message

    def image(view: Callable[[CoarseResult], NDArray[np.uint8] | None]) -> View[CoarseFrame]:
        def make(coarse: CoarseFrame) -> Any | None:
            picture = view(coarse.result)
            if picture is None:
                return None
            message = encode(picture)
            fill_stamp(message.header.stamp, coarse.result.stamp_ns)
            message.header.frame_id = coarse.camera.frame_id
            return message

        return View(Image, make)

    views = {
        "scene_coordinates": View(PointCloud2, scene_coordinates),
        "flow_image": image(flow_view),
        "noise_image": image(noise_view),
    }
    return VisualizationPublisher(node, "cells", views, warn)


@dataclass(frozen=True, eq=False)
class Localized:
    """Frame with its estimate and features."""

    camera: CameraFrame
    estimate: PoseEstimate
    features: BackboneFeatures


def overlay_publisher(
    node: Node, painter: OverlayPainter, warn: Callable[[str], None]
) -> VisualizationPublisher[Localized]:
    """Return the publisher of ``overlay``."""

    def overlay(localized: Localized) -> Any:
        camera = localized.camera
        message = encode(painter.paint(camera.frame.image, localized.estimate, localized.features))
        fill_stamp(message.header.stamp, camera.frame.stamp_ns)
        message.header.frame_id = camera.frame_id
        return message

    return VisualizationPublisher(node, "overlay", {"overlay": View(Image, overlay)}, warn)


class Collecting:
    """Writer of frames that the map lacks to ``collect_dir``; does nothing if that is empty.

    Args:
        parameters: options of the node.
        scene_map: map or place of the localizer.
        warn: called with a sentence when nothing more is collected.

    Raises:
        SourceError: ``collect_dir`` contains something else.
    """

    def __init__(self, parameters: NodeConfig, scene_map: AnyMap, warn: Callable[[str], None]) -> None:
        self._warn, self._worker = warn, None
        if not parameters.collect_dir:
            return
        folder = Path(parameters.collect_dir).expanduser()
        self._collection = Collection(folder, max_mb=parameters.collect_mb, max_cost=cost_limit(scene_map))
        self._worker = LatestWorker[tuple[Frame, PoseEstimate, Matrix | None]]("collect", self._offer, self._on_error)

    def offer(self, frame: Frame, estimate: PoseEstimate, predicted: Matrix | None = None) -> None:
        """Queue a localized frame with its prediction by odometry; one that is not written in time is left out."""
        if self._worker is not None:
            self._worker.submit((frame, estimate, predicted))

    def stop(self) -> None:
        """Finish the current frame and end the thread."""
        if self._worker is not None:
            self._worker.stop()

    def _offer(self, item: tuple[Frame, PoseEstimate, Matrix | None]) -> None:
        told = self._collection.problem
        self._collection.offer(*item)
        if self._collection.problem and not told:
            self._warn(f"No more frames are collected: {self._collection.problem}.")

    def _on_error(self, error: Exception) -> None:
        self._warn(f"A frame could not be collected: {type(error).__name__}: {error}")


_PERIOD_S = 0.5
_LINE_WIDTH_M = 0.004
_COLOUR = {"r": 0.85, "g": 0.35, "b": 0.15, "a": 0.8}


class MapPublisher:
    """Publisher of the map's points and reference views, once each."""

    def __init__(self, node: Node, scene_map: MapInfo, map_frame: str, switch: EnableSwitch) -> None:
        self._node, self._map, self._frame, self._switch = node, scene_map, map_frame, switch
        views: tuple[tuple[str, type, Callable[[], Any]], ...] = (
            ("map_points", PointCloud2, self._points),
            ("reference_views", MarkerArray, self._views),
        )
        self._waiting = [(node.create_publisher(kind, topic, qos.latched()), make) for topic, kind, make in views]
        # On the steady clock: a map can be shown before there is any /clock.
        self._timer = node.create_timer(
            _PERIOD_S, self._publish_subscribed, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )

    def _publish_subscribed(self) -> None:
        if not self._switch.active:
            return
        subscribed = [item for item in self._waiting if item[0].get_subscription_count()]
        for publisher, make in subscribed:
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
        # Stamp 0: valid at any time.
        header.frame_id = self._frame
