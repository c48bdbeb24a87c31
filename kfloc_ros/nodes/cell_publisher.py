# SPDX-License-Identifier: Apache-2.0
"""What the filter believes, for eyes: ``scene_coordinates``, ``flow_image`` and ``noise_image``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import Image, PointCloud2, PointField

from kfloc_ros.nodes.cloud_messages import fill_cloud
from kfloc_ros.nodes.image_messages import fill_image
from kfloc_ros.nodes.packets import CoarseFrame
from kfloc_ros.nodes.pose_messages import fill_stamp
from kfloc_ros.nodes.spectators import Spectators, View
from kfloc_ros.stages import CoarseResult
from kfloc_ros.visualization.cell_views import flow_view, noise_view
from kfloc_ros.visualization.clouds import cell_cloud


def cell_publisher(node: Node, map_frame: str, warn: Callable[[str], None]) -> Spectators[CoarseFrame]:
    """What publishes the filter's views."""

    def scene_coordinates(packet: CoarseFrame) -> Any | None:
        coordinates = packet.result.scene_coordinates
        if coordinates is None:
            return None
        message = fill_cloud(PointCloud2(), cell_cloud(coordinates, packet.camera.frame.image), PointField)
        fill_stamp(message.header.stamp, packet.result.stamp_ns)
        message.header.frame_id = map_frame
        return message

    def image(view: Callable[[CoarseResult], NDArray[np.uint8] | None]) -> View[CoarseFrame]:
        def make(packet: CoarseFrame) -> Any | None:
            picture = view(packet.result)
            if picture is None:
                return None
            message = fill_image(Image(), picture)
            fill_stamp(message.header.stamp, packet.result.stamp_ns)
            message.header.frame_id = packet.camera.frame_id
            return message

        return View(Image, make)

    views = {
        "scene_coordinates": View(PointCloud2, scene_coordinates),
        "flow_image": image(flow_view),
        "noise_image": image(noise_view),
    }
    return Spectators(node, "cells", views, warn)
