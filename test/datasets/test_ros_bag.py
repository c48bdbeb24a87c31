# SPDX-License-Identifier: Apache-2.0
"""Bags of users: poses by topic or by transforms, extrinsics, depth of another camera; no guess between two topics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_messages import (
    DEPTH_ON_COLOR,
    OPTICAL,
    body_pose,
    header,
    image,
    info,
    msg,
    odometry,
    pose,
    transforms,
    write_messages,
)
from rosbags.rosbag1 import Writer as Writer1
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError


def recording(poses: tuple[str, ...], depth_frame: str) -> Iterator[tuple[str, float, Any]]:
    """Three images with depth 8 ms late; poses lie between the images, so that they have to be interpolated."""
    static = [(0.0, "base_link", "color_optical", OPTICAL), (0.0, "color_optical", "depth_optical", DEPTH_ON_COLOR)]
    yield "/tf_static", 0, transforms(*static)
    for k in (-0.5, 0.5, 1.5, 2.5):
        if "odom" in poses:
            yield "/odom", k, odometry(k)
        if "tf" in poses:
            yield "/tf", k, transforms((k, "map", "odom", np.eye(4)), (k, "odom", "base_link", body_pose(k)))
        if "pose" in poses:
            T = body_pose(k) @ OPTICAL
            yield "/mocap", k, msg("geometry_msgs/PoseStamped", header=header(k, "map"), pose=pose(T))
    for k in range(3):
        yield "/cam/color/camera_info", k, info(k, "color_optical", 40, 30)
        yield "/cam/color/image_raw", k, image(k, "color_optical", np.full((30, 40, 3), 50 * k, np.uint8), "bgr8")
        late = k + 0.08
        yield "/cam/depth/camera_info", late, info(late, depth_frame, 40, 30)
        depth = np.full((30, 40), 2000, np.uint16)
        yield "/cam/depth/image_rect_raw", late, image(late, depth_frame, depth, "16UC1")


def write(path: Path, poses: tuple[str, ...], depth_frame: str = "color_optical", extra: str = "") -> Path:
    def messages() -> Iterator[tuple[str, float, Any]]:
        for topic, k, message in recording(poses, depth_frame):
            yield topic, k, message
            if extra and topic == "/cam/color/image_raw":
                yield extra, k, message

    return write_messages(path, messages())


@pytest.mark.parametrize("kind", ["odom", "tf", "pose"])
def test_poses_come_from_a_topic_or_the_transforms(tmp_path: Path, kind: str) -> None:
    frames = list(open_source(str(write(tmp_path / "bag", (kind,)))))
    assert len(frames) == 3
    for k, frame in enumerate(frames):
        assert frame.T_map_camera is not None and frame.depth_m is not None
        np.testing.assert_allclose(frame.T_map_camera, body_pose(k) @ OPTICAL, atol=2e-3)
        assert frame.camera.cx == 19.5 and float(np.median(frame.depth_m)) == pytest.approx(2.0)
        assert int(frame.image[0, 0, 0]) == 50 * k


def test_between_two_sources_of_pose_the_user_chooses(tmp_path: Path) -> None:
    bag = write(tmp_path / "bag", ("odom", "tf"))
    with pytest.raises(SourceError, match=r"\?pose=/odom, \?pose=tf"):
        open_source(f"bag:{bag}")
    for choice in ("/odom", "tf"):
        assert open_source(f"bag:{bag}?pose={choice}")[0].T_map_camera is not None


def test_between_two_images_the_user_chooses(tmp_path: Path) -> None:
    bag = write(tmp_path / "bag", ("odom",), extra="/cam2/image_raw")
    with pytest.raises(SourceError, match="several image topics"):
        open_source(f"bag:{bag}")
    assert len(open_source(f"bag:{bag}?image=/cam/color/image_raw")) == 3


@pytest.mark.parametrize("words", ["?image=/no", "?colour=/x", "?image", "?pose=/nowhere"])
def test_a_wrong_choice_is_a_sentence(tmp_path: Path, words: str) -> None:
    with pytest.raises(SourceError):
        open_source(f"bag:{write(tmp_path / 'bag', ('odom',))}{words}")


def test_depth_of_another_camera_is_registered(tmp_path: Path) -> None:
    frame = open_source(f"bag:{write(tmp_path / 'bag', ('odom',), 'depth_optical')}")[1]
    assert frame.depth_m is not None
    columns = np.flatnonzero(frame.depth_m.max(axis=0) > 0)
    assert float(np.median(frame.depth_m[frame.depth_m > 0])) == pytest.approx(2.0)
    assert columns[0] in (1, 2)  # the depth camera sits 5 cm to the right: 1.25 pixels at 2 m


def test_without_extrinsics_odometry_is_refused(tmp_path: Path) -> None:
    bag = write(tmp_path / "bag", ("odom",))
    with pytest.raises(SourceError, match="tf_static"):
        open_source(f"bag:{bag}?body=torso")


def test_rosbag1_is_read(tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS1_NOETIC)
    path = tmp_path / "old.bag"

    def header1(k: int) -> Any:
        time = store.types["builtin_interfaces/msg/Time"](sec=5 + k, nanosec=0)
        return store.types["std_msgs/msg/Header"](seq=k, stamp=time, frame_id="cam")

    with Writer1(path) as writer:
        names = {"/cam/image": "sensor_msgs/msg/Image", "/cam/camera_info": "sensor_msgs/msg/CameraInfo"}
        connections = {t: writer.add_connection(t, kind, typestore=store) for t, kind in names.items()}
        for k in range(2):
            old = info(k, "cam", 40, 30)
            roi = store.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
            new = store.types[names["/cam/camera_info"]](
                header=header1(k), height=30, width=40, distortion_model="plumb_bob", D=old.d, K=old.k, R=old.r,
                P=old.p, binning_x=0, binning_y=0, roi=roi,
            )  # fmt: skip
            picture = store.types[names["/cam/image"]](
                header=header1(k), height=30, width=40, encoding="rgb8", is_bigendian=0, step=120,
                data=np.full(3600, 90, np.uint8),
            )  # fmt: skip
            for topic, message in (("/cam/camera_info", new), ("/cam/image", picture)):
                writer.write(connections[topic], (5 + k) * 10**9, store.serialize_ros1(message, message.__msgtype__))
    frames = list(open_source(str(path)))
    assert [frame.stamp_ns for frame in frames] == [5 * 10**9, 6 * 10**9]
    assert frames[0].camera.fx == 50 and frames[0].T_map_camera is None and frames[0].depth_m is None
