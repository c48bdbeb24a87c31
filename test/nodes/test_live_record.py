# SPDX-License-Identifier: Apache-2.0
"""``kfloc record`` beside a running camera, over real DDS."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.bags.reader import BagReader
from kfloc_ros.datasets import open_source
from kfloc_ros.geometry.lie import make_pose

pytestmark = pytest.mark.ros


class Recording:
    """``kfloc record`` in a process of its own, and what it says."""

    def __init__(self, world: Any, out: Path, *words: str) -> None:
        self._harness, self._log = world.harness, out.with_suffix(".log")
        command = [sys.executable, "-m", "kfloc_ros.cli", "record", "--out", str(out), "--wait", "30", *words]
        with self._log.open("w") as sink:
            self.process = subprocess.Popen(command, env=world.environment, stdout=sink, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait(self, sentence: str, send: Callable[[], Any] = lambda: None) -> None:
        """Wait until a sentence is said from now on; meanwhile ``send`` is called ten times a second."""
        before = len(self.said)
        for _ in range(600):
            assert self.process.poll() is None, self.said
            send()
            if self._harness.wait(lambda: sentence in self.said[before:], 0.1, must=False):
                return
        raise AssertionError(f"'{sentence}' was not said, but:\n{self.said}")

    def end(self) -> int:
        """End the recording with Ctrl-C and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=30)
        assert "Traceback" not in self.said, self.said
        return code


@pytest.fixture
def record() -> Iterator[Callable[..., Recording]]:
    """Starts recordings, none of which outlives its test."""
    started: list[Recording] = []

    def start(world: Any, out: Path, *words: str) -> Recording:
        started.append(Recording(world, out, *words))
        return started[-1]

    yield start
    for recording in started:
        recording.process.kill()
        recording.process.wait()


def counts_of(bag: Path) -> dict[str, int]:
    with BagReader(bag) as reader:
        return {topic.name: topic.count for topic in reader.topics}


def test_a_bag_has_the_right_topics_and_is_whole_after_ctrl_c(
    new_world: Callable[[], Any], record: Callable[..., Recording], room: Any, tmp_path: Path
) -> None:
    world = new_world()
    harness, out = world.harness, tmp_path / "bag"
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.qos import results, static_transforms

    for name, profile in (("tf", results(100)), ("tf_static", static_transforms())):
        harness._publishers[name] = harness.node.create_publisher(TFMessage, f"/{name}", profile)
    harness.send_transform("base", "camera", 0, make_pose(np.eye(3), [0.1, 0, 0]), static=True)
    recording = record(world, out, "--image", "/image")
    recording.wait("Nothing has come on /image.")
    sent = 0
    for position in range(25):
        stamp_ns = time.time_ns()
        harness.send_transform("odom", "base", stamp_ns, make_pose(np.eye(3), [0.01 * position, 0, 0]))
        harness.send(room[position], stamp_ns)
        sent += 1
        harness.spin(0.2)
    assert recording.end() == 1, recording.said
    assert "Recording /image, /camera_info" in recording.said and "It may not be enough" in recording.said
    counts = counts_of(out)
    assert (out / "metadata.yaml").read_text().count("durability: transient_local") == 1
    assert counts["/image"] >= sent - 3 and counts["/camera_info"] >= sent - 3
    assert counts["/tf"] >= sent - 3 and counts["/tf_static"] == 1
    source = open_source(f"bag:{out}?pose=none")
    assert len(source) == counts["/image"] and source[0].camera == room.camera


def test_what_comes_up_later_is_recorded_too_or_told(
    new_world: Callable[[], Any], record: Callable[..., Recording], room: Any, tmp_path: Path
) -> None:
    """Odometry and depth of nodes that start later, and transforms with another QoS than the first ones."""
    world = new_world()
    harness, node, out = world.harness, world.harness.node, tmp_path / "bag"
    from nav_msgs.msg import Odometry
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo, Image
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.transforms import stamped

    node.destroy_publisher(harness._publishers["compressed"])
    first = node.create_publisher(TFMessage, "/tf", 10)
    recording = record(world, out)
    recording.wait(" images, ", lambda: harness.send(room[0]))
    recording.wait("Nothing has come for 3 s on /image.")

    late = node.create_publisher(Odometry, "/late_odom", 10)
    depth = node.create_publisher(Image, "/depth/image_raw", 10)
    depth_info = node.create_publisher(CameraInfo, "/depth/camera_info", 10)
    other = node.create_publisher(TFMessage, "/tf", QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT))
    topics = "/late_odom", "/depth/image_raw", "/depth/camera_info"
    harness.wait(lambda: all(f"Recording {topic}, too." in recording.said for topic in topics))
    harness.wait(lambda: other.get_subscription_count() > 0)  # nothing else here subscribes to best effort
    node.create_publisher(Image, "/second/image_raw", 10)
    recording.wait("several image topics")

    def send() -> None:
        for publisher, message in ((late, Odometry()), (depth, Image()), (depth_info, CameraInfo())):
            publisher.publish(message)
        for publisher, child in ((first, "first"), (other, "other")):
            publisher.publish(TFMessage(transforms=[stamped("odom", child, time.time_ns(), np.eye(4))]))
        harness.send(room[1])

    recording.wait(" images, ", send)
    assert recording.end() == 1
    counts = counts_of(out)
    assert min(counts[name] for name in topics) >= 5, counts
    with BagReader(out) as bag:
        children = {m.transforms[0].child_frame_id for m in bag.messages("/tf", "tf2_msgs/msg/TFMessage")}
    assert children == {"first", "other"}


def test_static_transforms_are_recorded_from_latched_and_other_publishers(
    new_world: Callable[[], Any], record: Callable[..., Recording], room: Any, tmp_path: Path
) -> None:
    world = new_world()
    harness, out = world.harness, tmp_path / "bag"
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.qos import results, static_transforms
    from kfloc_ros.nodes.transforms import stamped

    latched = harness.node.create_publisher(TFMessage, "/tf_static", static_transforms())
    latched.publish(TFMessage(transforms=[stamped("base", "camera", 0, np.eye(4))]))
    volatile = harness.node.create_publisher(TFMessage, "/tf_static", results())
    recording = record(world, out, "--image", "/image")
    recording.wait(" images, ", lambda: harness.send(room[0]))
    volatile.publish(TFMessage(transforms=[stamped("base", "lidar", 0, np.eye(4))]))
    recording.wait(" images, ", lambda: harness.send(room[0]))
    assert recording.end() == 1
    with BagReader(out) as bag:
        assert {link.child for link in bag.links()} == {"camera", "lidar"}


def test_a_recording_ends_in_time_and_before_the_disk_is_full(
    new_world: Callable[[], Any], room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfloc_ros.nodes import recorder

    world = new_world()
    monkeypatch.setenv("ROS_DOMAIN_ID", str(world.domain_id))
    free = [10**9]
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    said: list[str] = []
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            world.harness.send(room[0])
            world.harness.spin(0.05)

    def say(line: str) -> None:
        said.append(line)
        if "images" in line:
            free[0] = 10**6

    camera = threading.Thread(target=send)
    camera.start()
    try:
        timed = recorder.record(recorder.RecordingPlan("/image", wait_s=30.0, duration_s=1.0), tmp_path / "timed", say)
        assert len(said) == 1, "it ended before the first report, which comes after three seconds"
        full = recorder.record(recorder.RecordingPlan("/image", wait_s=30.0), tmp_path / "full", say)
    finally:
        done.set()
        camera.join()
    assert said[-1].startswith("The disk is almost full")
    for result in (timed, full):
        assert counts_of(result.path)["/image"] == result.counts["/image"] > 0


def test_ctrl_c_before_there_is_a_camera_leaves_nothing(
    new_world: Callable[[], Any], record: Callable[..., Recording], tmp_path: Path
) -> None:
    world = new_world()
    world.harness.node.destroy_publisher(world.harness._publishers["info"])
    recording = record(world, tmp_path / "bag")
    world.harness.wait(lambda: "kfloc_record" in world.harness.node.get_node_names(), 60.0)
    assert recording.end() == 130
    assert not (tmp_path / "bag").exists()


def test_without_a_camera_a_sentence_says_so(
    new_world: Callable[[], Any], record: Callable[..., Recording], tmp_path: Path
) -> None:
    world = new_world()
    for name in ("raw", "compressed", "info"):
        world.harness.node.destroy_publisher(world.harness._publishers[name])
    recording = record(world, tmp_path / "bag", "--wait", "1")
    assert recording.process.wait(timeout=60) == 2
    assert recording.said.startswith("kfloc: No topic of images is published in the ROS domain"), recording.said
    assert not (tmp_path / "bag").exists()
