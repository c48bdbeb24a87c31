# SPDX-License-Identifier: Apache-2.0
"""Whether the poses move as the odometry does; imports nothing of ROS."""

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
from kfloc_ros.nodes.worker import Gate
from kfloc_ros.types import Matrix

RECENT_S = 2.0
"""After a longer time without a pose that agreed, any pose is believed: wheels may have slipped meanwhile."""
DEG_PER_M = 30.0
"""A rotation of so many degrees counts as much as a translation of a metre."""


@dataclass(frozen=True, eq=False)
class _Seen:
    stamp_ns: int
    T_map_odom: Matrix


class OdometryCheck:
    """Doubts a pose that is not where the odometry has carried the last one, until a second pose agrees with it.

    A single wrong pose so never moves the map, and a robot that was really moved waits for one more image.
    """

    def __init__(self) -> None:
        self._last: _Seen | None = None
        self._doubted: _Seen | None = None

    def doubt(self, stamp_ns: int, T_map_base: Matrix, T_odom_base: Matrix, limit_m: float) -> str:
        """Why a pose is not believed yet, or empty.

        Args:
            stamp_ns: of the image.
            T_map_base: the pose found in it.
            T_odom_base: the odometry at its stamp.
            limit_m: how far apart the two may be; 0: any distance.
        """
        seen = _Seen(stamp_ns, T_map_base @ inverse_pose(T_odom_base))
        doubted, self._doubted = self._doubted, None
        if limit_m == 0.0 or not _is_recent(self._last, stamp_ns):
            self._last = seen
            return ""
        assert self._last is not None
        apart_m, apart_deg = _apart(self._last, T_map_base, T_odom_base)
        if _within(apart_m, apart_deg, limit_m):
            self._last = seen
            return ""
        if (
            doubted is not None
            and _is_recent(doubted, stamp_ns)
            and _within(*_apart(doubted, T_map_base, T_odom_base), limit_m)
        ):
            self._last = seen
            return ""
        self._doubted = seen
        return (
            f"The image says that the robot is {apart_m:.2f} m and {apart_deg:.1f} deg from where the odometry has it, "
            f"more than max_odom_jump {limit_m:g} m; one more image has to say so."
        )

    def forget(self) -> None:
        """The next pose is believed."""
        self._last = self._doubted = None


def _is_recent(seen: _Seen | None, stamp_ns: int) -> bool:
    return seen is not None and 0 < stamp_ns - seen.stamp_ns <= RECENT_S * 1e9


def _apart(seen: _Seen, T_map_base: Matrix, T_odom_base: Matrix) -> tuple[float, float]:
    """Metres and degrees between a pose and what the odometry makes of an earlier one."""
    between = inverse_pose(seen.T_map_odom @ T_odom_base) @ T_map_base
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


def _within(apart_m: float, apart_deg: float, limit_m: float) -> bool:
    return apart_m <= limit_m and apart_deg <= limit_m * DEG_PER_M


@dataclass(frozen=True, eq=False)
class _Anchor:
    """The last ``T_map_odom``, and when it was true on the camera's clock and on the node's."""

    odom_frame: str
    T_map_odom: Matrix
    stamp_ns: int
    node_ns: int


class TfPublisher:
    """Sends map -> odom or map -> base, whatever ``tf_mode`` says; ``publish`` and ``hold`` are for the worker."""

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        listener: TransformListener,
        health: Health,
        gate: Gate,
    ) -> None:
        self._clock, self._parameters, self._map_frame = node.get_clock(), parameters, map_frame
        self._listener, self._health, self._gate = listener, health, gate
        self._broadcast = make_broadcaster(node)
        self._lock = threading.Lock()
        self._anchor: _Anchor | None = None
        self._sent_ns = 0
        self._stopped = False
        self._check = OdometryCheck()
        self.doubted = False
        """Whether the last pose was not broadcast because the odometry contradicts it."""
        rate_hz = parameters.node.transform_rate_hz
        if rate_hz > 0:  # on the steady clock, so that a /clock that stands still costs nothing
            node.create_timer(1.0 / rate_hz, self._resend, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def publish(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        """Broadcast a pose; returns why that was not possible, or empty."""
        config = self._parameters.node
        self.doubted = False
        if config.tf_mode == "none":
            return ""
        if not base_frame:
            return self._say("No transform is broadcast: the images have no frame_id. Have the camera driver name one.")
        if config.tf_mode == "map_to_base":
            return self._publish_base(stamp_ns, T_map_base, base_frame)
        odom_frame = config.odom_frame
        try:
            T_odom_base = self._listener.lookup(odom_frame, base_frame, stamp_ns, config.transform_timeout)
        except TransformUnknownError as error:
            return self._say(f"No {self._map_frame} -> {odom_frame} is broadcast for this image. {error}")
        fault = self._second_parent(odom_frame)
        if fault:
            return self._say(fault)
        doubt = self._check.doubt(stamp_ns, T_map_base, T_odom_base, config.max_odom_jump)
        if doubt:
            self.doubted = True
            return self._say(doubt)
        anchor = _Anchor(odom_frame, T_map_base @ inverse_pose(T_odom_base), stamp_ns, self._clock.now().nanoseconds)
        with self._lock:
            if self._anchor is not None and stamp_ns < self._anchor.stamp_ns:
                self._sent_ns = 0  # time went backwards
            self._anchor, self._stopped = anchor, False
            self._send(anchor, max(stamp_ns + self._tolerance_ns(), self._sent_ns + 1))
        return ""

    def stop(self) -> None:
        """Send nothing more until the next pose."""
        with self._lock:
            self._stopped = True

    def forget(self) -> None:
        """Forget the last transform, too."""
        with self._lock:
            self._anchor, self._sent_ns = None, 0
            self._check.forget()

    def _publish_base(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        fault = self._second_parent(base_frame)
        if fault:
            return self._say(fault)
        self._broadcast(stamped(self._map_frame, base_frame, stamp_ns, T_map_base))
        return ""

    def _second_parent(self, child: str) -> str:
        """Why ``child`` must not become a child of the map: a TF frame has one parent."""
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
            if anchor is None or self._stopped or not self._gate.active or config.tf_mode != "map_to_odom":
                return
            elapsed_ns = self._clock.now().nanoseconds - anchor.node_ns
            if elapsed_ns < 0:
                return
            if config.when_lost == "stop" and elapsed_ns > config.lost_after_s * 1e9:
                self._stopped = True
                return
            # On the camera's clock, which need not be this node's; and one period late, so that the next pose is later
            # still: a listener sorts by stamp, and a transform that came before must not stay the newest.
            stamp_ns = anchor.stamp_ns + elapsed_ns - int(1e9 / config.transform_rate_hz) + self._tolerance_ns()
            if stamp_ns > self._sent_ns:
                self._send(anchor, stamp_ns)

    def _send(self, anchor: _Anchor, stamp_ns: int) -> None:
        self._sent_ns = stamp_ns
        self._broadcast(stamped(self._map_frame, anchor.odom_frame, stamp_ns, anchor.T_map_odom))

    def _tolerance_ns(self) -> int:
        return int(self._parameters.node.transform_tolerance * 1e9)

    def _say(self, sentence: str) -> str:
        self._health.warn(sentence)
        return sentence
