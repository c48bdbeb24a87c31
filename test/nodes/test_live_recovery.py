# SPDX-License-Identifier: Apache-2.0
"""Over real DDS: after whatever happened, the next good image is localized, without anybody's help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.poses import pose_from_message
from kfloc_ros.types import Frame

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}")
    return world


def assert_localized(harness: Any, frame: Any) -> None:
    """The first answer to a good frame is its true pose."""
    message = harness.localize(frame)
    stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
    assert harness.statuses[stamp_ns]["state"] == "TRACKING", harness.statuses[stamp_ns]
    T = pose_from_message(message.pose.pose)
    assert np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3]) < 0.05


def status_of(harness: Any, image: Any, camera: Any) -> dict[str, str]:
    """What the localizer says of a picture that shows nothing of the map."""
    frame = Frame(image, camera, 0)
    for _ in range(5):
        stamp_ns = harness.send(frame)
        if harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 5.0, must=False):
            return dict(harness.statuses[stamp_ns])
    raise AssertionError("no answer")


@pytest.mark.parametrize("cover", ["black", "white", "noise"])
def test_after_the_camera_was_covered(world: Any, room: Any, cover: str) -> None:
    harness = world.harness
    shape, rng = room[4].image.shape, np.random.default_rng(0)
    assert_localized(harness, room[4])
    for _ in range(2):
        # noise anew: the flow of a picture that stays the same carries the pose on
        noise = rng.integers(0, 256, shape, dtype=np.uint8)
        pictures = {"black": np.zeros(shape, np.uint8), "white": np.full(shape, 255, np.uint8), "noise": noise}
        status = status_of(harness, pictures[cover], room.camera)
        # soon after a pose, the motion carries it on for a while, and says so
        assert status["state"] == "LOST" or (
            status["state"] == "DEGRADED" and status["reason"].startswith("carried on at a fading speed")
        )
        assert status["transform"] != "sound"
    assert_localized(harness, room[5])


def test_after_two_seconds_without_images(world: Any, room: Any) -> None:
    assert_localized(world.harness, room[4])
    world.harness.spin(2.0)
    assert_localized(world.harness, room[6])


def test_after_being_carried_elsewhere(world: Any, room: Any) -> None:
    assert_localized(world.harness, room[0])
    for position in (30, 2, 20):
        assert_localized(world.harness, room[position])
