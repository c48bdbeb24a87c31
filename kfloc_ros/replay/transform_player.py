# SPDX-License-Identifier: Apache-2.0
"""Publishes a bag's TF as the robot did. Imports rclpy; runs in the agent's process."""

from __future__ import annotations

from collections.abc import Iterable

from rclpy.node import Node
from tf2_msgs.msg import TFMessage

from kfloc_ros.nodes import qos
from kfloc_ros.nodes.transforms import stamped
from kfloc_ros.replay.bag_transforms import BagTransforms, Edge, TransformEvent


class TransformPlayer:
    """Says ``/tf_static`` at once, to all who come, and ``/tf`` when it is told to."""

    def __init__(self, node: Node, source: BagTransforms) -> None:
        self.source = source
        self._moving = node.create_publisher(TFMessage, "/tf", qos.results(100))
        self._static = node.create_publisher(TFMessage, "/tf_static", qos.static_transforms())
        self._static.publish(_message(source.static))

    def publish(self, event: TransformEvent) -> None:
        """Publish one recorded message."""
        self._moving.publish(_message(event.edges))


def _message(edges: Iterable[Edge]) -> TFMessage:
    return TFMessage(transforms=[stamped(e.parent, e.child, e.stamp_ns, e.T_parent_child) for e in edges])
