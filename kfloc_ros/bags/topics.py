# SPDX-License-Identifier: Apache-2.0
"""What the project's bags hold: topic names, message types and frame names, for writer, reader and replay."""

from __future__ import annotations

IMAGE_TOPIC = "/camera/image/compressed"
CAMERA_INFO_TOPIC = "/camera/camera_info"
DEPTH_TOPIC = "/camera/depth/compressed"
TRUTH_TOPIC = "/ground_truth/pose"
TF_TOPIC = "/tf"

MAP_FRAME = "map"
CAMERA_FRAME = "camera"
"""Optical frame of the camera (x right, y down, z forward)."""
TRUTH_FRAME = "camera_ground_truth"
"""The true camera frame in /tf: a name of its own, so that it never gets two parents beside a localizer's output."""

TOPIC_TYPES = {
    IMAGE_TOPIC: "sensor_msgs/msg/CompressedImage",
    CAMERA_INFO_TOPIC: "sensor_msgs/msg/CameraInfo",
    DEPTH_TOPIC: "sensor_msgs/msg/CompressedImage",
    TRUTH_TOPIC: "geometry_msgs/msg/PoseStamped",
    TF_TOPIC: "tf2_msgs/msg/TFMessage",
}

DEPTH_UNIT_M = 1e-3
"""Depth images are 16-bit PNG in millimetres, 0 where unknown (REP-118)."""
