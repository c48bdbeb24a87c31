# SPDX-License-Identifier: Apache-2.0
"""Subscribes to what the nodes publish and notes when it arrived. Imports rclpy; runs in the agent's process."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Path
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy

from kfloc_ros.messages.poses import fill_pose, fill_stamp, stamp_to_ns
from kfloc_ros.nodes import qos
from kfloc_ros.replay.recording import Played, PoseSeen, Recording, StatusSeen, TransformSeen
from kfloc_ros.types import Matrix

RESULTS = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=200, reliability=ReliabilityPolicy.RELIABLE)


class Recorder:
    """Fills a :class:`Recording` from the topics of the nodes; callbacks run in the executor's thread."""

    def __init__(self, node: Node, recording: Recording, map_frame: str) -> None:
        self._recording, self._map_frame = recording, map_frame
        self._lock = threading.Lock()
        self._last_arrival_s = time.monotonic()
        self._answered_ns: dict[int, int] = {}
        node.create_subscription(PoseWithCovarianceStamped, "pose", self._on_pose, RESULTS)
        node.create_subscription(PoseWithCovarianceStamped, "coarse_pose", self._on_coarse, RESULTS)
        node.create_subscription(DiagnosticArray, "status", self._on_status, RESULTS)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, RESULTS)
        try:
            from tf2_msgs.msg import TFMessage
        except ImportError:  # an environment without the underlay: the nodes cannot broadcast either
            node.get_logger().warning("tf2_msgs is not installed; /tf is not recorded.")
        else:
            node.create_subscription(TFMessage, "/tf", self._on_tf, RESULTS)

    @property
    def diagnosed(self) -> int:
        """How many names have been heard on /diagnostics."""
        with self._lock:
            return len(self._recording.diagnostics)

    def has_answer(self, played: Played) -> bool:
        """Whether a status for this image has arrived since it was published."""
        with self._lock:
            return self._answered_ns.get(played.stamp_ns, -1) >= played.sent_ns

    def quiet_s(self) -> float:
        """Seconds since the last result."""
        with self._lock:
            return time.monotonic() - self._last_arrival_s

    def _on_pose(self, message: Any) -> None:
        seen = _pose_seen(message, time.monotonic_ns())
        with self._lock:
            self._recording.poses.append(seen)
            self._last_arrival_s = time.monotonic()

    def _on_coarse(self, message: Any) -> None:
        seen = _pose_seen(message, time.monotonic_ns())
        with self._lock:
            self._recording.coarse.append(seen)

    def _on_status(self, message: Any) -> None:
        received_ns = time.monotonic_ns()
        stamp_ns = stamp_to_ns(message.header.stamp)
        values = {pair.key: pair.value for status in message.status for pair in status.values}
        with self._lock:
            self._recording.status.append(StatusSeen(stamp_ns, received_ns, values))
            self._answered_ns[stamp_ns] = received_ns
            self._last_arrival_s = time.monotonic()

    def _on_diagnostics(self, message: Any) -> None:
        with self._lock:
            for status in message.status:
                self._recording.diagnostics[status.name] = {pair.key: pair.value for pair in status.values}

    def _on_tf(self, message: Any) -> None:
        with self._lock:
            for transform in message.transforms:
                edge = f"{transform.header.frame_id} -> {transform.child_frame_id}"
                self._recording.transforms[edge] = self._recording.transforms.get(edge, 0) + 1
                if transform.header.frame_id == self._map_frame:
                    t, q = transform.transform.translation, transform.transform.rotation
                    stamp_ns = stamp_to_ns(transform.header.stamp)
                    seen = TransformSeen(transform.child_frame_id, stamp_ns, (t.x, t.y, t.z), (q.x, q.y, q.z, q.w))
                    self._recording.map_transforms.append(seen)


def _pose_seen(message: Any, received_ns: int) -> PoseSeen:
    p, q = message.pose.pose.position, message.pose.pose.orientation
    return PoseSeen(
        stamp_ns=stamp_to_ns(message.header.stamp),
        received_ns=received_ns,
        frame_id=message.header.frame_id,
        xyz=(p.x, p.y, p.z),
        xyzw=(q.x, q.y, q.z, q.w),
        covariance=tuple(float(value) for value in message.pose.covariance),
    )


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
