# SPDX-License-Identifier: Apache-2.0
"""What is read of a bag for a replay, and what is said of bags that cannot be played."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.writer import write_bag
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.replay.bag_stream import COMPRESSED, BagStream, ReplayRange
from kfloc_ros.types import Frame

PERIOD_NS = 100_000_000
START_NS = 1_700_000_000_123_456_789


class Grey(FrameSource):
    """Ten small frames at 10 Hz with depth and truth."""

    name = "grey"
    camera = Camera(32, 24, 30.0, 30.0, 15.5, 11.5)

    def __len__(self) -> int:
        return 10

    def indices(self) -> Sequence[int]:
        return range(10)

    def __getitem__(self, i: int) -> Frame:
        image = np.full((24, 32, 3), 20 * i, np.uint8)
        pose = make_pose(so3_exp([0.1 * i, 0.0, 0.2]), [float(i), 0.0, 1.0])
        depth = np.full((24, 32), 2.0, np.float32)
        return Frame(image, self.camera, START_NS + i * PERIOD_NS, i, depth_m=depth, T_map_camera=pose)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "grey"
    write_bag(Grey(), path)
    return path


def test_images_and_calibration_come_in_order_with_their_stamps(bag: Path) -> None:
    with BagStream(bag) as stream:
        events = list(stream.events(ReplayRange()))
        assert stream.transport == "compressed"
    images = [event for event in events if event.is_image]
    assert [event.stamp_ns for event in images] == [START_NS + i * PERIOD_NS for i in range(10)]
    assert sum(not event.is_image for event in events) == 10
    assert [event.log_ns for event in events] == sorted(event.log_ns for event in events)
    message = get_typestore(Stores.ROS2_JAZZY).deserialize_cdr(images[3].data, COMPRESSED)
    assert message.header.frame_id == "camera" and bytes(message.data[:2]) == b"\xff\xd8"


def test_truth_and_positions_go_by_stamp(bag: Path) -> None:
    with BagStream(bag) as stream:
        truth, positions = stream.truth(), stream.positions()
    for i in range(10):
        stamp_ns = START_NS + i * PERIOD_NS
        np.testing.assert_allclose(truth[stamp_ns], Grey()[i].T_map_camera, atol=1e-12)
        assert positions[stamp_ns] == i


def test_a_part_begins_with_a_calibration(bag: Path) -> None:
    part = ReplayRange(start_s=0.35, duration_s=0.3)
    with BagStream(bag) as stream:
        events = list(stream.events(part))
        assert stream.image_count(part) == 3
    assert not events[0].is_image
    assert [event.stamp_ns for event in events if event.is_image] == [START_NS + i * PERIOD_NS for i in (4, 5, 6)]
    assert len({event.log_ns for event in events[:2]}) == 1


def test_a_topic_that_is_not_there_is_answered_with_those_that_are(bag: Path) -> None:
    with pytest.raises(SourceError, match="/camera/image/compressed"):
        BagStream(bag, image_topic="/left/image")


@pytest.mark.parametrize("damage", ["missing", "not a bag", "cut short"])
def test_unreadable_bags_are_one_sentence(damage: str, bag: Path, tmp_path: Path) -> None:
    path = tmp_path / "bag"
    if damage != "missing":
        path.mkdir()
    if damage == "cut short":
        (path / "metadata.yaml").write_bytes((bag / "metadata.yaml").read_bytes())
        (path / "grey.mcap").write_bytes((bag / "grey.mcap").read_bytes()[:2000])
    with pytest.raises(SourceError, match="bag"), BagStream(path) as stream:
        list(stream.events(ReplayRange()))


def test_several_cameras_are_not_guessed_among(tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    with Writer(tmp_path / "two", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for side in ("left", "right"):
            writer.add_connection(f"/{side}/image/compressed", COMPRESSED, typestore=store)
            writer.add_connection(f"/{side}/camera_info", "sensor_msgs/msg/CameraInfo", typestore=store)
    with pytest.raises(SourceError, match=r"/left/image/compressed.*/right/image/compressed"):
        BagStream(tmp_path / "two")
    with BagStream(tmp_path / "two", image_topic="/right/image/compressed") as stream:
        assert stream.transport == "compressed"
