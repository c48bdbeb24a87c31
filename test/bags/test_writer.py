# SPDX-License-Identifier: Apache-2.0
"""Bags written without ROS: complete, faithful, and never half-written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import Reader

from kfloc_ros.bags.topics import CAMERA_INFO_TOPIC, DEPTH_TOPIC, IMAGE_TOPIC, TF_TOPIC, TOPIC_TYPES, TRUTH_TOPIC
from kfloc_ros.bags.writer import MessageCodec, encode_jpeg, write_bag
from kfloc_ros.datasets import FrameSource, select
from kfloc_ros.datasets.ros_bag import RosBag
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import DerivedSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.messages.poses import stamp_to_ns
from kfloc_ros.types import Frame

CAMERA = Camera(64, 48, 60.0, 61.0, 31.5, 23.5, "plumb_bob", (0.1, -0.05, 0.001, 0.002, 0.01))
START_NS = 1_700_000_000_000_000_003  # needs all 64 bits and nanoseconds


class Pictures(FrameSource):
    """Random pictures, depth and poses; the third frame has neither depth nor pose."""

    name = "pictures"

    def __init__(
        self, count: int = 5, *, period_ns: int = 40_000_001, recorded: bool = False, fail_at: int = -1
    ) -> None:
        self._count, self._period_ns, self._recorded, self._fail_at = count, period_ns, recorded, fail_at

    @property
    def camera(self) -> Camera:
        return CAMERA

    def __len__(self) -> int:
        return self._count

    def indices(self) -> Sequence[int]:
        return range(self._count)

    def __getitem__(self, position: int) -> Frame:
        if position == self._fail_at:
            raise KeyboardInterrupt
        rng = np.random.default_rng(position)
        bare = position == 2
        image = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        pose = make_pose(so3_exp(rng.normal(size=3)), rng.normal(size=3))
        depth_m = rng.uniform(0.4, 9.0, (48, 64)).astype(np.float32)
        return Frame(
            image, CAMERA, START_NS + position * self._period_ns, position,
            depth_m=None if bare else depth_m, T_map_camera=None if bare else pose,
        )  # fmt: skip

    def encoded_image(self, position: int) -> bytes | None:
        return encode_jpeg(self[position].image).tobytes() + b"tail" if self._recorded else None


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    source = Pictures()
    report = write_bag(source, tmp_path / "bag")
    assert (report.frames, report.with_depth, report.with_truth) == (5, 4, 4)
    assert report.duration_s == pytest.approx(4 * 0.040000001)
    bag = RosBag(tmp_path / "bag", {})
    assert bag.camera == CAMERA and len(bag) == 5 and list(bag.indices()) == [0, 1, 2, 3, 4]
    for position in (4, 0, 2, 1, 3):
        wrote, read = source[position], bag[position]
        assert read.stamp_ns == wrote.stamp_ns and read.index == position
        assert np.abs(read.image.astype(int) - wrote.image).mean() < 3
        if wrote.T_map_camera is None or wrote.depth_m is None:
            assert read.T_map_camera is None and read.depth_m is None
        else:
            np.testing.assert_allclose(read.T_map_camera, wrote.T_map_camera, atol=1e-12)
            np.testing.assert_allclose(read.depth_m, wrote.depth_m, atol=0.51e-3)


def test_message_types_frames_and_times_are_those_of_a_recording(tmp_path: Path) -> None:
    write_bag(Pictures(), tmp_path / "bag")
    codec = MessageCodec()
    with Reader(tmp_path / "bag") as reader:
        counts = {c.topic: (c.msgtype, c.msgcount) for c in reader.connections}
        assert counts == {
            topic: (TOPIC_TYPES[topic], 5 if topic in (IMAGE_TOPIC, CAMERA_INFO_TOPIC) else 4)
            for topic in (IMAGE_TOPIC, CAMERA_INFO_TOPIC, DEPTH_TOPIC, TRUTH_TOPIC, TF_TOPIC)
        }
        for connection, logged_ns, data in reader.messages():
            message = codec.decode(data, connection.msgtype)
            header = message.transforms[0] if connection.topic == TF_TOPIC else message
            assert stamp_to_ns(header.header.stamp) == logged_ns
            expected = "map" if connection.topic in (TRUTH_TOPIC, TF_TOPIC) else "camera"
            assert header.header.frame_id == expected
            if connection.topic == TF_TOPIC:
                assert header.child_frame_id == "camera_ground_truth"


def test_recorded_jpegs_are_stored_byte_for_byte(tmp_path: Path) -> None:
    source = Pictures(2, recorded=True)
    write_bag(source, tmp_path / "bag")
    assert RosBag(tmp_path / "bag", {}).encoded_image(1) == source.encoded_image(1)


def test_a_selection_and_no_depth(tmp_path: Path) -> None:
    write_bag(select(Pictures(), frames="1,3:5"), tmp_path / "bag", depth=False)
    bag = RosBag(tmp_path / "bag", {})
    assert [frame.stamp_ns for frame in bag] == [START_NS + i * 40_000_001 for i in (1, 3, 4)]
    assert all(frame.depth_m is None for frame in bag)


def test_an_interruption_leaves_nothing_and_keeps_the_old_bag(tmp_path: Path) -> None:
    write_bag(Pictures(3), tmp_path / "bag")
    with pytest.raises(KeyboardInterrupt):
        write_bag(Pictures(5, fail_at=3), tmp_path / "bag", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]
    assert len(RosBag(tmp_path / "bag", {})) == 3
    with pytest.raises(KeyboardInterrupt):
        write_bag(Pictures(5, fail_at=3), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]


def test_overwriting_needs_force_and_a_bag(tmp_path: Path) -> None:
    write_bag(Pictures(3), tmp_path / "bag")
    with pytest.raises(SourceError, match="--force"):
        write_bag(Pictures(2), tmp_path / "bag")
    write_bag(Pictures(2), tmp_path / "bag", force=True)
    assert len(RosBag(tmp_path / "bag", {})) == 2
    (tmp_path / "thesis").mkdir()
    with pytest.raises(SourceError, match="not a rosbag2 folder"):
        write_bag(Pictures(2), tmp_path / "thesis", force=True)


def test_stamps_must_increase(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="do not increase"):
        write_bag(Pictures(period_ns=0), tmp_path / "bag")
    assert list(tmp_path.iterdir()) == []


class Unreadable(DerivedSource):
    """A source of which two frames cannot be read, the first among them."""

    def changed(self, frame: Frame, position: int) -> Frame:
        if position in (0, 3):
            raise FrameError(f"frame {position} is cut off")
        return frame


def test_frames_that_cannot_be_read_are_not_in_the_bag(tmp_path: Path) -> None:
    report = write_bag(Unreadable(Pictures()), tmp_path / "bag")
    assert (report.frames, report.with_depth, report.with_truth) == (3, 2, 2)
    assert report.duration_s == pytest.approx(3 * 0.040000001)
    stamps = [frame.stamp_ns for frame in RosBag(tmp_path / "bag", {})]
    assert stamps == [START_NS + k * 40_000_001 for k in (1, 2, 4)]
