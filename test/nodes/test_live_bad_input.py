# SPDX-License-Identifier: Apache-2.0
"""Bad input to the live localizer: it says what is wrong, counts it, and localizes the next good frame."""

from __future__ import annotations

import math
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def raw_world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}")
    return world


@pytest.fixture(scope="module")
def compressed_world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}", transport="compressed")
    return world


def wrong_encoding(harness: Any, frame: Any, stamp_ns: int) -> None:
    harness.send_info(frame.camera, stamp_ns)
    harness.send_image(frame.image, stamp_ns, encoding="32FC3")


def zero_size(harness: Any, frame: Any, stamp_ns: int) -> None:
    harness.send_info(frame.camera, stamp_ns)
    harness.send_image(frame.image[:0], stamp_ns, width=0, step=0)


def too_few_bytes(harness: Any, frame: Any, stamp_ns: int) -> None:
    harness.send_info(frame.camera, stamp_ns)
    harness.send_image(frame.image[:-20], stamp_ns, height=frame.camera.height)


def another_size_than_camera_info(harness: Any, frame: Any, stamp_ns: int) -> None:
    harness.send_info(frame.camera, stamp_ns)
    harness.send_image(np.ascontiguousarray(frame.image[::2, ::2]), stamp_ns)


@pytest.mark.parametrize(
    ("send", "said"),
    [
        (wrong_encoding, "encoding '32FC3'"),
        (zero_size, "has no pixels"),
        (too_few_bytes, "bytes, but has"),
        (another_size_than_camera_info, "must come from the same camera"),
    ],
)
def test_a_bad_image_is_refused_and_the_next_good_one_localized(
    raw_world: Any, room: Any, send: Callable[[Any, Any, int], None], said: str
) -> None:
    harness = raw_world.harness
    before = refused(harness, harness.localize(room[4]))
    stamp_ns = time.time_ns()
    send(harness, room[4], stamp_ns)
    harness.wait(lambda: said in raw_world.nodes[0].log)
    after = refused(harness, harness.localize(room[5]))
    assert after == before + 1
    assert stamp_ns not in harness.poses and stamp_ns not in harness.statuses
    assert "Traceback" not in raw_world.nodes[0].log


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": [0.0] * 9}, "no calibration"),
        ({"k": [math.nan, 0.0, 160.0, 0.0, 260.0, 128.0, 0.0, 0.0, 1.0]}, "finite"),
        ({"d": [math.nan] * 5}, "finite"),
        ({"width": 0}, "size must be positive"),
        ({"distortion_model": "crystal_ball", "d": [0.1]}, "crystal_ball"),
    ],
)
def test_a_bad_camera_info_is_refused_and_the_next_good_one_used(
    raw_world: Any, room: Any, changes: dict[str, Any], said: str
) -> None:
    harness = raw_world.harness
    harness.send_info(room.camera, time.time_ns(), **changes)
    harness.wait(lambda: said in raw_world.nodes[0].log)
    harness.localize(room[4])
    assert "Traceback" not in raw_world.nodes[0].log


def test_a_camera_that_sees_something_else_than_the_maps_is_refused_with_both_printed(
    raw_world: Any, room: Any
) -> None:
    harness = raw_world.harness
    harness.localize(room[4])
    tele = replace(room.camera, fx=4 * room.camera.fx, fy=4 * room.camera.fy)
    stamp_ns = time.time_ns()
    harness.send_info(tele, stamp_ns)
    harness.spin(0.1)
    harness.send_image(room[4].image, stamp_ns)
    harness.wait(lambda: "Map: 320x256, fx 260.0" in raw_world.nodes[0].log)
    assert "fx 1040.0" in raw_world.nodes[0].log and stamp_ns not in harness.statuses
    harness.localize(room[4])


def test_without_any_camera_info_the_topic_is_named(new_world: Callable[[], Any], room_map: Path, room: Any) -> None:
    world = new_world()
    node = world.start_localizer(f"map:={room_map}")
    for _ in range(20):
        world.harness.send_image(room[4].image, time.time_ns())
        if world.harness.wait(lambda: "No usable camera_info" in node.log, 2.0, must=False):
            break
    assert "No usable camera_info was received on '/camera_info'" in node.log
    world.harness.localize(room[4])


@pytest.mark.parametrize("cut", ["swelling", "half", "empty", "noise"])
def test_a_truncated_jpeg_is_refused_and_the_next_good_one_localized(
    compressed_world: Any, room: Any, cut: str
) -> None:
    harness = compressed_world.harness
    _, encoded = cv2.imencode(".jpg", room[4].image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    data = encoded.tobytes()

    def send(content: bytes) -> int:
        stamp_ns = time.time_ns()
        harness.send_info(room.camera, stamp_ns)
        harness.send_compressed(content, stamp_ns)
        return stamp_ns

    harness.localize(room[4], lambda frame: send(data))
    bad = {"half": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 40, "swelling": swelling()}[cut]
    said = {"half": "is cut off", "empty": "has no data", "noise": "cannot be decoded"}.get(cut, f"{len(bad)} bytes) c")
    stamp_ns = send(bad)
    harness.wait(lambda: said in compressed_world.nodes[0].log)
    assert stamp_ns not in harness.poses
    harness.localize(room[4], lambda frame: send(data))


def swelling() -> bytes:
    """A PNG of a few kilobytes that unpacks into more than a hundred million pixels."""
    side = 10_400

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit a pixel
    pixels = zlib.compress(bytes((1 + side // 8) * side), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def refused(harness: Any, pose: Any) -> int:
    """The count of refused frames in the status that came with a pose."""
    stamp = pose.header.stamp
    return int(harness.statuses[stamp.sec * 10**9 + stamp.nanosec]["refused"])


def damaged_map(kind: str, good: Path, folder: Path) -> Path:
    """A copy of a map with something wrong."""
    path = folder / kind
    if kind == "missing":
        return path
    shutil.copytree(good, path)
    description = path / "map.yaml"
    if kind == "corrupt":
        weights = path / "scoordnet.safetensors"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 0xFF
        weights.write_bytes(content)
    elif kind == "not yaml":
        description.write_text("{[")
    else:
        values = yaml.safe_load(description.read_text())
        values["version"] = 99
        description.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "no map folder"),
        ("corrupt", "does not match its checksum"),
        ("not yaml", "cannot be read"),
        ("newer", "format version 99, newer than"),
    ],
)
def test_a_bad_map_ends_the_node_with_one_sentence(
    new_world: Callable[[], Any], room_map: Path, tmp_path: Path, kind: str, said: str
) -> None:
    assert_refuses_to_start(new_world(), said, f"map:={damaged_map(kind, room_map, tmp_path)}")


def test_a_misspelt_parameter_ends_the_node_with_one_sentence(new_world: Callable[[], Any]) -> None:
    assert_refuses_to_start(new_world(), "Did you mean 'map'?", "mapp:=kitchen")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "No map is given"),
        (("max_age_s:=-1.0",), "'max_age_s' must lie in"),
        (("image_transport:=pigeon",), "must be one of raw, compressed"),
        (("rectified:=7",), "'rectified' must be of type bool"),
        (("tf_mode:=odom_to_map",), "must be one of map_to_odom"),
    ],
)
def test_bad_parameters_end_the_node_with_one_sentence(
    new_world: Callable[[], Any], arguments: tuple[str, ...], said: str
) -> None:
    assert_refuses_to_start(new_world(), said, *arguments)


def assert_refuses_to_start(world: Any, said: str, *arguments: str) -> None:
    node = world.start("localizer", *arguments)
    assert node.process.wait(60.0) == 1, node.log
    assert "[FATAL]" in node.log and said in node.log and "Traceback" not in node.log


def test_a_node_may_be_interrupted_as_soon_as_it_listens(new_world: Callable[[], Any], room_map: Path) -> None:
    world = new_world()
    node = world.start("localizer", f"map:={room_map}")
    time.sleep(0.5)
    while node.process.poll() is None and world.harness.node.count_subscribers("image") == 0:
        world.harness.spin(0.01)
    node.end_well()
