# SPDX-License-Identifier: Apache-2.0
"""TF without depending on tf2_ros: the real package where it is installed, the same over plain messages elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.node import Node
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from kfloc_ros.errors import KflocError
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.pose_messages import transform_from_message
from kfloc_ros.types import Matrix

try:
    import tf2_ros
except ImportError:
    tf2_ros = None


class TransformUnknownError(KflocError):
    """Two TF frames are not connected; the message names those that are known."""


class TransformLookup(Protocol):
    """Where transforms between frames are looked up."""

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        """``T_target_source`` (4, 4). Raises TransformUnknownError if the frames are not connected."""
        ...


class StaticTree:
    """The transforms of ``/tf_static``, chained through any number of frames."""

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, Matrix]] = {}

    def add(self, parent: str, child: str, T_parent_child: Matrix) -> None:
        """Connect two frames; a child has one parent, the last one given."""
        self._parents[child.lstrip("/")] = (parent.lstrip("/"), T_parent_child)

    def lookup(self, target: str, source: str, stamp_ns: int = 0) -> Matrix:
        """``T_target_source`` (4, 4).

        Raises:
            TransformUnknownError: no chain connects the two.
        """
        del stamp_ns  # static
        from_target, from_source = self._ancestors(target.lstrip("/")), self._ancestors(source.lstrip("/"))
        for frame, T_frame_source in from_source.items():
            if frame in from_target:
                return inverse_pose(from_target[frame]) @ T_frame_source
        known = sorted({*self._parents, *(parent for parent, _ in self._parents.values())})
        raise TransformUnknownError(
            f"TF does not connect '{source}' and '{target}', so the pose of '{source}' is not known. "
            f"Known frames: {', '.join(known) or 'none'}. Publish the transform on /tf_static or change base_frame."
        )

    def _ancestors(self, frame: str) -> dict[str, Matrix]:
        """``T_ancestor_frame`` of a frame and all above it; a loop ends the walk."""
        found = {frame: np.eye(4)}
        T = np.eye(4)
        while frame in self._parents:
            frame, T_parent_frame = self._parents[frame]
            if frame in found:
                break
            T = T_parent_frame @ T
            found[frame] = T
        return found


class _StaticListener(StaticTree):
    """A tree fed from ``/tf_static``."""

    def __init__(self, node: Node, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._warn = warn
        node.create_subscription(TFMessage, "/tf_static", self._on_transforms, qos.static_transforms())

    def _on_transforms(self, message: Any) -> None:
        for item in message.transforms:
            try:
                self.add(item.header.frame_id, item.child_frame_id, transform_from_message(item.transform))
            except ValueError as error:
                self._warn(f"The transform to '{item.child_frame_id}' on /tf_static cannot be used: {error}")


class _Tf2Lookup:
    """tf2's own buffer, which also follows moving frames."""

    def __init__(self, node: Node) -> None:
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node, spin_thread=False)

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        try:
            found = self._buffer.lookup_transform(target, source, Time(nanoseconds=stamp_ns))
        except tf2_ros.TransformException as error:
            known = ", ".join(sorted(self._buffer._getFrameStrings())) or "none"
            raise TransformUnknownError(
                f"TF does not connect '{source}' and '{target}' at the image's time ({error}). Known frames: {known}."
            ) from error
        return transform_from_message(found.transform)


def make_lookup(node: Node, warn: Callable[[str], None]) -> TransformLookup:
    """A lookup fed by the node's subscriptions; ``warn`` takes sentences about bad transforms."""
    return _StaticListener(node, warn) if tf2_ros is None else _Tf2Lookup(node)


def make_broadcaster(node: Node) -> Callable[[TransformStamped], None]:
    """A function that broadcasts one transform on ``/tf``."""
    if tf2_ros is not None:
        broadcaster = tf2_ros.TransformBroadcaster(node)
        return lambda transform: broadcaster.sendTransform(transform)
    publisher = node.create_publisher(TFMessage, "/tf", qos.results(100))
    return lambda transform: publisher.publish(TFMessage(transforms=[transform]))
