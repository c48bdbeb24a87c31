# SPDX-License-Identifier: Apache-2.0
"""Messages of a robot's recording, made without ROS, and bags of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.types import Matrix

STORE = get_typestore(Stores.ROS2_JAZZY)
OPTICAL = make_pose(np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], dtype=float), [0.1, 0.0, 0.3])
"""Camera on the body, as on most robots: it looks along the body's x."""
DEPTH_ON_COLOR = make_pose(np.eye(3), [0.05, 0.0, 0.0])


def msg(kind: str, **fields: Any) -> Any:
    package, name = kind.split("/")
    return STORE.types[f"{package}/msg/{name}"](**fields)


def header(k: float, frame: str) -> Any:
    ns = round(100e6 * k) + 5_000_000_000
    return msg(
        "std_msgs/Header", stamp=msg("builtin_interfaces/Time", sec=ns // 10**9, nanosec=ns % 10**9), frame_id=frame
    )


def body_pose(k: float) -> Matrix:
    return make_pose(so3_exp([0, 0, 0.1 * k]), [0.2 * k, -0.1 * k, 0.0])


def parts(T: Matrix) -> tuple[list[float], Any]:
    x, y, z, w = map(float, matrix_to_quaternion(T[:3, :3]))
    return list(map(float, T[:3, 3])), msg("geometry_msgs/Quaternion", x=x, y=y, z=z, w=w)


def transforms(*links: tuple[float, str, str, Matrix]) -> Any:
    out = []
    for k, parent, child, T in links:
        (x, y, z), q = parts(T)
        t = msg("geometry_msgs/Transform", translation=msg("geometry_msgs/Vector3", x=x, y=y, z=z), rotation=q)
        out.append(msg("geometry_msgs/TransformStamped", header=header(k, parent), child_frame_id=child, transform=t))
    return msg("tf2_msgs/TFMessage", transforms=out)


def pose(T: Matrix) -> Any:
    (x, y, z), q = parts(T)
    return msg("geometry_msgs/Pose", position=msg("geometry_msgs/Point", x=x, y=y, z=z), orientation=q)


def odometry(k: float) -> Any:
    zero = msg("geometry_msgs/Vector3", x=0.0, y=0.0, z=0.0)
    twist = msg("geometry_msgs/Twist", linear=zero, angular=zero)
    return msg(
        "nav_msgs/Odometry",
        header=header(k, "odom"),
        child_frame_id="base_link",
        pose=msg("geometry_msgs/PoseWithCovariance", pose=pose(body_pose(k)), covariance=np.zeros(36)),
        twist=msg("geometry_msgs/TwistWithCovariance", twist=twist, covariance=np.zeros(36)),
    )


def info(k: float, frame: str, width: int, height: int) -> Any:
    K = np.array([50.0, 0, (width - 1) / 2, 0, 50.0, (height - 1) / 2, 0, 0, 1])
    P = np.array([50.0, 0, (width - 1) / 2, 0, 0, 50.0, (height - 1) / 2, 0, 0, 0, 1, 0])
    roi = msg("sensor_msgs/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return msg(
        "sensor_msgs/CameraInfo", header=header(k, frame), height=height, width=width, distortion_model="plumb_bob",
        d=np.zeros(5), k=K, r=np.eye(3).reshape(9), p=P, binning_x=0, binning_y=0, roi=roi,
    )  # fmt: skip


def image(k: float, frame: str, values: np.ndarray, encoding: str) -> Any:
    height, width = values.shape[:2]
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return msg(
        "sensor_msgs/Image", header=header(k, frame), height=height, width=width, encoding=encoding, is_bigendian=0,
        step=len(data) // height, data=data,
    )  # fmt: skip


def write_messages(
    path: Path,
    messages: Iterable[tuple[str, float, Any]],
    storage: StoragePlugin = StoragePlugin.SQLITE3,
    packed: CompressionMode = CompressionMode.NONE,
) -> Path:
    """A bag of messages: topic, time in tenths of a second, message."""
    unopened = Writer(path, version=9, storage_plugin=storage)
    unopened.set_compression(packed, CompressionFormat.ZSTD)
    with unopened as writer:
        connections: dict[str, Any] = {}
        for name, k, message in messages:
            if name not in connections:
                connections[name] = writer.add_connection(name, message.__msgtype__, typestore=STORE)
            writer.write(connections[name], int(6e9 + k * 100e6), STORE.serialize_cdr(message, message.__msgtype__))
    return path
