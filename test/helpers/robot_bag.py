# SPDX-License-Identifier: Apache-2.0
"""Makes bags of robots: TF beside the images of a bag of our own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin, Writer

from kfloc_ros.bags.stream import BagStream
from kfloc_ros.bags.topics import TF_TYPE
from kfloc_ros.bags.truth import read_truth
from kfloc_ros.bags.writer import MessageCodec
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.types import Matrix

Transform = tuple[str, str, int, Matrix]
"""Parent, child, stamp in nanoseconds, T_parent_child."""

T_BASE_CAMERA = make_pose(so3_exp([-1.2, 1.2, -1.2]), [0.2, 0.0, 0.4])
T_MAP_ODOM = make_pose(so3_exp([0.0, 0.0, 0.7]), [1.5, -2.0, 0.0])
_T_FOOTPRINT_BASE = make_pose(np.eye(3), [0.0, 0.0, 0.1])


def add_robot(bag: Path, *, odometry: bool = True) -> Path:
    """Mount the camera of a bag with truth on a robot with perfect odometry; returns the bag."""
    with BagStream(bag) as stream:
        truth = read_truth(stream, None).poses
    moving: list[Transform] = []
    for stamp_ns, T_map_camera in truth.items():
        T_odom_base = inverse_pose(T_MAP_ODOM) @ T_map_camera @ inverse_pose(T_BASE_CAMERA)
        moving += [
            ("odom", "base_footprint", stamp_ns, T_odom_base @ inverse_pose(_T_FOOTPRINT_BASE)),
            ("base_footprint", "base_link", stamp_ns, _T_FOOTPRINT_BASE),
        ]
    add_transforms(bag, [("base_link", "camera", min(truth), T_BASE_CAMERA)], moving if odometry else [])
    return bag


def add_transforms(bag: Path, static: Sequence[Transform], moving: Sequence[Transform] = ()) -> None:
    """Put transforms on /tf_static and /tf of a bag, each in a message of its own, recorded at its stamp."""
    codec = MessageCodec()
    listed = [("/tf_static", item) for item in static] + [("/tf", item) for item in moving]
    added = [(topic, item[2], _message(codec, item)) for topic, item in listed]
    copy = bag.parent / "copy" / bag.name
    copy.parent.mkdir()
    with (
        AnyReader([bag], default_typestore=codec.typestore) as reader,
        Writer(copy, version=9, storage_plugin=StoragePlugin.MCAP) as writer,
    ):
        kinds = {c.topic: c.msgtype for c in reader.connections} | {topic: TF_TYPE for topic, _, _ in added}
        known = {t: writer.add_connection(t, kind, typestore=codec.typestore) for t, kind in kinds.items()}
        there = [(connection.topic, log_ns, raw) for connection, log_ns, raw in reader.messages()]
        for topic, log_ns, data in sorted(added + there, key=lambda item: item[1]):
            writer.write(known[topic], log_ns, data)
    shutil.rmtree(bag)
    copy.rename(bag)
    copy.parent.rmdir()


def _message(codec: MessageCodec, transform: Transform) -> bytes:
    parent, child, stamp_ns, T = transform
    types = codec.typestore.types
    seconds, nanoseconds = divmod(stamp_ns, 10**9)
    stamped = types["geometry_msgs/msg/TransformStamped"](
        header=types["std_msgs/msg/Header"](
            stamp=types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds), frame_id=parent
        ),
        child_frame_id=child,
        transform=types["geometry_msgs/msg/Transform"](
            translation=types["geometry_msgs/msg/Vector3"](*(float(v) for v in T[:3, 3])),
            rotation=types["geometry_msgs/msg/Quaternion"](*(float(v) for v in matrix_to_quaternion(T[:3, :3]))),
        ),
    )
    return bytes(codec.typestore.serialize_cdr(types[TF_TYPE](transforms=[stamped]), TF_TYPE))
