# SPDX-License-Identifier: Apache-2.0
"""Publisher of ``/tf``: poses as ``map -> odom`` or ``map -> base``, in a sound tree of frames."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from kfloc_ros.geometry.covariance import planar_map_to_odom
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.localization.odometry import CorrectionLimits, OdometryCheck, SteadyCorrection
from kfloc_ros.messages.transforms import NEWEST, TransformUnknownError
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.transforms import TransformListener, make_broadcaster, stamped
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.types import Matrix


class _Parents(Protocol):
    def parent(self, frame: str) -> str | None: ...
    def above(self, frame: str) -> list[str]: ...


def tree_fault(parents: _Parents, map_frame: str, child: str, tf_mode: str, base_frame: str = "") -> str:
    """Return the reason why ``map_frame`` -> ``child`` would break the tree of TF frames; empty if it would not.

    Args:
        parents: parents of the frames on TF.
        map_frame: parent of the transform.
        child: child of the transform: the odometry's frame or the base frame.
        tf_mode: the parameter, for the remedy.
        base_frame: frame that the odometry must have below ``child``; empty: none.
    """
    map_frame, child, base_frame = (name.lstrip("/") for name in (map_frame, child, base_frame))
    refused = f"No {map_frame} -> {child} is broadcast"
    if child == map_frame:
        remedy = (
            "Give the images a frame_id of their own, or set base_frame"
            if tf_mode == "map_to_base"
            else "Correct odom_frame or map_frame"
        )
        return f"{refused}: a TF frame cannot be its own parent. {remedy}."
    above = parents.above(map_frame)
    if child in above:
        chain = " -> ".join(reversed([map_frame, *above[: above.index(child) + 1]]))
        return (
            f"{refused}: it would close a loop, because TF has {chain}. Stop the publisher of "
            f"'{above[0]}' -> '{map_frame}', or set tf_mode to none."
        )
    parent = parents.parent(child)
    if parent is not None and parent != map_frame:
        remedy = (
            "Set tf_mode to map_to_odom"
            if tf_mode == "map_to_base"
            else "Correct odom_frame, or stop the other publisher"
        )
        return (
            f"{refused}: '{child}' already has the parent '{parent}', and a TF frame can have only one. {remedy}; if "
            f"'{child}' is the camera, set base_frame to the robot's base."
        )
    above = parents.above(base_frame) if base_frame and base_frame != child else [child]
    if map_frame in above and child not in above:
        return (
            f"{refused}: TF connects '{child}' and '{base_frame}' only through '{map_frame}', so this is no odometry. "
            f"Have the odometry publish '{child}' -> '{base_frame}', and stop the publisher of '{map_frame}' -> "
            f"'{above[above.index(map_frame) - 1] if above.index(map_frame) else base_frame}'."
        )
    return ""


MAX_LEAD_S = 10.0
"""Limit on latencies and gaps, in seconds, that the stamps of map -> odom cover; longer ones are of other clocks."""


_MAX_PERIOD_S = 0.5
"""A longer time between two transforms, in seconds, is a pause and not a period."""


class StampLead:
    """Time that ``map -> odom`` is stamped ahead of its image, so that a lookup at the present time finds it.

    The lead covers the latency of the last poses and two periods of sending, as they are on a machine that has other
    work, or two typical gaps between poses if transforms are not sent again.
    """

    def __init__(self) -> None:
        self._latencies_s: deque[float] = deque(maxlen=16)
        self._periods_s: deque[float] = deque(maxlen=256)
        self._sent_s = -math.inf
        self._gaps_s: deque[float] = deque(maxlen=16)
        self._last_ns: int | None = None

    def add(self, stamp_ns: int, now_ns: int) -> None:
        """Add a pose with the stamp of its image and the time of its publication, both by the node's clock."""
        latency_s = 1e-9 * (now_ns - stamp_ns)
        if 0.0 <= latency_s <= MAX_LEAD_S:
            self._latencies_s.append(latency_s)
        if self._last_ns is not None and 0.0 < 1e-9 * (stamp_ns - self._last_ns) <= MAX_LEAD_S:
            self._gaps_s.append(1e-9 * (stamp_ns - self._last_ns))
        self._last_ns = stamp_ns

    def note_sent(self, now_s: float) -> None:
        """Add the time at which a transform is sent, on a steady clock in seconds."""
        if now_s - self._sent_s <= _MAX_PERIOD_S:
            self._periods_s.append(now_s - self._sent_s)
        self._sent_s = now_s

    def needed_s(self, rate_hz: float) -> float:
        """Return the shortest sufficient lead, in seconds, if transforms are sent again at ``rate_hz`` (0: never)."""
        if not self._latencies_s:
            return 0.0
        period_s = float(np.median(self._gaps_s)) if self._gaps_s else 0.0
        if rate_hz > 0:
            period_s = max(1.0 / rate_hz, max(self._periods_s, default=0.0))
        return max(self._latencies_s) + 2.0 * period_s


@dataclass(frozen=True, eq=False)
class _Anchor:
    """Last ``T_map_odom``, with its time on the camera's clock and on the node's."""

    odom_frame: str
    base_frame: str
    T_map_odom: Matrix
    T_odom_base: Matrix
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
        self._check, self._correction = OdometryCheck(), SteadyCorrection()
        self._lead = StampLead()
        self._lead_was_told = False
        self.suspect = False
        """The last pose was not broadcast because the odometry contradicts it."""
        rate_hz = parameters.node.transform_rate_hz
        if rate_hz > 0:  # on the steady clock, so that a stopped /clock does no harm
            node.create_timer(1.0 / rate_hz, self._resend, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def is_repeating(self) -> bool:
        """True if the last ``map -> odom`` is sent again without a new pose."""
        config = self._parameters.node
        return (
            self._anchor is not None
            and not self._stopped
            and config.tf_mode == "map_to_odom"
            and config.transform_rate_hz > 0
        )

    def publish(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        """Broadcast a pose; return what prevents that or is wrong with it, else an empty string."""
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
        fault = tree_fault(self._listener, self._map_frame, odom_frame, config.tf_mode, base_frame)
        if fault:
            return self._warn(fault)
        try:
            T_odom_base = self._listener.lookup(odom_frame, base_frame, stamp_ns, config.transform_timeout)
        except TransformUnknownError as error:
            return self._warn(f"No {self._map_frame} -> {odom_frame} is broadcast for this image. {error}")
        reason = self._check.check(stamp_ns, T_map_base, T_odom_base, config.max_odom_jump)
        if reason:
            self.suspect = True
            return self._warn(reason)
        T_map_odom = T_map_base @ inverse_pose(T_odom_base)
        if config.planar:
            T_map_odom = planar_map_to_odom(T_map_base, T_odom_base)
        now_ns = self._clock.now().nanoseconds
        anchor = _Anchor(odom_frame, base_frame, T_map_odom, T_odom_base, stamp_ns, now_ns)
        with self._lock:
            self._lead.add(stamp_ns, now_ns)
            if self._correction.observe(stamp_ns, T_odom_base):
                self._health.warn(f"The odometry was set to another place, so {self._map_frame} -> {odom_frame} jumps.")
            if self._anchor is not None and (stamp_ns < self._anchor.stamp_ns or odom_frame != self._anchor.odom_frame):
                self._sent_ns = 0  # time went backwards, or there is another odometry
                self._correction.allow_jump()
            self._anchor, self._stopped = anchor, False
            self._send(anchor, max(stamp_ns + self._lead_ns(), self._sent_ns + 1))
        self._tell_lead()
        return self._second_broadcaster(odom_frame)

    def stop(self) -> None:
        """Send nothing until the next pose."""
        with self._lock:
            self._stopped = True

    def allow_jump(self) -> None:
        """Let ``map -> odom`` go to the next pose at once. Thread-safe."""
        with self._lock:
            self._correction.allow_jump()

    def reset(self) -> None:
        """Discard the last transform and reset the odometry check."""
        with self._lock:
            self._anchor, self._sent_ns = None, 0
            self._check.reset()
            self._correction.allow_jump()

    def _publish_base(self, stamp_ns: int, T_map_base: Matrix, base_frame: str) -> str:
        fault = tree_fault(self._listener, self._map_frame, base_frame, "map_to_base")
        if fault:
            return self._warn(fault)
        self._listener.note_sent(self._map_frame, base_frame, stamp_ns)
        self._broadcast(stamped(self._map_frame, base_frame, stamp_ns, T_map_base))
        return self._second_broadcaster(base_frame)

    def _second_broadcaster(self, child: str) -> str:
        """Return a sentence if another node broadcasts the same transform; else an empty string."""
        if not self._listener.others_send(self._map_frame, child):
            return ""
        return self._warn(
            f"Another node also broadcasts {self._map_frame} -> {child}, so that the robot jumps between two poses. "
            "Stop the other one (a second localizer, SLAM, a bag), or set tf_mode to none here."
        )

    def _tell_lead(self) -> None:
        config = self._parameters.node
        needed_s = self._lead.needed_s(config.transform_rate_hz)
        if needed_s > config.transform_tolerance and not self._lead_was_told:
            self._lead_was_told = True
            self._health.inform(
                f"transform_tolerance {config.transform_tolerance:g} s is too short for the latency and the period of "
                f"{self._map_frame} -> {config.odom_frame}: it is stamped {needed_s:.2f} s ahead of the images instead."
            )

    def _resend(self) -> None:
        config = self._parameters.node
        with self._lock:
            anchor = self._anchor
            if anchor is None or self._stopped or not self._switch.active or config.tf_mode != "map_to_odom":
                return
            if anchor.odom_frame != config.odom_frame:
                return
            fault = tree_fault(self._listener, self._map_frame, anchor.odom_frame, config.tf_mode)
            if fault:
                self._warn(fault)
                return
            elapsed_ns = self._clock.now().nanoseconds - anchor.node_ns
            if elapsed_ns < 0:
                return
            if config.when_lost == "stop" and elapsed_ns > config.lost_after_s * 1e9:
                self._stopped = True
                return
            # On the camera's clock, which may differ from this node's, and one period late: a listener sorts by
            # stamp, and the next pose must have a later stamp than any transform sent before it.
            stamp_ns = anchor.stamp_ns + elapsed_ns - int(1e9 / config.transform_rate_hz) + self._lead_ns()
            if stamp_ns > self._sent_ns:
                self._send(anchor, stamp_ns)

    def _send(self, anchor: _Anchor, stamp_ns: int) -> None:
        self._sent_ns = stamp_ns
        self._lead.note_sent(time.monotonic())
        config, T_odom_base = self._parameters.node, anchor.T_odom_base
        limits = CorrectionLimits(config.max_correction_m_s, config.max_correction_deg_s)
        if not limits.are_off:
            with suppress(TransformUnknownError):  # then the limits apply to the base at the last image
                T_odom_base = self._listener.lookup(anchor.odom_frame, anchor.base_frame, NEWEST)
        T_map_odom = self._correction.step(anchor.T_map_odom, T_odom_base, stamp_ns, limits)
        self._listener.note_sent(self._map_frame, anchor.odom_frame, stamp_ns)
        self._broadcast(stamped(self._map_frame, anchor.odom_frame, stamp_ns, T_map_odom))

    def _lead_ns(self) -> int:
        config = self._parameters.node
        return int(1e9 * max(config.transform_tolerance, self._lead.needed_s(config.transform_rate_hz)))

    def _warn(self, sentence: str) -> str:
        self._health.warn(sentence)
        return sentence
