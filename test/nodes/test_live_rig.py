# SPDX-License-Identifier: Apache-2.0
"""A rig of two cameras over real DDS: one pose of the body, also when one camera is covered or silent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp, pose_from_message

pytestmark = pytest.mark.ros
NAMES = ("front", "left")
PLACES = (4, 20)
"""Frames of the room that the two cameras see from one place of the body, which is the front camera."""


class Rig:
    """Publishers of the two cameras, and the localizer."""

    def __init__(self, world: Any, room: Any, room_map: Path) -> None:
        from sensor_msgs.msg import CameraInfo, Image

        kinds = {"image": Image, "camera_info": CameraInfo}
        self.harness, self.room, self.world = world.harness, room, world
        node = self.harness.node
        self.publishers = {
            name: [node.create_publisher(kind, f"{name}/{topic}", 10) for topic, kind in kinds.items()]
            for name in NAMES
        }
        T_map_base = room[PLACES[0]].T_map_camera
        self.truth = T_map_base
        world.start(
            "localizer", f"map:={room_map}", "cameras:='front, left'", "base_frame:=base", "max_gap_s:=60.0",
            "rig_window_s:=0.3",
        )  # fmt: skip
        for name, place in zip(NAMES, PLACES, strict=True):
            mount = inverse_pose(T_map_base) @ room[place].T_map_camera
            self.harness.send_transform("base", name, 0, mount, static=True)
        self.harness.wait(
            lambda: all(p.get_subscription_count() > 0 for pair in self.publishers.values() for p in pair), 90.0
        )
        self.harness.spin(0.5)

    def send(self, *, covered: tuple[str, ...] = (), silent: tuple[str, ...] = ()) -> int:
        """Publish the images of one time."""
        from sensor_msgs.msg import CameraInfo, Image

        stamp_ns = time.time_ns()
        for name, place in zip(NAMES, PLACES, strict=True):
            if name in silent:
                continue
            frame = self.room[place]
            image = np.full_like(frame.image, 70) if name in covered else frame.image
            messages = fill_image(Image(), image), fill_info(CameraInfo(), frame.camera)
            for publisher, message in reversed(list(zip(self.publishers[name], messages, strict=True))):
                fill_stamp(message.header.stamp, stamp_ns)
                message.header.frame_id = name
                publisher.publish(message)
        return stamp_ns

    def localize(self, **how: Any) -> Any:
        """Send images until a pose of all of them comes back; the message."""
        for _ in range(8):
            stamp_ns = self.send(**how)
            if self.harness.wait(lambda stamp=stamp_ns: stamp in self.harness.poses, 6.0, must=False):
                return self.harness.poses[stamp_ns]
        raise AssertionError(self.world.nodes[0].log)


@pytest.fixture(scope="module")
def rig(new_world: Callable[[], Any], room: Any, room_map: Path) -> Rig:
    return Rig(new_world(), room, room_map)


@pytest.mark.parametrize("how", [{}, {"covered": ("front",)}, {"covered": ("left",)}, {"silent": ("front",)}])
def test_the_body_is_found_by_the_cameras_that_see(rig: Rig, how: dict[str, Any]) -> None:
    T = pose_from_message(rig.localize(**how).pose.pose)
    assert np.allclose(T[:3, 3], rig.truth[:3, 3], atol=0.08)
    assert rotation_angle_deg(T[:3, :3].T @ rig.truth[:3, :3]) < 4.0


def test_the_status_names_the_time_of_every_camera(rig: Rig) -> None:
    rig.localize()

    def both() -> bool:
        return any({"camera_front_ms", "camera_left_ms"} <= values.keys() for values in rig.harness.statuses.values())

    for _ in range(5):
        if both():
            break
        rig.localize()
    assert both()


def test_a_rig_without_a_body_is_refused(new_world: Callable[[], Any], room_map: Path) -> None:
    world = new_world()
    node = world.start("localizer", f"map:={room_map}", "cameras:='front,left'")
    assert node.process.wait(60) == 1
    assert "'cameras' needs 'base_frame'" in node.log
