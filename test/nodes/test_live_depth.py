# SPDX-License-Identifier: Apache-2.0
"""Depth beside the images over real DDS: a room is a room, a print of it is not."""

from __future__ import annotations

import array
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp

pytestmark = pytest.mark.ros


def test_a_print_of_the_room_has_no_pose(new_world: Callable[[], Any], room: Any, room_map: Path) -> None:
    from sensor_msgs.msg import CameraInfo, Image

    world = new_world()
    harness = world.harness
    kinds = {"image": Image, "camera_info": CameraInfo, "depth": Image}
    publishers = {topic: harness.node.create_publisher(kind, topic, 10) for topic, kind in kinds.items()}
    world.start("localizer", f"map:={room_map}", "use_depth:=true", "first_fix_agreement:=1")
    harness.wait(lambda: all(publisher.get_subscription_count() > 0 for publisher in publishers.values()), 90.0)
    harness.spin(0.5)

    def status(depth_m: Any) -> dict[str, str]:
        """Send the same view with a depth until it is answered."""
        for _ in range(8):
            stamp_ns = time.time_ns()
            depth = Image(height=depth_m.shape[0], width=depth_m.shape[1], encoding="16UC1", step=2 * depth_m.shape[1])
            depth.data = array.array("B", np.rint(1e3 * depth_m).astype("<u2").tobytes())
            messages = {
                "depth": depth, "camera_info": fill_info(CameraInfo(), room.camera),
                "image": fill_image(Image(), room[4].image),
            }  # fmt: skip
            for topic, message in messages.items():
                fill_stamp(message.header.stamp, stamp_ns)
                message.header.frame_id = "lens"
                publishers[topic].publish(message)
            if harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 6.0, must=False):
                return dict(harness.statuses[stamp_ns])
        raise AssertionError(world.nodes[0].log)

    real = status(room[4].depth_m)
    assert (real["state"], real["published"]) == ("TRACKING", "true"), real["reason"]
    flat = status(np.full_like(room[4].depth_m, 0.9))
    assert (flat["state"], flat["published"]) == ("LOST", "false")
    assert "the depth contradicts the map" in flat["reason"]
