# SPDX-License-Identifier: Apache-2.0
"""What is read of a bag for a replay, and what is said of bags that cannot be played."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grey_frames import PERIOD_NS, START_NS, Grey
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.bags.topics import CAMERA_INFO as INFO
from kfloc_ros.bags.topics import COMPRESSED, ODOMETRY, RAW, TF_TYPE, TOPIC_TYPES, Topic, choose_image, choose_recorded
from kfloc_ros.bags.truth import read_truth
from kfloc_ros.bags.writer import MessageCodec, write_bag
from kfloc_ros.cli import main as cli
from kfloc_ros.errors import SourceError


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
        truth, positions = read_truth(stream, None).poses, stream.positions()
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


def a_bag(path: Path, topics: Sequence[tuple[str, str, str]]) -> Path:
    """A bag with one message on each topic (name, type, frame)."""
    store = get_typestore(Stores.ROS2_JAZZY)
    codec = MessageCodec()
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, kind, frame_id in topics:
            like = [data for name, data in codec.encode_frame(Grey()[0]) if TOPIC_TYPES[name] == kind][-1]
            message: Any = store.deserialize_cdr(like, kind)
            message.header.frame_id = frame_id
            connection = writer.add_connection(topic, kind, typestore=store)
            writer.write(connection, START_NS, store.serialize_cdr(message, kind))
    return path


def test_a_raw_and_a_compressed_camera_are_not_guessed_between(tmp_path: Path) -> None:
    path = a_bag(
        tmp_path / "bag", [("/left/image/compressed", COMPRESSED, "left"), ("/left/camera_info", INFO, "left")]
    )
    with BagStream(path) as stream:
        assert (stream.image.name, stream.image.frame_id) == ("/left/image/compressed", "left")
        assert stream.info.name == "/left/camera_info" and not stream.rectified


def test_a_calibration_of_another_frame_is_not_taken_for_granted(tmp_path: Path) -> None:
    path = a_bag(tmp_path / "bag", [("/left/image_rect/compressed", COMPRESSED, "left"), ("/info", INFO, "right")])
    with pytest.raises(SourceError, match=r"frame 'right'.*--camera-info-topic /info"):
        BagStream(path)
    with BagStream(path, info_topic="/info") as stream:
        assert stream.info.frame_id == "right" and stream.rectified


def test_a_copy_of_an_image_topic_is_no_second_camera_and_depth_is_none() -> None:
    topics = [
        Topic("/camera/image_raw", RAW, 9),
        Topic("/camera/image_raw/compressed", COMPRESSED, 9),
        Topic("/camera/depth/image_raw", RAW, 9, is_depth=True),
    ]
    assert choose_image(Path("b"), topics, None).name == "/camera/image_raw/compressed"
    assert choose_image(Path("b"), topics, "/camera/image_raw").kind == RAW
    with pytest.raises(SourceError, match=r"several image topics: /a, /camera/image_raw/compressed.*--image-topic"):
        choose_image(Path("b"), [Topic("/a", RAW, 1), *topics], None)


def test_a_recording_takes_the_camera_its_depth_and_what_moves() -> None:
    camera = [Topic("/camera/image_raw", RAW, 1), Topic("/camera/camera_info", INFO, 1)]
    depth = [Topic("/depth/image_raw", RAW, 1, is_depth=True), Topic("/depth/camera_info", INFO, 1, is_depth=True)]
    rest = [Topic("/tf", TF_TYPE, 1), Topic("/wheels", ODOMETRY, 1), Topic("/imu", "sensor_msgs/msg/Imu", 1)]
    topics = [*rest, *depth, *camera]
    assert choose_recorded(topics) == [*camera, *depth, *rest[:2]]
    assert choose_recorded(topics, depth="none", also=["/imu"]) == [*camera, *rest]
    with pytest.raises(SourceError, match="no recordable topic '/lidar'; it has /tf"):
        choose_recorded(topics, also=["/lidar"])
    for missing, left in (("images", [*depth, *rest]), ("camera_info", camera[:1])):
        with pytest.raises(SourceError, match=f"No topic of {missing} is published in the ROS domain"):
            choose_recorded(left)


def test_what_a_bag_holds(bag: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bag", "info", str(bag)]) == 0
    text = capsys.readouterr().out
    assert "/camera/depth/compressed" in text and "map -> camera_ground_truth" in text
    assert (
        "Images: /camera/image/compressed.\nCalibration: /camera/camera_info.\nGround truth: /ground_truth/pose."
        in text
    )
    assert "For a map: image /camera/image/compressed, info /camera/camera_info, depth /camera/depth/compressed" in text
    assert "10 of 10 images have a pose: kfloc map build bag:" in text
    two = a_bag(tmp_path / "two", [("/a/image", COMPRESSED, "a"), ("/b/image", COMPRESSED, "b")])
    assert cli.main(["bag", "info", str(two)]) == 1
    text = capsys.readouterr().out
    assert "several image topics: /a/image, /b/image" in text and "?image=/a/image" in text


def test_what_a_bag_lacks_is_told_with_what_to_do_and_not_with_the_same_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blind, text = a_bag(tmp_path / "blind", []), tmp_path / "notes.txt"
    text.touch()
    (tmp_path / "empty").mkdir()
    for path, code, words in (
        (blind, 1, "record it anew"),
        (text, 2, "is no bag; give"),
        (tmp_path / "empty", 2, "Give the"),
    ):
        assert cli.main(["bag", "info", str(path)]) == code
        said = "".join(capsys.readouterr())
        assert words in said and "kfloc bag info" not in said


def test_a_rosbag1_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")
    with pytest.raises(SourceError, match=r"rosbag1.*rosbags-convert"):
        BagStream(tmp_path / "old.bag")
