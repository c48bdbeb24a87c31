# SPDX-License-Identifier: Apache-2.0
"""Publishes poses: ``pose``, ``/tf`` and ``path``, all of the base frame in the map."""

from __future__ import annotations

import math
import time
from collections import deque

from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped, TransformStamped
from nav_msgs.msg import Path
from rclpy.node import Node

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_messages import BodyPose, fill_pose, fill_pose_with_covariance, fill_stamp, fill_transform
from kfloc_ros.nodes.transforms import TransformUnknownError, make_broadcaster, make_lookup
from kfloc_ros.types import PoseEstimate

_PATH_PERIOD_S = 0.5


class PosePublisher:
    """Turns camera poses into messages about the base frame; never publishes one that is not sound."""

    def __init__(self, node: Node, parameters: ParameterServer, map_frame: str, health: Health) -> None:
        self._parameters, self._map_frame, self._health = parameters, map_frame, health
        self._lookup = make_lookup(node, health.warn)
        self._broadcast = make_broadcaster(node)
        self._poses = node.create_publisher(PoseWithCovarianceStamped, "pose", qos.results())
        self._paths = node.create_publisher(Path, "path", qos.results(1))
        self._path: deque[PoseStamped] = deque()
        self._path_sent_s = -math.inf

    def publish(self, estimate: PoseEstimate, camera_frame: str) -> str:
        """Publish the pose in an estimate; returns why there is none to publish, or empty."""
        if estimate.T_map_camera is None:
            return estimate.reason or "no pose"
        if estimate.covariance is None:
            return "the pose has no covariance"
        body = BodyPose(estimate.T_map_camera, estimate.covariance)
        base_frame = self._parameters.node.base_frame or camera_frame
        if base_frame != camera_frame:
            try:
                body = body.moved(self._lookup.lookup(camera_frame, base_frame, estimate.stamp_ns))
            except TransformUnknownError as error:
                self._health.warn(str(error))
                return str(error)
        fault = body.fault()
        if fault:
            self._health.warn(f"A pose was held back: {fault}.")
            return fault
        self._publish_pose(estimate.stamp_ns, body)
        if self._parameters.node.publish_tf:
            self._publish_tf(estimate.stamp_ns, body, base_frame)
        self._publish_path(estimate.stamp_ns, body)
        return ""

    def clear(self) -> None:
        """Begin a new path."""
        self._path.clear()

    def _publish_pose(self, stamp_ns: int, body: BodyPose) -> None:
        message = PoseWithCovarianceStamped()
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = self._map_frame
        fill_pose_with_covariance(message.pose, body, diagonal=self._parameters.node.diagonal_covariance)
        self._poses.publish(message)

    def _publish_tf(self, stamp_ns: int, body: BodyPose, base_frame: str) -> None:
        if not base_frame:
            self._health.warn(
                "No transform is broadcast: the images have no frame_id. Have the camera driver name one."
            )
            return
        message = TransformStamped()
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id, message.child_frame_id = self._map_frame, base_frame
        fill_transform(message.transform, body.T_map_body)
        self._broadcast(message)

    def _publish_path(self, stamp_ns: int, body: BodyPose) -> None:
        pose = PoseStamped()
        fill_stamp(pose.header.stamp, stamp_ns)
        pose.header.frame_id = self._map_frame
        fill_pose(pose.pose, body.T_map_body)
        self._path.append(pose)
        while len(self._path) > self._parameters.node.path_length:
            self._path.popleft()
        # A thousand poses take ten milliseconds and more to send: only for those who look, and not too often.
        now_s = time.monotonic()
        if now_s - self._path_sent_s < _PATH_PERIOD_S or self._paths.get_subscription_count() == 0:
            return
        self._path_sent_s = now_s
        if self._path:
            message = Path(poses=list(self._path))
            message.header = pose.header
            self._paths.publish(message)
