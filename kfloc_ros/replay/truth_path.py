# SPDX-License-Identifier: Apache-2.0
"""``ground_truth/path``: the true path as far as it was played, for who looks on at a replay. Imports rclpy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.pose_messages import fill_pose, fill_stamp
from kfloc_ros.types import Matrix

PERIOD_S = 0.5
MAX_POSES = 5000
"""The path is thinned to so many; sending them takes some ten milliseconds."""


class TruthPath:
    """Publishes the truth up to the image that is being played, while somebody subscribes.

    Args:
        frame_id: of the map.
        truth: ``T_map_camera`` by stamp in nanoseconds.
    """

    def __init__(self, node: Node, frame_id: str, truth: Mapping[int, Matrix]) -> None:
        self._frame_id, self._truth, self._stamps = frame_id, truth, sorted(truth)
        self._publisher = node.create_publisher(Path, "ground_truth/path", qos.results(1))
        self._sent_s = -math.inf

    def show(self, stamp_ns: int) -> None:
        """Publish the path up to a time, unless that was done just before or nobody looks."""
        now_s = time.monotonic()
        if now_s - self._sent_s < PERIOD_S or not self._stamps or not self._publisher.get_subscription_count():
            return
        self._sent_s = now_s
        past = [known_ns for known_ns in self._stamps if known_ns <= stamp_ns]
        message = Path()
        message.header.frame_id = self._frame_id
        fill_stamp(message.header.stamp, stamp_ns)
        for known_ns in past[:: -(-len(past) // MAX_POSES) or 1]:
            pose = PoseStamped(header=message.header)
            fill_pose(pose.pose, self._truth[known_ns])
            message.poses.append(pose)
        self._publisher.publish(message)
