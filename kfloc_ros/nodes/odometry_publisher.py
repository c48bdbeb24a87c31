# SPDX-License-Identifier: Apache-2.0
"""Publisher of ``odometry/map``: the last pose from an image, carried on by odometry at a fixed rate."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from nav_msgs.msg import Odometry
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from sensor_msgs.msg import Imu

from kfloc_ros.geometry.covariance import planar_pose
from kfloc_ros.localization.odometry import CarriedPose, DeadReckoning
from kfloc_ros.messages.poses import BodyPose, fill_pose_with_covariance, fill_stamp, stamp_to_ns
from kfloc_ros.messages.transforms import NEWEST, TransformUnknownError
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.worker import EnableSwitch

_VELOCITY_SIGMA = 0.1
"""Standard deviation of the published velocities, in m/s and rad/s."""
_MAX_RATE_RAD_S = 100.0


class OdometryPublisher:
    """Publisher of the pose between images; does nothing with ``rate_hz: 0``.

    Args:
        map_frame: TF frame of the poses.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        listener: TransformListener,
        health: Health,
        switch: EnableSwitch,
    ) -> None:
        self._parameters, self._map_frame, self._listener = parameters, map_frame, listener
        self._health, self._switch = health, switch
        self._lock = threading.Lock()
        self._reckoning = DeadReckoning()
        self._pending: tuple[int, BodyPose] | None = None
        self._base_frame = ""
        self._sent_ns = 0
        config = parameters.node
        if config.rate_hz == 0.0:
            return
        self._publisher = node.create_publisher(Odometry, "odometry/map", qos.results())
        if config.use_imu:
            node.create_subscription(Imu, "imu", self._on_imu, qos.newest("best_effort"))
        node.create_timer(1.0 / config.rate_hz, self._publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def fix(self, stamp_ns: int, body: BodyPose, base_frame: str) -> None:
        """Set the last pose from an image. Thread-safe."""
        with self._lock:
            self._pending, self._base_frame = (stamp_ns, body), base_frame

    def reset(self) -> None:
        """Discard the last pose. Thread-safe."""
        with self._lock:
            self._pending, self._sent_ns = None, 0
            self._reckoning.reset()

    def _publish(self) -> None:
        config = self._parameters.node
        with self._lock:
            base_frame = self._base_frame or config.base_frame
            if not base_frame or not self._switch.is_on:
                return
            try:
                if not self._listener.has_odometry(config.odom_frame, base_frame, self._map_frame):
                    raise TransformUnknownError(f"TF has no '{config.odom_frame}' -> '{base_frame}'.")
                self._reckoning.observe(*self._listener.newest(config.odom_frame, base_frame))
                self._apply_pending(config.odom_frame, base_frame)
            except TransformUnknownError as error:
                self._health.warn(f"odometry/map needs odometry. {error}")
                return
            carried = self._reckoning.newest()
            if carried is None or carried.stamp_ns <= self._sent_ns:
                return
            self._sent_ns = carried.stamp_ns
        self._send(carried, base_frame)

    def _apply_pending(self, odom_frame: str, base_frame: str) -> None:
        """Use the last pose as soon as the odometry at its stamp is known; a pose without one is discarded."""
        if self._pending is None:
            return
        stamp_ns, body = self._pending
        try:
            T_odom_base = self._listener.lookup(odom_frame, base_frame, stamp_ns)
        except TransformUnknownError as error:
            if not getattr(error, "ahead", False):
                self._pending = None
            return
        self._reckoning.fix(stamp_ns, body, T_odom_base)
        self._pending = None

    def _send(self, carried: CarriedPose, base_frame: str) -> None:
        body, config = carried.body, self._parameters.node
        if config.planar:
            planar = planar_pose(body.T_map_body, body.covariance, config.ground_height)
            body = BodyPose(planar.T_map_base, planar.covariance)
        if body.fault():
            return
        message = Odometry(child_frame_id=base_frame)
        fill_stamp(message.header.stamp, carried.stamp_ns)
        message.header.frame_id = self._map_frame
        fill_pose_with_covariance(message.pose, body, diagonal=config.diagonal_covariance)
        for vector, values in (
            (message.twist.twist.linear, carried.velocity_m_s),
            (message.twist.twist.angular, carried.turn_rate_rad_s),
        ):
            vector.x, vector.y, vector.z = (float(value) for value in values)
        message.twist.covariance = [float(value) for value in (_VELOCITY_SIGMA**2 * np.eye(6)).reshape(-1)]
        self._publisher.publish(message)

    def _on_imu(self, message: Any) -> None:
        rate, base_frame = message.angular_velocity, self._base_frame
        values = np.array([rate.x, rate.y, rate.z])
        # -1 in the first element says that the sensor has no gyroscope.
        if message.angular_velocity_covariance[0] == -1.0 or not base_frame:
            return
        if not (np.abs(values) <= _MAX_RATE_RAD_S).all():
            self._health.warn("An angular rate on imu is not finite or beyond 100 rad/s; it is not used.")
            return
        try:
            T_base_imu = self._listener.lookup(base_frame, message.header.frame_id or base_frame, NEWEST)
        except TransformUnknownError as error:
            self._health.warn(f"The angular rates on imu cannot be used. {error}")
            return
        with self._lock:
            self._reckoning.turn(stamp_to_ns(message.header.stamp), T_base_imu[:3, :3] @ values)
