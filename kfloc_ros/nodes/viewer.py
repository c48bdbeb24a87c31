# SPDX-License-Identifier: Apache-2.0
"""Live half of ``kfloc view``, a separate process: shows the topics of running nodes in the Rerun viewer.

python -m kfloc_ros.nodes.viewer --save FILE.rrd --ros-args -r __ns:=/robot
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Path
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import Image, PointCloud2
from visualization_msgs.msg import MarkerArray

from kfloc_ros.errors import KflocError
from kfloc_ros.messages.clouds import read_cloud
from kfloc_ros.messages.poses import pose_from_message, stamp_to_ns
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.adapters import decode
from kfloc_ros.nodes.health import read_values
from kfloc_ros.nodes.runtime import signals_set
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import (
    PATH_COLOUR,
    TRUTH_COLOUR,
    VIEWS_COLOUR,
    StateLog,
    begin,
    show_covariance,
)

_AXES = 0.15 * np.eye(3)
_NUMBERS = {"latency_ms": "latency_ms", "inliers": "inliers"}


class Viewer:
    """Subscriber that logs every visualization topic at its stamp."""

    def __init__(self, node: Node, recording: Recording) -> None:
        self._recording, self._states = recording, StateLog(recording)
        self._frames: dict[int, int] = {}
        self.received = 0
        """Number of messages received."""
        latched, newest = qos.latched(), qos.newest("best_effort")
        watched: tuple[tuple[type, str, Callable[[Any], None], Any], ...] = (
            (PointCloud2, "map_points", self._on_map, latched),
            (MarkerArray, "reference_views", self._on_views, latched),
            (PointCloud2, "scene_coordinates", self._on_cells, newest),
            (PoseWithCovarianceStamped, "pose", self._on_pose, qos.results()),
            (DiagnosticArray, "status", self._on_status, qos.results()),
            (Path, "path", lambda m: self._on_path("map/path", PATH_COLOUR, m), qos.results(1)),
            (Path, "ground_truth/path", lambda m: self._on_path("map/true_path", TRUTH_COLOUR, m), qos.results(1)),
            (Image, "overlay", lambda m: self._on_image("overlay", m), newest),
            (Image, "noise_image", lambda m: self._on_image("noise", m), newest),
            (Image, "flow_image", lambda m: self._on_image("flow", m), newest),
        )
        for kind, topic, handle, profile in watched:
            node.create_subscription(kind, topic, self._guarded(node, topic, handle), profile)

    def _guarded(self, node: Node, topic: str, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        def guarded(message: Any) -> None:
            self.received += 1
            try:
                handle(message)
            except (KflocError, ValueError) as error:  # a damaged message, from any publisher
                node.get_logger().warning(f"A message on '{topic}' is ignored: {error}", throttle_duration_sec=5.0)

        return guarded

    def _at(self, stamp: Any) -> None:
        stamp_ns = stamp_to_ns(stamp)
        self._recording.at(self._frames.setdefault(stamp_ns, len(self._frames)), stamp_ns)

    def _on_map(self, message: Any) -> None:
        cloud = read_cloud(message)
        self._recording.cloud("map/points", cloud.points, cloud.colours, radius_m=0.004, static=True)

    def _on_views(self, message: Any) -> None:
        for marker in message.markers:
            lines = np.array([[point.x, point.y, point.z] for point in marker.points]).reshape(-1, 2, 3)
            self._recording.lines("map/reference_views", lines, VIEWS_COLOUR, radius_m=0.001, static=True)

    def _on_cells(self, message: Any) -> None:
        self._at(message.header.stamp)
        cloud = read_cloud(message)
        self._recording.cloud("map/scene_coordinates", cloud.points, cloud.colours)

    def _on_pose(self, message: Any) -> None:
        self._at(message.header.stamp)
        T = pose_from_message(message.pose.pose)
        covariance = np.array(message.pose.covariance, dtype=np.float64).reshape(6, 6)
        origin = T[:3, 3]
        axes = np.stack([np.stack([origin, origin + T[:3, :3] @ arm]) for arm in _AXES])
        self._recording.lines("map/base", axes, np.uint8(255 * np.eye(3)), radius_m=0.006)
        show_covariance(self._recording, T, covariance)
        variance = float(np.trace(covariance[:3, :3]))
        if 0 <= variance < math.inf:
            self._recording.number("sigma_cm", 100 * math.sqrt(variance))

    def _on_status(self, message: Any) -> None:
        self._at(message.header.stamp)
        values = read_values(message)
        for key, entity in _NUMBERS.items():
            if key in values:
                self._recording.number(entity, float(values[key]))
        self._states.add(values.get("state", "?"), values.get("reason", ""))

    def _on_path(self, entity: str, colour: tuple[int, int, int], message: Any) -> None:
        self._at(message.header.stamp)
        points = np.array([[p.pose.position.x, p.pose.position.y, p.pose.position.z] for p in message.poses])
        if len(points) > 1:
            self._recording.lines(entity, points[None], colour)

    def _on_image(self, entity: str, message: Any) -> None:
        self._at(message.header.stamp)
        self._recording.picture(entity, decode(message), jpeg=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Show messages until SIGINT, SIGTERM or the end of --duration."""
    words = list(sys.argv if argv is None else ["viewer", *argv])
    parser = argparse.ArgumentParser(prog="python -m kfloc_ros.nodes.viewer", description=__doc__)
    parser.add_argument("--save", type=FilePath)
    parser.add_argument("--duration", type=float)
    args = parser.parse_args(remove_ros_args(words)[1:])
    try:
        recording = begin("live", None, args.save)
    except KflocError as error:
        sys.stderr.write(f"kfloc: {error}\n")
        return 2
    with recording, signals_set() as stop_requested:
        rclpy.init(args=words, signal_handler_options=SignalHandlerOptions.NO)
        node = rclpy.create_node("kfloc_view")
        viewer = Viewer(node, recording)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        end_s = math.inf if args.duration is None else time.monotonic() + args.duration
        try:
            while not stop_requested.is_set() and time.monotonic() < end_s:
                executor.spin_once(timeout_sec=0.1)
        finally:
            executor.shutdown()
            node.destroy_node()
            rclpy.try_shutdown()
    if not viewer.received:
        sys.stderr.write(
            "kfloc: No message was received. Check that the nodes run, with this ROS_DOMAIN_ID and this namespace.\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
