# SPDX-License-Identifier: Apache-2.0
"""``message_filters``, ``cv_bridge`` and ``tf_transformations``, and what stands in for each: the same tests for both.

The tests with the real packages run where those are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from builtin_interfaces.msg import Time
from geometry_msgs.msg import Pose, PoseStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from sensor_msgs.msg import Image

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.lie import rotation_angle_deg, so3_exp
from kfloc_ros.messages.images import ENCODINGS, decode_image
from kfloc_ros.messages.poses import Quaternions, fill_pose, pose_from_message, use_quaternions
from kfloc_ros.nodes.adapters import MAX_INCOMPLETE, FilterJoiner, ImageBridge, Joiner, StampJoiner
from kfloc_ros.nodes.runtime import ros_quaternions

pytestmark = pytest.mark.ros


def real(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.param(package, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


# -- message_filters


@pytest.fixture(params=["own", real("message_filters")])
def make(request: pytest.FixtureRequest) -> Callable[..., Joiner]:
    return StampJoiner if request.param == "own" else FilterJoiner


def stamped(stamp_ms: int, text: str = "") -> PoseStamped:
    message = PoseStamped()
    message.header.stamp = Time(sec=stamp_ms // 1000, nanosec=stamp_ms % 1000 * 1_000_000)
    message.header.frame_id = text
    return message


def test_a_set_is_passed_on_once_and_what_is_older_is_forgotten(make: Callable[..., Joiner]) -> None:
    complete: list[Any] = []
    joiner = make(("a", "b"), complete.append)
    joiner.add("a", stamped(100, "first"))
    joiner.add("a", stamped(200, "second"))
    joiner.add("b", stamped(200))
    joiner.add("b", stamped(200))
    joiner.add("b", stamped(100))  # too late: its frame was overtaken
    assert [sorted(found) for found in complete] == [["a", "b"]]
    assert complete[0]["a"].header.frame_id == "second"


def test_three_topics_come_in_any_order(make: Callable[..., Joiner]) -> None:
    complete: list[Any] = []
    joiner = make(("image", "depth", "camera_info"), complete.append)
    for stamp_ms in range(100, 1100, 100):
        for topic in np.random.default_rng(stamp_ms).permutation(["image", "depth", "camera_info"]):
            joiner.add(str(topic), stamped(stamp_ms))
    stamps = [found["depth"].header.stamp for found in complete]
    assert [stamp.nanosec // 10**6 + 1000 * stamp.sec for stamp in stamps] == list(range(100, 1100, 100))


def test_a_joiner_works_after_a_jump_back_and_keeps_little(make: Callable[..., Joiner]) -> None:
    complete: list[Any] = []
    joiner = make(("a", "b"), complete.append)
    for second in range(100, 1100):
        joiner.add("a", stamped(1000 * second))
    for stamp_ms in range(5000, 6000, 100):
        joiner.add("a", stamped(stamp_ms))
        joiner.add("b", stamped(stamp_ms))
    assert len(complete) == 10
    joiner.add("b", stamped(1_099_000))
    assert len(complete) == 10


def test_a_long_wait_discards_the_oldest(make: Callable[..., Joiner]) -> None:
    complete: list[Any] = []
    joiner = make(("a", "b"), complete.append)
    for k in range(1, MAX_INCOMPLETE + 2):
        joiner.add("a", stamped(100 * k))
    joiner.add("b", stamped(100))
    assert complete == []
    joiner.add("b", stamped(100 * (MAX_INCOMPLETE + 1)))
    assert len(complete) == 1


def test_an_error_behind_a_joiner_does_not_stop_it(make: Callable[..., Joiner]) -> None:
    seen: list[Any] = []

    def fail_once(found: Any) -> None:
        seen.append(found)
        if len(seen) == 1:
            raise RuntimeError("once")

    joiner = make(("a", "b"), fail_once)
    joiner.add("a", stamped(100))
    with pytest.raises(RuntimeError):
        joiner.add("b", stamped(100))
    joiner.add("a", stamped(200))
    joiner.add("b", stamped(200))
    assert len(seen) == 2


# -- cv_bridge


@pytest.fixture(params=["own", real("cv_bridge")])
def bridge(request: pytest.FixtureRequest) -> ImageBridge:
    if request.param == "own":
        return ImageBridge()
    from cv_bridge import CvBridge

    return ImageBridge(CvBridge())


def image_message(encoding: str, width: int, height: int, padding: int, big_endian: bool, seed: int) -> Image:
    per_pixel = {"rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4, "8UC3": 3, "8UC4": 4}
    channels = next((n for name, n in sorted(per_pixel.items(), reverse=True) if encoding.startswith(name)), 1)
    size = channels * (2 if encoding.endswith("16") or encoding.startswith(("yuv", "uyvy", "yuyv")) else 1)
    message = Image(encoding=encoding, width=width, height=height, step=width * size + padding)
    message.is_bigendian = int(big_endian)
    rows = height * 3 // 2 if encoding in ("nv12", "nv21") else height  # these have their chroma below the image
    content = np.random.default_rng(seed).integers(0, 256, rows * message.step, dtype=np.uint8)
    message.data.frombytes(content.tobytes())
    return message


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    st.sampled_from(ENCODINGS),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 7),
    st.booleans(),
    st.integers(0, 9),
)
def check_images(bridge: ImageBridge, encoding: str, w: int, h: int, padding: int, big: bool, seed: int) -> None:
    message = image_message(encoding, 2 * w, 2 * h, padding, big, seed)
    assert np.array_equal(bridge.decode(message), decode_image(message))


def test_every_encoding_size_and_padding_gives_the_same_pixels(bridge: ImageBridge) -> None:
    check_images(bridge)


@pytest.mark.parametrize("change", [{"step": 3}, {"height": 9}, {"width": 0}, {"encoding": "32FC1"}, {"encoding": "?"}])
def test_what_is_no_image_is_refused_with_a_sentence(bridge: ImageBridge, change: dict[str, Any]) -> None:
    message = image_message("rgb8", 8, 6, 0, False, 0)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(FrameError):
        bridge.decode(message)


def test_an_image_is_filled_and_read_back(bridge: ImageBridge) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (6, 16, 3), dtype=np.uint8)
    for image in (wide, wide[:, ::2], wide[::-1]):
        message = bridge.encode(image)
        assert (message.encoding, message.height, message.step) == ("rgb8", 6, 3 * image.shape[1])
        assert not message.is_bigendian
        assert np.array_equal(bridge.decode(message), image)


def test_a_bridge_that_fails_is_replaced() -> None:
    class Broken:
        def cv2_to_imgmsg(self, image: Any, encoding: str) -> Any:
            raise TypeError("compiled for another OpenCV")

        def imgmsg_to_cv2(self, message: Any, desired_encoding: str) -> Any:
            raise AttributeError("numpy.ndarray has no newbyteorder")

    image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    bridge = ImageBridge(Broken())
    assert np.array_equal(bridge.decode(bridge.encode(image)), image)


# -- tf_transformations


@pytest.fixture(params=["own", real("tf_transformations")])
def quaternions(request: pytest.FixtureRequest) -> Quaternions:
    return Quaternions() if request.param == "own" else ros_quaternions()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.floats(-4, 4), min_size=3, max_size=3), st.floats(0.1, 10))
def check_rotations(quaternions: Quaternions, vector: list[float], scale: float) -> None:
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = so3_exp(vector), [1, 2, 3]
    use_quaternions(quaternions)
    try:
        fill_pose(message := Pose(), T)
        q = message.orientation
        assert q.w >= 0 and abs(q.x**2 + q.y**2 + q.z**2 + q.w**2 - 1) < 1e-12
        q.x, q.y, q.z, q.w = scale * q.x, scale * q.y, scale * q.z, scale * q.w
        read = pose_from_message(message)
    finally:
        use_quaternions(Quaternions())
    assert np.allclose(read, T, atol=1e-9)
    assert rotation_angle_deg(read[:3, :3].T @ so3_exp(vector)) < 1e-5


def test_rotations_survive_the_border(quaternions: Quaternions) -> None:
    check_rotations(quaternions)


def test_no_rotation_is_refused(quaternions: Quaternions) -> None:
    use_quaternions(quaternions)
    try:
        for q in ((0.0, 0.0, 0.0, 0.0), (np.nan, 0.0, 0.0, 1.0), (np.inf, 0.0, 0.0, 1.0)):
            message = Pose()
            message.orientation.x, message.orientation.y, message.orientation.z, message.orientation.w = q
            with pytest.raises(ValueError, match="quaternion"):
                pose_from_message(message)
    finally:
        use_quaternions(Quaternions())
