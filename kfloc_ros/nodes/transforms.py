# SPDX-License-Identifier: Apache-2.0
"""TF listener and broadcaster; uses tf2_ros if it is installed, else an equivalent buffer of our own."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from kfloc_ros.messages.poses import fill_stamp, fill_transform, stamp_to_ns, transform_from_message
from kfloc_ros.messages.transforms import TransformStore, TransformTimeError, TransformTree, unconnected
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.worker import TimeWatch
from kfloc_ros.types import Matrix

try:
    import tf2_ros
except ImportError:
    tf2_ros = None

KEEP_S = 10.0
JUMP_BACK_S = 1.0
"""A transform older than the previous one by this much, in seconds, means that time went backwards."""
_SENT = 2000
"""Number of transforms of this node that are recognized on ``/tf``."""
_OTHER_S = 5.0
"""Time, in seconds, for which another broadcaster of the same transform is remembered."""
_NOT_LATCHED = (
    "A publisher on '/tf_static' does not latch its transforms: what it sent before this node listened is lost. "
    "Publish them with the durability transient_local; `ros2 bag play` does so with --qos-profile-overrides-path."
)
_SAME_MOUNT = 1e-6
"""Largest difference of two static transforms that count as one."""


class Tf2Buffer:
    """Adapter of tf2's own buffer."""

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._core = tf2_ros.BufferCore(Duration(seconds=keep_s))

    def set(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix, *, static: bool = False) -> None:
        message = stamped(parent.lstrip("/"), child.lstrip("/"), stamp_ns, T_parent_child)
        (self._core.set_transform_static if static else self._core.set_transform)(message, "kfloc_ros")

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        target, source = target.lstrip("/"), source.lstrip("/")
        try:
            found = self._core.lookup_transform_core(target, source, Time(nanoseconds=stamp_ns))
        except tf2_ros.ExtrapolationException as error:
            message = f"TF has no '{target}' -> '{source}' at the requested time ({error})."
            raise TransformTimeError(message, ahead="future" in str(error)) from error
        except tf2_ros.TransformException as error:
            raise unconnected(target, source, self.frames()) from error
        return transform_from_message(found.transform)

    def newest_ns(self, target: str, source: str) -> int:
        target, source = target.lstrip("/"), source.lstrip("/")
        try:
            return int(self._core.get_latest_common_time(target, source).nanoseconds)
        except tf2_ros.TransformException as error:
            raise unconnected(target, source, self.frames()) from error

    def clear(self) -> None:
        self._core.clear()

    def frames(self) -> tuple[str, ...]:
        return tuple(sorted(self._core._getFrameStrings()))


def make_store() -> TransformStore:
    """Return tf2's buffer if tf2_ros is installed, else our own."""
    return TransformTree(KEEP_S) if tf2_ros is None else Tf2Buffer(KEEP_S)


@dataclass
class _Parent:
    """Parent of a frame, as last received, with the times of receipt on the steady clock."""

    name: str
    static: bool
    heard_s: float
    T_parent_child: Matrix
    other_s: float = -math.inf
    """Time of the last such transform that this node did not send."""

    def is_recent(self, now_s: float) -> bool:
        """Return False if a listener has dropped the transform by now."""
        return self.static or now_s - self.heard_s <= KEEP_S


class TransformListener:
    """Buffer of ``/tf`` and ``/tf_static``, cleared when time goes backwards.

    Args:
        warn: called with a sentence about each transform that cannot be used.
        store: made by :func:`make_store` if None.
        reliability: requested of the publishers of ``/tf``.
    """

    def __init__(
        self,
        node: Node,
        warn: Callable[[str], None],
        store: TransformStore | None = None,
        *,
        reliability: str = "reliable",
    ) -> None:
        self._store, self._warn = store or make_store(), warn
        self._arrived = threading.Condition()
        self._parents: dict[str, _Parent] = {}
        self._sent: dict[tuple[str, str, int], None] = {}
        self._newest_ns: dict[str, int] = {}
        # rclpy's buffer does not notice jumps of the clock, so it must be cleared here.
        self._watch = TimeWatch(node, on_jump=self.clear)
        events = qos.on_mismatch("/tf", "tf_reliability", warn)
        profile = qos.results(100, reliability)
        node.create_subscription(
            TFMessage, "/tf", lambda m: self._add(m, static=False), profile, event_callbacks=events
        )
        events = SubscriptionEventCallbacks(incompatible_qos=lambda _: warn(_NOT_LATCHED))
        # One profile cannot receive both what was latched before and what is not latched at all.
        for profile in (qos.static_transforms(), qos.results(100, "best_effort")):
            node.create_subscription(
                TFMessage, "/tf_static", lambda m: self._add(m, static=True), profile, event_callbacks=events
            )

    def lookup(self, target: str, source: str, stamp_ns: int, wait_s: float = 0.0) -> Matrix:
        """Return ``T_target_source`` (4, 4); waits up to ``wait_s``, but never in the executor's thread.

        Raises:
            TransformUnknownError: the frames are not connected.
            TransformTimeError: they are connected, but not at that time.
        """
        deadline = time.monotonic() + wait_s
        with self._arrived:
            while True:
                try:
                    return self._store.lookup(target, source, stamp_ns)
                except TransformTimeError as error:
                    left_s = deadline - time.monotonic()
                    if not error.ahead or left_s <= 0:
                        raise
                    self._arrived.wait(left_s)

    def newest(self, target: str, source: str) -> tuple[int, Matrix]:
        """Return the newest stamp at which ``T_target_source`` (4, 4) is known, in nanoseconds, and the transform.

        The stamp is 0 if all transforms between the frames are static.

        Raises:
            TransformUnknownError: the frames are not connected.
        """
        with self._arrived:
            stamp_ns = self._store.newest_ns(target, source)
            return stamp_ns, self._store.lookup(target, source, stamp_ns)

    def has_odometry(self, odom_frame: str, base_frame: str, map_frame: str) -> bool:
        """Return True if ``odom_frame`` is an ancestor of ``base_frame``, and not through the map."""
        above = self.above(base_frame)
        if odom_frame.lstrip("/") not in above:
            return False
        return map_frame.lstrip("/") not in above[: above.index(odom_frame.lstrip("/"))]

    def parent(self, frame: str) -> str | None:
        """Return the last parent of a frame, or None; one that is not sent any more counts for ``KEEP_S``."""
        with self._arrived:
            return self._parent(frame.lstrip("/"))

    def above(self, frame: str) -> list[str]:
        """Return the ancestors of a frame from its parent up; a loop ends at the frame that closes it."""
        frame = frame.lstrip("/")
        found: dict[str, None] = {}
        with self._arrived:
            parent = self._parent(frame)
            while parent is not None and parent not in found:
                found[parent] = None
                parent = self._parent(parent)
        return list(found)

    def note_sent(self, parent: str, child: str, stamp_ns: int) -> None:
        """Record a transform of this node before it is broadcast."""
        with self._arrived:
            self._sent[parent.lstrip("/"), child.lstrip("/"), stamp_ns] = None
            while len(self._sent) > _SENT:
                del self._sent[next(iter(self._sent))]

    def others_send(self, parent: str, child: str) -> bool:
        """Return True if another node broadcasts this transform, too."""
        with self._arrived:
            known = self._parents.get(child.lstrip("/"))
            if known is None or known.name != parent.lstrip("/"):
                return False
            return known.static or time.monotonic() - known.other_s <= _OTHER_S

    def clear(self) -> None:
        """Remove all dynamic transforms."""
        with self._arrived:
            self._store.clear()
            self._newest_ns.clear()

    def _add(self, message: Any, *, static: bool) -> None:
        with self._arrived:
            for item in message.transforms:
                parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
                try:
                    T = transform_from_message(item.transform)
                    if not parent or not child or parent == child:
                        raise ValueError(f"its frames are '{parent}' and '{child}'.")
                except ValueError as error:
                    self._warn(f"The transform from '{parent}' to '{child}' on TF cannot be used: {error}")
                    continue
                stamp_ns = stamp_to_ns(item.header.stamp)
                if not static:
                    self._check_jump(child, stamp_ns)
                self._note_parent(parent, child, stamp_ns, T, static=static)
                self._store.set(parent, child, stamp_ns, T, static=static)
            self._arrived.notify_all()

    def _parent(self, frame: str) -> str | None:
        known = self._parents.get(frame)
        return known.name if known is not None and known.is_recent(time.monotonic()) else None

    def _note_parent(self, parent: str, child: str, stamp_ns: int, T: Matrix, *, static: bool) -> None:
        now_s, former = time.monotonic(), self._parents.get(child)
        known = self._parents[child] = _Parent(parent, static, now_s, T)
        is_same = former is not None and former.name == parent
        if former is not None and is_same:
            known.other_s = former.other_s
        if (parent, child, stamp_ns) not in self._sent:
            known.other_s = now_s
        if former is None or not former.is_recent(now_s):
            return
        if not is_same:
            self._warn(
                f"The parent of '{child}' on TF changed from '{former.name}' to '{parent}'. A frame can have only one; "
                "if this repeats, stop one of the two publishers."
            )
        elif static and former.static and not np.allclose(T, former.T_parent_child, atol=_SAME_MOUNT):
            self._warn(
                f"The static transform '{parent}' -> '{child}' changed; the last one is used. If two nodes publish it, "
                "stop one of them."
            )

    def _check_jump(self, child: str, stamp_ns: int) -> None:
        newest_ns = self._newest_ns.get(child, stamp_ns)
        if newest_ns - stamp_ns > JUMP_BACK_S * 1e9:
            self._store.clear()
            self._newest_ns.clear()
            newest_ns = stamp_ns
        self._newest_ns[child] = max(newest_ns, stamp_ns)


def stamped(parent: str, child: str, stamp_ns: int, T_parent_child: Matrix) -> TransformStamped:
    """Return the message of one transform."""
    message = TransformStamped(child_frame_id=child)
    fill_stamp(message.header.stamp, stamp_ns)
    message.header.frame_id = parent
    fill_transform(message.transform, T_parent_child)
    return message


def make_broadcaster(node: Node) -> Callable[[TransformStamped], None]:
    """Return a function that broadcasts one transform on ``/tf``."""
    if tf2_ros is not None:
        broadcaster = tf2_ros.TransformBroadcaster(node)
        return lambda transform: broadcaster.sendTransform(transform)
    publisher = node.create_publisher(TFMessage, "/tf", qos.results(100))
    return lambda transform: publisher.publish(TFMessage(transforms=[transform]))
