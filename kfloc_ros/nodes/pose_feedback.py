# SPDX-License-Identifier: Apache-2.0
"""Refined poses on their way back to the filter, between nodes in processes of their own: topic ``refined_pose``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.pose_messages import fill_pose, fill_stamp, pose_from_message, stamp_to_ns
from kfloc_ros.types import Matrix, PoseEstimate

TOPIC = "refined_pose"


@dataclass(frozen=True, eq=False)
class RefinedPose:
    """What the refiner found and stands by."""

    stamp_ns: int
    T_map_camera: Matrix


class FeedbackPublisher:
    """The refiner's end."""

    def __init__(self, node: Node, map_frame: str) -> None:
        self._publisher = node.create_publisher(PoseStamped, TOPIC, qos.results())
        self._map_frame = map_frame

    def __call__(self, estimate: PoseEstimate) -> None:
        """Send the pose back, if it is one to learn from."""
        refined = estimate.refined_pose
        if refined is None:
            return
        message = PoseStamped()
        fill_stamp(message.header.stamp, estimate.stamp_ns)
        message.header.frame_id = self._map_frame
        fill_pose(message.pose, refined)
        self._publisher.publish(message)


class FeedbackQueue:
    """The filter's end: poses wait here for the thread that filters."""

    def __init__(self, node: Node, warn: Callable[[str], None]) -> None:
        self._waiting: deque[RefinedPose] = deque(maxlen=8)
        self._warn = warn
        node.create_subscription(PoseStamped, TOPIC, self._receive, qos.results())

    def take(self) -> Iterator[RefinedPose]:
        """What came since the last call, in order."""
        while self._waiting:
            yield self._waiting.popleft()

    def _receive(self, message: PoseStamped) -> None:
        try:
            pose = pose_from_message(message.pose)
        except ValueError as error:
            self._warn(f"A refined_pose cannot be used: {error}")
            return
        self._waiting.append(RefinedPose(stamp_to_ns(message.header.stamp), pose))
