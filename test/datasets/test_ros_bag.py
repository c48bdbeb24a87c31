# SPDX-License-Identifier: Apache-2.0
"""Bags of users: poses by topic or by transforms, extrinsics, depth of another camera; no guess between two topics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
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
    with Writer2(path, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections: dict[str, Any] = {}
        for topic, k, message in recording(poses, depth_frame):
            for name in [topic] + ([extra] if extra and topic == "/cam/color/image_raw" else []):
                if name not in connections:
                    connections[name] = writer.add_connection(name, message.__msgtype__, typestore=STORE)
                data = STORE.serialize_cdr(message, message.__msgtype__)
                writer.write(connections[name], int(6e9 + k * 100e6), data)
    return path


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
