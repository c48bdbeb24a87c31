# SPDX-License-Identifier: Apache-2.0
"""The true path of a replay, over DDS: as far as it was played, and only for who looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose

pytestmark = pytest.mark.ros


def test_the_true_path_grows_with_what_is_played(new_world: Callable[[], Any]) -> None:
    from nav_msgs.msg import Path

    from kfloc_ros.replay.recorder import PERIOD_S, TruthPath

    harness = new_world().harness
    truth = {k * 10**8: make_pose(np.eye(3), np.array([0.1 * k, 0.0, 1.0])) for k in range(20)}
    path = TruthPath(harness.node, "floor", truth)
    path.show(10**9)  # nobody looks, and nothing is remembered of it
    seen: list[Any] = []
    harness.node.create_subscription(Path, "ground_truth/path", seen.append, 1)
    harness.wait(lambda: harness.node.count_subscribers("ground_truth/path") > 0)

    def shown(stamp_ns: int) -> bool:
        path.show(stamp_ns)
        return bool(seen)

    harness.wait(lambda: shown(5 * 10**8))
    assert seen[0].header.frame_id == "floor" and len(seen[0].poses) == 6
    assert [round(pose.pose.position.x, 6) for pose in seen[0].poses] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    path.show(7 * 10**8)  # too soon after the last one
    harness.spin(0.2)
    assert len(seen) == 1
    time.sleep(PERIOD_S)
    path.show(19 * 10**8)
    harness.wait(lambda: len(seen) == 2)
    assert len(seen[1].poses) == 20
