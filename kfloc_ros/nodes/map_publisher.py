# SPDX-License-Identifier: Apache-2.0
"""The map for eyes, ``map_points`` and ``reference_views``: made when somebody first asks, kept for who comes late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geometry_msgs.msg import Point
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import PointCloud2, PointField
from visualization_msgs.msg import Marker, MarkerArray

from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.cloud_messages import fill_cloud
from kfloc_ros.nodes.gate import Gate
from kfloc_ros.visualization.clouds import FRUSTUM_DEPTH_M, camera_symbols, map_cloud

_PERIOD_S = 0.5
_LINE_WIDTH_M = 0.004
_COLOUR = {"r": 0.85, "g": 0.35, "b": 0.15, "a": 0.8}


class MapPublisher:
    """Publishes what a map holds, once each."""

    def __init__(self, node: Node, scene_map: MapOutline, map_frame: str, gate: Gate) -> None:
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
