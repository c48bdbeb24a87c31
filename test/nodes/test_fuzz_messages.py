# SPDX-License-Identifier: Apache-2.0
"""Whatever a message holds, reading it gives something sound or one of the project's own errors."""

from __future__ import annotations

import array
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed: `make setup-dev` brings it")
pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, Pose, PoseWithCovariance, PoseWithCovarianceStamped, Quaternion
from hypothesis import strategies as st
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import COARSE_CHANNELS, FINE_CHANNELS, BackboneFeatures
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.messages.camera_info import camera_from_info, fill_info, in_words, shared_view
from kfloc_ros.messages.features import fill_features
from kfloc_ros.messages.images import (
    _LAYOUTS,
    ENCODINGS,
    MAX_SIDE_PX,
    decode_compressed,
    decode_depth_message,
    decode_image,
    fill_image,
)
from kfloc_ros.messages.poses import StampGuard, fill_stamp, pose_from_message, stamp_to_ns
from kfloc_ros.messages.transforms import TransformTree, TransformUnknownError
from kfloc_ros.nodes.adapters import make_joiner
from kfloc_ros.nodes.handover import COARSE_TOPICS, FRAME_TOPICS, read_coarse
from kfloc_ros.nodes.health import make_status
from kfloc_ros.nodes.initial_pose import InitialPoseError, completed, nearest, read_initial_pose, spread
from kfloc_ros.nodes.pose_file import FORMAT, PoseFileError, load_pose

pytestmark = pytest.mark.ros

Fuzz = Callable[..., None]

HARD = st.sampled_from([0.0, -0.0, 1e-310, 1e-9, 1.0, -1.0, 1e8, 1e155, 1e200, 1e308, math.inf, -math.inf, math.nan])
NUMBERS = st.one_of(HARD, st.floats(), st.floats(-1000.0, 1000.0))
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([32_766, 32_767, 32_768, 65_536, 2**31, 2**32 - 1]))
STAMPS = st.builds(
    Time,
    sec=st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1, 2**31 - 1, -(2**31)])),
    nanosec=st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 10**9, 2**32 - 1])),
)
WORDS = st.one_of(
    st.sampled_from(["", "map", "/map", "base", "camera"]), st.text(st.characters(codec="utf-8"), max_size=9)
)


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Often right, sometimes off by a little, sometimes anything."""
    encoding = draw(st.one_of(st.sampled_from(ENCODINGS), WORDS))
    width, height = draw(SIZES), draw(SIZES)
    layout = _LAYOUTS.get(encoding)
    row_bytes = width * layout.channels * layout.bits // 8 if layout else width
    step = draw(st.one_of(st.just(row_bytes), st.just(row_bytes + 3), SIZES)) % 2**32
    right = min(step * height, 5000)
    data = draw(st.one_of(st.just(bytes(right)), st.binary(max_size=64), st.just(bytes(max(right - 1, 0)))))
    return Image(
        encoding=encoding, width=width, height=height, step=step, data=array.array("B", data),
        is_bigendian=draw(st.integers(0, 1)),
    )  # fmt: skip


def test_any_image_is_decoded_or_refused(fuzz: Fuzz) -> None:
    def check(message: Image) -> None:
        try:
            rgb = decode_image(message)
        except FrameError:
            return
        assert rgb.shape == (message.height, message.width, 3) and rgb.dtype == np.uint8

    fuzz(check, images())


PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
FILES = [cv2.imencode(kind, PICTURE)[1].tobytes() for kind in (".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm")]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 8))):  # most of what is read first is at the front
        at = draw(st.one_of(st.integers(0, 40), st.integers(0, len(data) - 1)))
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def test_any_compressed_image_is_decoded_or_refused(fuzz: Fuzz) -> None:
    def check(data: bytes) -> None:
        try:
            rgb = decode_compressed(CompressedImage(format="jpeg", data=array.array("B", data)))
        except FrameError:
            return
        assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8

    fuzz(check, st.one_of(damaged_files(), st.binary(max_size=200)))


DEPTH_FILE = cv2.imencode(".png", np.random.default_rng(0).integers(0, 9000, (24, 32), dtype=np.uint16))[1].tobytes()


@st.composite
def depth_messages(draw: st.DrawFn) -> tuple[Any, bool]:
    """Raw and compressed depth, often right, sometimes anything."""
    if draw(st.booleans()):
        message = draw(images())
        message.encoding = draw(st.sampled_from(["16UC1", "mono16", "32FC1", "rgb8"]))
        return message, False
    data = bytearray(draw(st.binary(min_size=12, max_size=12)) + DEPTH_FILE)
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.one_of(st.integers(0, 50), st.integers(0, len(data) - 1)))] = draw(st.integers(0, 255))
    cut = data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]
    words = draw(
        st.sampled_from(["16UC1; compressedDepth png", "32FC1; compressedDepth", "16UC1; png compressed ", ""])
    )
    return CompressedImage(format=words, data=array.array("B", bytes(cut))), True


def test_any_depth_image_is_metres_or_refused(fuzz: Fuzz) -> None:
    def check(given: tuple[Any, bool]) -> None:
        try:
            depth_m = decode_depth_message(*given)
        except FrameError:
            return
        assert depth_m.ndim == 2 and depth_m.dtype == np.float32
        assert np.isfinite(depth_m).all() and (depth_m >= 0).all()

    fuzz(check, depth_messages(), share=2.0)


MODELS = st.one_of(st.sampled_from(["", "plumb_bob", "rational_polynomial", "equidistant", "fisheye"]), WORDS)


@st.composite
def camera_infos(draw: st.DrawFn) -> CameraInfo:
    """A good one with some values replaced by any."""
    message = fill_info(CameraInfo(), Camera(32, 24, 30.0, 30.0, 15.5, 11.5))
    message.distortion_model = draw(MODELS)
    message.d = draw(st.lists(NUMBERS, max_size=9))
    message.width, message.height = draw(st.one_of(st.just(32), SIZES)), draw(st.one_of(st.just(24), SIZES))
    for name, length in (("k", 9), ("p", 12)):
        for place in draw(st.lists(st.integers(0, length - 1), max_size=3)):
            getattr(message, name)[place] = draw(NUMBERS)
    if draw(st.booleans()):
        for name in ("x_offset", "y_offset", "width", "height"):
            setattr(message.roi, name, draw(SIZES))
    message.binning_x, message.binning_y = draw(SIZES), draw(SIZES)
    return message


def test_any_camera_info_is_a_camera_or_refused(fuzz: Fuzz) -> None:
    target = Camera(64, 32, 50.0, 50.0, 31.5, 15.5)

    def check(message: CameraInfo, rectified: bool) -> None:
        try:
            camera = camera_from_info(message, rectified=rectified)
        except FrameError:
            return
        with np.errstate(all="ignore"):
            assert 0.0 <= shared_view(camera, target) <= 1.0 and in_words(camera)
            if camera.width * camera.height < 100_000 and max(camera.width, camera.height) <= MAX_SIDE_PX:
                adapted = ImageAdapter(camera, target)(np.zeros((camera.height, camera.width, 3), np.uint8))
                assert adapted.shape == (32, 64, 3)

    fuzz(check, camera_infos(), st.booleans())


POSES = st.builds(
    Pose,
    position=st.builds(Point, x=NUMBERS, y=NUMBERS, z=NUMBERS),
    orientation=st.one_of(
        st.just(Quaternion(w=1.0)), st.builds(Quaternion, x=NUMBERS, y=NUMBERS, z=NUMBERS, w=NUMBERS)
    ),
)
COVARIANCES = st.one_of(st.just([0.1] * 36), st.lists(NUMBERS, min_size=36, max_size=36))
INITIAL_POSES = st.builds(
    PoseWithCovarianceStamped,
    header=st.builds(Header, frame_id=WORDS, stamp=STAMPS),
    pose=st.builds(PoseWithCovariance, pose=POSES, covariance=COVARIANCES),
)


def test_any_initial_pose_is_a_few_finite_starts_or_refused(fuzz: Fuzz) -> None:
    views = np.stack([make_pose(so3_exp([0.0, 0.0, 0.1 * i]), [i, 0, 1]) for i in range(3)])

    def check(message: PoseWithCovarianceStamped) -> None:
        try:
            given = read_initial_pose(message)
        except InitialPoseError:
            return
        T = given.T_frame_base
        if given.is_flat:
            T = completed(T, nearest(T, views))
        starts = spread(T, given.covariance)
        assert 1 <= len(starts) <= 27 and all(np.isfinite(start).all() for start in starts)

    fuzz(check, INITIAL_POSES)


EDGES = st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), STAMPS, POSES, st.booleans())


def test_any_transforms_give_a_finite_answer_or_none(fuzz: Fuzz) -> None:
    def check(edges: list[Any], target: str, source: str, stamp: Time) -> None:
        buffer = TransformTree()
        for parent, child, at, pose, static in edges:
            try:
                T = pose_from_message(pose)
            except ValueError:
                continue
            buffer.set(parent, child, stamp_to_ns(at), T, static=static)
        times = [0, stamp_to_ns(stamp), *(stamp_to_ns(edge[2]) for edge in edges)]
        for time_ns in times:
            try:
                T = buffer.lookup(target, source, time_ns)
            except TransformUnknownError:
                continue
            assert np.isfinite(T).all() and np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-6)

    fuzz(check, st.lists(EDGES, max_size=6), st.sampled_from("abcd"), st.sampled_from("abcd"), STAMPS)


def test_any_stamps_are_accepted_dropped_or_refused(fuzz: Fuzz) -> None:
    def check(stamps: list[Time]) -> None:
        guard = StampGuard(0.5)
        for stamp in stamps:
            try:
                said = guard.fault(stamp_to_ns(stamp))
            except FrameError:
                continue
            assert isinstance(said, str)
            fill_stamp(Time(), stamp_to_ns(stamp) + 10**13)  # what is accepted can be sent on, and hours later too

    fuzz(check, st.lists(STAMPS, max_size=8))


VALUES = st.one_of(
    st.sampled_from(["", "nan", "inf", "-1", "1e400", "9" * 30, "9" * 5000, "true", "0x10", "٣", "1_000"]), WORDS
)
GOOD_FRAME = {
    "receipt_unix_ns": "1",
    "index": 0,
    "received": 1,
    "processed": 0,
    "dropped": 0,
    "refused": 0,
    "failed": 0,
    "fx": 30.0,
    "fy": 30.0,
    "cx": 15.5,
    "cy": 11.5,
}
GOOD_COARSE = {
    **{key: GOOD_FRAME[key] for key in ("received", "processed", "dropped", "refused", "failed")}, "success": True,
    "reason": "", "inliers": 50, "inlier_ratio": 0.5, "prior_ratio": 0.5, "nis": 3.0, "rejected_ratio": 0.1,
    "filter_reset": "", "backbone_ms": 3.0, "T_map_camera": " ".join(map(str, np.eye(4).ravel())),
    "covariance": " ".join(map(str, np.eye(6).ravel())),
}  # fmt: skip


def statuses(good: dict[str, Any]) -> st.SearchStrategy[DiagnosticArray]:
    changes = st.dictionaries(
        st.one_of(st.sampled_from(list(good)), WORDS.map(lambda w: f"{w}_ms")), VALUES, max_size=3
    )
    return st.builds(lambda change: make_status(5, "frame", {**good, **change}), changes)


FEATURES = BackboneFeatures(
    coarse=torch.nn.functional.normalize(torch.rand(1, COARSE_CHANNELS, 3, 4)),
    fine=torch.nn.functional.normalize(torch.rand(1, FINE_CHANNELS, 6, 8)),
    context=torch.empty(1, 0, 3, 4),
    reliability=torch.rand(1, 3, 4),
)


def test_any_packets_between_the_nodes_are_a_frame_or_refused(fuzz: Fuzz) -> None:
    def check(image: Any, frame: Any, coarse: Any, change: dict[str, Any], stamp: Time) -> None:
        features = fill_features(CompressedImage(), FEATURES)
        for name, value in change.items():
            setattr(features, name, value)
        messages = {
            "frame/image": image, "frame/status": frame, "coarse_status": coarse, "frame/features": features,
        }  # fmt: skip
        assert messages.keys() == FRAME_TOPICS.keys() | COARSE_TOPICS.keys()
        joined: list[Any] = []
        joiner = make_joiner(tuple(messages), joined.append)
        for topic, message in messages.items():
            message.header.stamp = stamp
            joiner.add(topic, message)
        for parts in joined:
            try:
                packet = read_coarse(parts)
            except FrameError:
                continue
            result = packet.result
            assert packet.camera.latency_ms() < 1e13 and packet.camera.frame.image.dtype == np.uint8
            assert all(0 <= value < math.inf for value in result.timings_ms.values())
            assert result.features is not None and result.features.coarse.isfinite().all()
            if result.pose.T_map_camera is not None:
                assert np.isfinite(result.pose.T_map_camera).all() and np.isfinite(result.pose.covariance).all()

    fuzz(
        check,
        st.one_of(st.builds(lambda: fill_image(Image(), PICTURE)), images()),
        statuses(GOOD_FRAME),
        statuses(GOOD_COARSE),
        st.one_of(
            st.just({}), st.fixed_dictionaries({}, optional={"format": WORDS, "data": st.binary(max_size=40).map(list)})
        ),
        STAMPS,
    )


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)
GOOD_POSE = {
    "format": FORMAT, "version": 1, "map": "room", "stamp_ns": 3, "T_map_camera": np.eye(4).tolist(),
    "covariance": np.eye(6).tolist(),
}  # fmt: skip


def test_any_pose_file_is_a_pose_or_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    path = tmp_path / "pose.json"

    def check(content: bytes | dict[str, Any]) -> None:
        data = content if isinstance(content, bytes) else json.dumps({**GOOD_POSE, **content}).encode()
        path.write_bytes(data)
        try:
            saved = load_pose(path, "room")
        except PoseFileError:
            return
        assert saved is not None and np.isfinite(saved.T_map_camera).all() and np.isfinite(saved.covariance).all()

    fuzz(check, st.one_of(st.dictionaries(st.sampled_from(list(GOOD_POSE)), JSON, max_size=3), st.binary(max_size=60)))
