# SPDX-License-Identifier: Apache-2.0
"""Publisher of ``/tf``, with a check of poses against the odometry."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.messages.transforms import TransformUnknownError
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.transforms import TransformListener, make_broadcaster, stamped
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.types import Matrix

RECENT_S = 2.0
"""Time without an agreeing pose, in seconds, after which any pose is accepted: wheels may have slipped meanwhile."""
DEG_PER_M = 30.0
"""Rotation, in degrees, that counts as much as a translation of one metre."""


@dataclass(frozen=True, eq=False)
class _Observation:
    stamp_ns: int
    T_map_odom: Matrix


class OdometryCheck:
    """Consistency check of poses with the odometry: a pose that jumps is suspect until a second pose agrees with it.

    A single wrong pose therefore never moves the map. A robot that was really moved waits for one more image.
    """

    def __init__(self) -> None:
        self._last: _Observation | None = None
        self._suspect: _Observation | None = None

    def check(self, stamp_ns: int, T_map_base: Matrix, T_odom_base: Matrix, limit_m: float) -> str:
        """Return the reason why a pose is suspect; empty if it is accepted.

        Args:
            stamp_ns: stamp of the image.
            T_map_base: pose estimated from the image.
            T_odom_base: odometry at the same stamp.
            limit_m: largest accepted distance between the two, in metres; 0: no limit.
        """
        observation = _Observation(stamp_ns, T_map_base @ inverse_pose(T_odom_base))
        suspect, self._suspect = self._suspect, None
        if limit_m == 0.0 or not _is_recent(self._last, stamp_ns):
            self._last = observation
            return ""
        assert self._last is not None
        apart_m, apart_deg = _apart(self._last, T_map_base, T_odom_base)
        if _within(apart_m, apart_deg, limit_m):
            self._last = observation
            return ""
        if (
            suspect is not None
            and _is_recent(suspect, stamp_ns)
            and _within(*_apart(suspect, T_map_base, T_odom_base), limit_m)
        ):
            self._last = observation
            return ""
        self._suspect = observation
        return (
            f"The pose is {apart_m:.2f} m and {apart_deg:.1f} deg from its prediction by odometry, more than "
            f"max_odom_jump {limit_m:g} m; a second image has to confirm it."
        )

    def reset(self) -> None:
        """Accept the next pose unconditionally."""
        self._last = self._suspect = None


def _is_recent(observation: _Observation | None, stamp_ns: int) -> bool:
    return observation is not None and 0 < stamp_ns - observation.stamp_ns <= RECENT_S * 1e9


def _apart(observation: _Observation, T_map_base: Matrix, T_odom_base: Matrix) -> tuple[float, float]:
    """Return metres and degrees between a pose and an earlier one moved by odometry."""
    between = inverse_pose(observation.T_map_odom @ T_odom_base) @ T_map_base
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


def _within(apart_m: float, apart_deg: float, limit_m: float) -> bool:
    return apart_m <= limit_m and apart_deg <= limit_m * DEG_PER_M


@dataclass(frozen=True, eq=False)
class _Anchor:
    """Last ``T_map_odom``, with its time on the camera's clock and on the node's."""

    odom_frame: str
    T_map_odom: Matrix
    stamp_ns: int
    node_ns: int


class TfPublisher:
    """Broadcaster of map -> odom or map -> base, by ``tf_mode``; ``publish`` is for the worker thread only."""

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        listener: TransformListener,
        health: Health,
        switch: EnableSwitch,
    ) -> None:
        self._clock, self._parameters, self._map_frame = node.get_clock(), parameters, map_frame
        self._listener, self._health, self._switch = listener, health, switch
        self._broadcast = make_broadcaster(node)
        self._lock = threading.Lock()
        self._anchor: _Anchor | None = None
        self._sent_ns = 0
        self._stopped = False
        self._check = OdometryCheck()
        self.suspect = False
        """The last pose was not broadcast because the odometry contradicts it."""
        rate_hz = parameters.node.transform_rate_hz
        if rate_hz > 0:  # on the steady clock, so that a stopped /clock does no harm
            node.create_timer(1.0 / rate_hz, self._resend, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def publish(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        """Broadcast a pose; return the reason if that was not possible, else an empty string."""
        config = self._parameters.node
        self.suspect = False
        if config.tf_mode == "none":
            return ""
        if not base_frame:
            return self._warn(
                "No transform is broadcast: the images have no frame_id. Set frame_id in the camera driver."
            )
        if config.tf_mode == "map_to_base":
            return self._publish_base(stamp_ns, T_map_base, base_frame)
        odom_frame = config.odom_frame
        try:
            T_odom_base = self._listener.lookup(odom_frame, base_frame, stamp_ns, config.transform_timeout)
        except TransformUnknownError as error:
            return self._warn(f"No {self._map_frame} -> {odom_frame} is broadcast for this image. {error}")
        fault = self._second_parent(odom_frame)
        if fault:
            return self._warn(fault)
        reason = self._check.check(stamp_ns, T_map_base, T_odom_base, config.max_odom_jump)
        if reason:
            self.suspect = True
            return self._warn(reason)
        anchor = _Anchor(odom_frame, T_map_base @ inverse_pose(T_odom_base), stamp_ns, self._clock.now().nanoseconds)
        with self._lock:
            if self._anchor is not None and stamp_ns < self._anchor.stamp_ns:
                self._sent_ns = 0  # time went backwards
            self._anchor, self._stopped = anchor, False
            self._send(anchor, max(stamp_ns + self._tolerance_ns(), self._sent_ns + 1))
        return ""

    def stop(self) -> None:
        """Send nothing until the next pose."""
        with self._lock:
            self._stopped = True

    def reset(self) -> None:
        """Discard the last transform and reset the odometry check."""
        with self._lock:
            self._anchor, self._sent_ns = None, 0
            self._check.reset()

    def _publish_base(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        fault = self._second_parent(base_frame)
        if fault:
            return self._warn(fault)
        self._broadcast(stamped(self._map_frame, base_frame, stamp_ns, T_map_base))
        return ""

    def _second_parent(self, child: str) -> str:
        """Return the reason why ``child`` must not become a child of the map (TF allows one parent); empty if it
        may.
        """
        parent = self._listener.parent(child)
        if parent is None or parent == self._map_frame.lstrip("/"):
            return ""
        way_out = (
            "Set tf_mode to map_to_odom"
            if self._parameters.node.tf_mode == "map_to_base"
            else "Correct odom_frame, or stop the other publisher"
        )
        return (
            f"No {self._map_frame} -> {child} is broadcast: '{child}' already has the parent '{parent}', and a TF "
            f"frame can have only one. {way_out}; if '{child}' is the camera, set base_frame to the robot's base."
        )

    def _resend(self) -> None:
        config = self._parameters.node
        with self._lock:
            anchor = self._anchor
            if anchor is None or self._stopped or not self._switch.active or config.tf_mode != "map_to_odom":
                return
            elapsed_ns = self._clock.now().nanoseconds - anchor.node_ns
            if elapsed_ns < 0:
                return
            if config.when_lost == "stop" and elapsed_ns > config.lost_after_s * 1e9:
                self._stopped = True
                return
            # On the camera's clock, which may differ from this node's, and one period late: a listener sorts by
            # stamp, and the next pose must have a later stamp than any transform sent before it.
            stamp_ns = anchor.stamp_ns + elapsed_ns - int(1e9 / config.transform_rate_hz) + self._tolerance_ns()
            if stamp_ns > self._sent_ns:
                self._send(anchor, stamp_ns)

    def _send(self, anchor: _Anchor, stamp_ns: int) -> None:
        self._sent_ns = stamp_ns
        self._broadcast(stamped(self._map_frame, anchor.odom_frame, stamp_ns, anchor.T_map_odom))

    def _tolerance_ns(self) -> int:
        return int(self._parameters.node.transform_tolerance * 1e9)

    def _warn(self, sentence: str) -> str:
        self._health.warn(sentence)
        return sentence
