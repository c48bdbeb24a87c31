# SPDX-License-Identifier: Apache-2.0
"""``kfloc record`` beside a running camera, over real DDS."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.bags.reader import BagReader
from kfloc_ros.datasets import open_source
from kfloc_ros.geometry.lie import make_pose

pytestmark = pytest.mark.ros


def start(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kfloc_ros.cli", "record", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_bag_has_the_right_topics_and_is_whole_after_ctrl_c(
    new_world: Callable[[], Any], room: Any, tmp_path: Path
) -> None:
    world = new_world()
    harness, out = world.harness, tmp_path / "bag"
    from nav_msgs.msg import Odometry
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.qos import results, static_transforms

    for name, profile in (("tf", results(100)), ("tf_static", static_transforms())):
        harness._publishers[name] = harness.node.create_publisher(TFMessage, f"/{name}", profile)
    harness.send_transform("base", "camera", 0, make_pose(np.eye(3), [0.1, 0, 0]), static=True)
    process = start(world.environment, "--out", str(out), "--wait", "30", "--image", "/image")
    harness.wait(harness.listens, 60.0)
    harness.spin(4.0)
    late = harness.node.create_publisher(Odometry, "/late_odom", 10)
    sent = 0
    for position in range(25):
        stamp_ns = time.time_ns()
        harness.send_transform("odom", "base", stamp_ns, make_pose(np.eye(3), [0.01 * position, 0, 0]))
        harness.send(room[position], stamp_ns)
        late.publish(Odometry())
        sent += 1
        harness.spin(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1, said
    assert "Recording /image, /camera_info" in said and "It may not be enough" in said, said
    assert "Nothing has come on /image." in said and "Traceback" not in said
    with BagReader(out) as bag:
        counts = {topic.name: topic.count for topic in bag.topics}
    assert (out / "metadata.yaml").read_text().count("durability: transient_local") == 1
    assert counts["/image"] >= sent - 3 and counts["/camera_info"] >= sent - 3
    assert counts["/tf"] >= sent - 3 and counts["/tf_static"] == 1
    assert "Recording /late_odom, too." in said and counts["/late_odom"] >= 5, counts
    source = open_source(f"bag:{out}?pose=none")
    assert len(source) == counts["/image"] and source[0].camera == room.camera


def test_without_a_camera_the_topics_are_asked_for(new_world: Callable[[], Any], tmp_path: Path) -> None:
    environment = new_world().environment  # in whose domain a camera is announced, so that it must be another
    environment = {**environment, "ROS_DOMAIN_ID": str((int(environment["ROS_DOMAIN_ID"]) + 1) % 100)}
    process = start(environment, "--out", str(tmp_path / "bag"), "--wait", "1")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "kfloc: " in said and "Traceback" not in said, said
    assert not (tmp_path / "bag").exists()
