# SPDX-License-Identifier: Apache-2.0
"""Publisher of ``pose`` and ``path``, and the last pose, which is published on while the camera is lost."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Path
from rclpy.node import Node

from kfloc_ros.geometry.covariance import planar_pose
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.messages.poses import BodyPose, fill_pose, fill_pose_with_covariance, fill_stamp
from kfloc_ros.messages.transforms import TransformUnknownError
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.odometry_publisher import OdometryPublisher
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.tf_publisher import TfPublisher
from kfloc_ros.nodes.transforms import KEEP_S, TransformListener
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState


class _Lookup(Protocol):
    def lookup(self, target: str, source: str, stamp_ns: int, wait_s: float = 0.0) -> Matrix: ...


_MAX_SIGMA_M = 1e4
"""Limit on the standard deviation, in metres: Nav2 refuses poses with a covariance beyond 1e9."""


@dataclass(frozen=True, eq=False)
class LastPose:
    """Last pose of the base frame, with its stamp."""

    stamp_ns: int
    base_frame: str
    body: BodyPose

    def travelled(self, transforms: _Lookup, odom_frame: str, stamp_ns: int, wait_s: float = 0.0) -> Matrix | None:
        """Return ``T_then_now`` of the base by odometry, or None if odometry does not know it after ``wait_s``."""
        return travelled(transforms, odom_frame, self.base_frame, self.stamp_ns, stamp_ns, wait_s)

    def grown(self, stamp_ns: int, growth: float, T_then_now: Matrix | None = None) -> BodyPose:
        """Return the pose at a later time: moved by ``T_then_now``, with standard deviations ``growth`` m/s and rad/s
        wider.
        """
        body = self.body if T_then_now is None else self.body.moved(T_then_now)
        wider = min(growth * max(stamp_ns - self.stamp_ns, 0) * 1e-9, _MAX_SIGMA_M)
        turned = min(wider, math.pi)  # a rotation is then unknown
        variances = np.array([wider**2] * 3 + [turned**2] * 3)
        return BodyPose(body.T_map_body, body.covariance + np.diag(variances))


def travelled(
    transforms: _Lookup, odom_frame: str, base_frame: str, since_ns: int, until_ns: int, wait_s: float = 0.0
) -> Matrix | None:
    """Return ``T_then_now`` of the base frame between two times by odometry, or None if odometry does not know it."""
    try:
        T_then_odom = transforms.lookup(base_frame, odom_frame, since_ns)
        return T_then_odom @ transforms.lookup(odom_frame, base_frame, until_ns, wait_s)
    except TransformUnknownError:
        return None


_PATH_PERIOD_S = 0.5
_ODOMETRY_WAIT_S = 0.02
"""Time, in seconds, that an image waits for the odometry that predicts its pose."""


@dataclass(frozen=True)
class Outcome:
    """Result of publishing an estimate."""

    pose: str = ""
    """Reason why no pose was published; empty if one was."""
    transform: str = ""
    """Reason why no transform was broadcast, or what is wrong with it; empty if it is sound or not requested."""
    suspect: str = ""
    """Contradiction between the pose and the odometry or the ground plane; empty if there is none."""
    deviation_m: float = math.nan
    """Largest standard deviation of the published position in the map's x-y plane, in metres."""
    tf_mode: str = "none"
    is_repeating: bool = False
    """The last ``map -> odom`` is sent again without a new pose."""

    @property
    def transform_text(self) -> str:
        """Value ``transform`` of ``status``: ``sound`` only if a transform was broadcast for this frame."""
        if self.tf_mode == "none":
            return "none is broadcast: tf_mode is none"
        if self.pose:
            kept = "the last one is sent again" if self.is_repeating else "none is broadcast"
            return f"{kept}: {self.pose}"
        return self.transform or "sound"


class PosePublisher:
    """Publisher that converts camera poses into messages about the base frame; refuses invalid poses."""

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        listener: TransformListener,
        health: Health,
        switch: EnableSwitch,
    ) -> None:
        self._node, self._parameters, self._map_frame, self._health = node, parameters, map_frame, health
        self._listener = listener
        self._transforms = TfPublisher(node, parameters, map_frame, listener, health, switch)
        self._odometry = OdometryPublisher(node, parameters, map_frame, listener, health, switch)
        self._poses = node.create_publisher(PoseWithCovarianceStamped, "pose", qos.results())
        self._paths = node.create_publisher(Path, "path", qos.results(1))
        self._path: deque[PoseStamped] = deque()
        self._path_sent_s = -math.inf
        self.last: LastPose | None = None
        """Last published pose; None if there is none."""

    def publish(self, estimate: PoseEstimate, camera_frame: str) -> Outcome:
        """Publish the pose, path and transform of an estimate, as far as it has them."""
        outcome = self._publish(estimate, camera_frame)
        return replace(outcome, tf_mode=self._parameters.node.tf_mode, is_repeating=self._transforms.is_repeating)

    def _publish(self, estimate: PoseEstimate, camera_frame: str) -> Outcome:
        if estimate.T_map_camera is None:
            self._publish_lost(estimate)
            return Outcome(pose=estimate.reason or "no pose")
        if estimate.covariance is None:
            return Outcome(pose="the pose has no covariance")
        body = BodyPose(estimate.T_map_camera, estimate.covariance)
        base_frame = self._parameters.node.base_frame or camera_frame
        if base_frame != camera_frame:
            try:
                body = body.moved(self._listener.lookup(camera_frame, base_frame, estimate.stamp_ns))
            except TransformUnknownError as error:
                self._health.warn(f"No pose is published. {error}")
                return Outcome(pose=str(error))
        off_plane, body = self._on_plane(body)
        fault = body.fault()
        if fault:
            self._health.warn(f"A pose is not published: {fault}.")
            return Outcome(pose=fault)
        self._publish_pose(estimate.stamp_ns, body)
        deviation_m = math.sqrt(float(np.linalg.eigvalsh(body.covariance[:2, :2])[-1]))
        if estimate.bridged:
            self._without_measurement()
            return Outcome(transform=estimate.reason, deviation_m=deviation_m)
        self.last = LastPose(estimate.stamp_ns, base_frame, body)
        self._publish_path(estimate.stamp_ns, body)
        if estimate.tentative:
            return Outcome(transform=estimate.reason, suspect=estimate.reason)
        fault = self._transforms.publish(estimate.stamp_ns, body.T_map_body, base_frame)
        if not self._transforms.suspect:
            self._odometry.fix(estimate.stamp_ns, body, base_frame)
        return Outcome(
            transform=fault, suspect=fault if self._transforms.suspect else off_plane, deviation_m=deviation_m
        )

    def _on_plane(self, body: BodyPose) -> tuple[str, BodyPose]:
        """Return what is wrong with the pose of a planar robot, and the pose on the ground plane; else it as it is."""
        config = self._parameters.node
        if not config.planar or body.fault():
            return "", body
        planar = planar_pose(body.T_map_body, body.covariance, config.ground_height)
        if planar.fault:
            self._health.warn(f"Off the ground plane: {planar.fault}.")
        return planar.fault, BodyPose(planar.T_map_base, planar.covariance)

    def predict(self, camera_frame: str, stamp_ns: int) -> Matrix | None:
        """Return ``T_map_camera`` (4, 4) of a frame as odometry predicts it from the last pose; None without either."""
        config, last = self._parameters.node, self.last
        if last is None or not 0 < stamp_ns - last.stamp_ns <= KEEP_S * 1e9:
            return None
        if not self._listener.has_odometry(config.odom_frame, last.base_frame, self._map_frame):
            return None
        T_then_now = last.travelled(self._listener, config.odom_frame, stamp_ns, _ODOMETRY_WAIT_S)
        if T_then_now is None:
            return None
        try:
            T_base_camera = inverse_pose(self._listener.lookup(camera_frame, last.base_frame, stamp_ns))
        except TransformUnknownError:
            return None
        return last.body.T_map_body @ T_then_now @ T_base_camera

    def mount(self, camera_frame: str, stamp_ns: int) -> Matrix:
        """Return ``T_base_camera`` (4, 4) of a camera.

        Raises:
            TransformUnknownError: TF does not connect the two.
        """
        return self._listener.lookup(self._parameters.node.base_frame, camera_frame, stamp_ns)

    def motion(self, since_ns: int, until_ns: int) -> Matrix | None:
        """Return ``T_then_now`` (4, 4) of the base by odometry, or None where it is not known."""
        config = self._parameters.node
        if not self._listener.has_odometry(config.odom_frame, config.base_frame, self._map_frame):
            return None
        return travelled(self._listener, config.odom_frame, config.base_frame, since_ns, until_ns)

    def rival(self) -> str:
        """Return a sentence if another node publishes poses on the same topic; else an empty string."""
        topic = self._node.resolve_topic_name("pose")
        count = self._node.count_publishers(topic)
        if count <= 1:
            return ""
        others = {
            f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            for info in self._node.get_publishers_info_by_topic(topic)
        } - {self._node.get_fully_qualified_name()}
        return (
            f"{count - 1} other node(s) ({', '.join(sorted(others)) or 'of the same name'}) also publish on "
            f"{topic}: stop the second localizer, or give one of the two a namespace."
        )

    def allow_jump(self) -> None:
        """Let ``map -> odom`` go to the next pose at once. Thread-safe."""
        self._transforms.allow_jump()

    def reset(self) -> None:
        """Discard the path and the last pose; worker thread only."""
        self._path.clear()
        self.reset_pose()

    def reset_pose(self) -> None:
        """Discard the last pose and transform. Thread-safe."""
        self.last = None
        self._transforms.reset()
        self._odometry.reset()

    def _publish_lost(self, estimate: PoseEstimate) -> None:
        """Publish a LOST estimate as ``when_lost`` demands."""
        config = self._parameters.node
        if estimate.state is not TrackingState.LOST:
            return
        self._without_measurement()
        if config.when_lost == "mark" and self.last is not None:
            T_then_now = None
            if config.tf_mode == "map_to_odom":
                T_then_now = self.last.travelled(self._listener, config.odom_frame, estimate.stamp_ns)
            self._publish_pose(estimate.stamp_ns, self.last.grown(estimate.stamp_ns, config.lost_growth, T_then_now))

    def _without_measurement(self) -> None:
        """Let ``map -> odom`` go to the next measured pose at once; stop it meanwhile if ``when_lost`` demands it."""
        self._transforms.allow_jump()
        if self._parameters.node.when_lost == "stop":
            self._transforms.stop()

    def _publish_pose(self, stamp_ns: int, body: BodyPose) -> None:
        message = PoseWithCovarianceStamped()
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = self._map_frame
        fill_pose_with_covariance(message.pose, body, diagonal=self._parameters.node.diagonal_covariance)
        self._poses.publish(message)

    def _publish_path(self, stamp_ns: int, body: BodyPose) -> None:
        pose = PoseStamped()
        fill_stamp(pose.header.stamp, stamp_ns)
        pose.header.frame_id = self._map_frame
        fill_pose(pose.pose, body.T_map_body)
        self._path.append(pose)
        while len(self._path) > self._parameters.node.path_length:
            self._path.popleft()
        # A thousand poses take 10 ms and more to send: only if somebody subscribes, and at a limited rate.
        now_s = time.monotonic()
        if now_s - self._path_sent_s < _PATH_PERIOD_S or self._paths.get_subscription_count() == 0:
            return
        self._path_sent_s = now_s
        if self._path:
            message = Path(poses=list(self._path))
            message.header = pose.header
            self._paths.publish(message)
