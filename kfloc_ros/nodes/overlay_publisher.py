# SPDX-License-Identifier: Apache-2.0
"""``overlay``: the image with the map's points where the pose puts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from sensor_msgs.msg import Image

from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.nodes.image_messages import fill_image
from kfloc_ros.nodes.packets import CameraFrame
from kfloc_ros.nodes.pose_messages import fill_stamp
from kfloc_ros.nodes.spectators import Spectators, View
from kfloc_ros.types import PoseEstimate
from kfloc_ros.visualization.overlay import OverlayPainter


@dataclass(frozen=True, eq=False)
class Localized:
    """A frame with what was made of it."""

    camera: CameraFrame
    estimate: PoseEstimate
    features: TrunkFeatures


def overlay_publisher(node: Node, painter: OverlayPainter, warn: Callable[[str], None]) -> Spectators[Localized]:
    """What publishes ``overlay``."""

    def overlay(localized: Localized) -> Any:
        camera = localized.camera
        message = fill_image(Image(), painter.paint(camera.frame.image, localized.estimate, localized.features))
        fill_stamp(message.header.stamp, camera.frame.stamp_ns)
        message.header.frame_id = camera.frame_id
        return message

    return Spectators(node, "overlay", {"overlay": View(Image, overlay)}, warn)
