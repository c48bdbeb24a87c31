# SPDX-License-Identifier: Apache-2.0
"""Bags that are not what they should be are answered with a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer

from kfloc_ros.bags.topics import CAMERA_INFO_TOPIC, IMAGE_TOPIC, TOPIC_TYPES
from kfloc_ros.bags.writer import MessageCodec
from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.ros_bag import RosBag
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame

CAMERA = Camera(32, 24, 30.0, 30.0, 15.5, 11.5)


def write(
    path: Path,
    *,
    plugin: StoragePlugin = StoragePlugin.MCAP,
    leave_out: str = "",
    cut_jpeg: int | None = None,
) -> Path:
    """A bag of three grey frames, with faults on request."""
    codec = MessageCodec()
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections = {
            topic: writer.add_connection(topic, TOPIC_TYPES[topic], typestore=codec.typestore)
            for topic in (IMAGE_TOPIC, CAMERA_INFO_TOPIC)
        }
        for i in range(3):
            frame = Frame(np.full((24, 32, 3), 60 * i, np.uint8), CAMERA, 1_000 + i, i)
            jpeg = None if cut_jpeg is None else b"\xff\xd8\xff\xe0"[:cut_jpeg]
            for topic, data in codec.encode_frame(frame, jpeg=jpeg):
                if topic != leave_out:
                    writer.write(connections[topic], frame.stamp_ns, data)
    return path


@pytest.mark.parametrize("plugin", list(StoragePlugin))
def test_both_storages_are_read(tmp_path: Path, plugin: StoragePlugin) -> None:
    source = RosBag(write(tmp_path / "bag", plugin=plugin), {})
    assert len(source) == 3 and source.camera == CAMERA
    assert [int(frame.image.mean().round()) for frame in source] == [0, 60, 120]


def test_a_bag_of_ones_own_read_as_any_bag_has_the_same_images_and_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "bag")
    own, general = RosBag(path, {}), RosBag(path, {"image": IMAGE_TOPIC})
    assert list(own.indices()) == list(general.indices()) and own.camera == general.camera
    for position in range(3):
        assert own.encoded_image(position) == (general.encoded_image(position) or b"")
        assert np.array_equal(own[position].image, general[position].image)


def test_frames_can_be_selected(tmp_path: Path) -> None:
    source = open_source(f"bag:{write(tmp_path / 'bag')}", frames="1:3")
    assert [frame.index for frame in source] == [1, 2]


@pytest.mark.parametrize(
    ("topic", "words"), [(CAMERA_INFO_TOPIC, "no camera_info topic"), (IMAGE_TOPIC, "no image topic")]
)
def test_a_missing_topic_is_named(tmp_path: Path, topic: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        RosBag(write(tmp_path / "bag", leave_out=topic), {})


def test_a_folder_that_is_no_bag(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no metadata\.yaml"):
        RosBag(tmp_path, {})
    with pytest.raises(SourceError, match="There is no bag"):
        RosBag(tmp_path / "nowhere", {})


@pytest.mark.parametrize("length", [0, 3, 4])
def test_an_image_that_is_none(tmp_path: Path, length: int) -> None:
    source = RosBag(write(tmp_path / "bag", cut_jpeg=length), {})
    with pytest.raises(FrameError, match=r"Image 1 of the bag .* cannot be used.*(no data|cut off|cannot be decoded)"):
        source[1]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_storage_file(tmp_path: Path, keep: float) -> None:
    storage = write(tmp_path / "bag") / "bag.mcap"
    data = storage.read_bytes()
    storage.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(SourceError, match="has no end" if keep else "damaged"):
        RosBag(tmp_path / "bag", {})


@pytest.mark.parametrize(
    "text", ["", "{", "rosbag2_bagfile_information: 3", "rosbag2_bagfile_information: {version: 99}"]
)
def test_broken_metadata(tmp_path: Path, text: str) -> None:
    write(tmp_path / "bag")
    (tmp_path / "bag" / "metadata.yaml").write_text(text)
    with pytest.raises(SourceError):
        RosBag(tmp_path / "bag", {})


def test_flipped_bytes_never_escape_as_anything_but_a_sentence(tmp_path: Path) -> None:
    storage = write(tmp_path / "bag") / "bag.mcap"
    data = storage.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 8):
            broken[at] ^= int(rng.integers(1, 256))
        storage.write_bytes(bytes(broken))
        try:
            source = RosBag(tmp_path / "bag", {})
            for position in range(len(source)):
                source[position]
        except (FrameError, SourceError):
            pass
