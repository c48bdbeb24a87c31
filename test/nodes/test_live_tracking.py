# SPDX-License-Identifier: Apache-2.0
"""Tracking over real DDS: poses go on, coarse poses come only as checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.poses import pose_from_message

pytestmark = pytest.mark.ros


def test_tracked_frames_have_a_pose_and_no_coarse_pose(new_world: Callable[[], Any], room_map: Path, room: Any) -> None:
    world = new_world()
    # a busy machine may take long between two images, which is no matter here
    world.start_localizer(f"map:={room_map}", "tracking:=true", "tracking_check_period:=3", "max_gap_s:=60.0")
    tracked = []
    for _ in range(5):
        message = world.harness.localize(room[4])
        stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        world.harness.wait(lambda stamp_ns=stamp_ns: stamp_ns in world.harness.statuses)
        values = world.harness.statuses[stamp_ns]
        error_m = np.linalg.norm(pose_from_message(message.pose.pose)[:3, 3] - room[4].T_map_camera[:3, 3])
        assert error_m < 0.03 and values["state"] == "TRACKING"
        tracked.append(values["tracked"] == "true")
        assert ("pnp_ms" in values) != tracked[-1] and ("inliers" in values) != tracked[-1]
        if not tracked[-1]:
            world.harness.wait(lambda stamp_ns=stamp_ns: stamp_ns in world.harness.coarse)
        else:
            assert stamp_ns not in world.harness.coarse
    assert tracked.count(True) >= 2 and not tracked[0]
