# SPDX-License-Identifier: Apache-2.0
"""Faults of every kind against the live localizer over DDS: it says what is wrong, and localizes the next good image.

`docs/reference/robustness.md` lists the faults, what happens, and the test that shows it, those of other tests too.
"""

from __future__ import annotations

import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.poses import pose_from_message
from kfloc_ros.nodes.pose_file import load_pose, map_id
from kfloc_ros.types import Frame

pytestmark = pytest.mark.ros

NewWorld = Callable[[], Any]
S = 10**9


@pytest.fixture(scope="module")
def map_copy(room_map: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map that may be damaged."""
    return Path(shutil.copytree(room_map, tmp_path_factory.mktemp("copy") / "room"))


@pytest.fixture(scope="module")
def pose_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "last_pose.json"


@pytest.fixture(scope="module")
def arguments(map_copy: Path, pose_file: Path) -> tuple[str, ...]:
    return f"map:={map_copy}", f"pose_file:={pose_file}", "pose_file_period_s:=0.1", "max_gap_s:=60.0"


@pytest.fixture(scope="module")
def world(new_world: NewWorld, arguments: tuple[str, ...]) -> Any:
    world = new_world()
    world.start_localizer(*arguments)
    return world


def localize(harness: Any, frame: Any) -> Any:
    """The pose message of a good frame, which must be right."""
    message = harness.localize(frame)
    T = pose_from_message(message.pose.pose)
    assert np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3]) < 0.05
    return message


def answer(harness: Any, image: Any, camera: Any) -> int:
    """The stamp of a picture that is answered by a status."""
    for _ in range(5):
        stamp_ns = harness.send(Frame(image, camera, 0))
        if harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 5.0, must=False):
            return int(stamp_ns)
    raise AssertionError("no answer")


def publisher(harness: Any, kind: type, topic: str) -> Any:
    made = harness.node.create_publisher(kind, topic, 50)
    harness.wait(lambda: made.get_subscription_count() > 0)
    harness.spin(0.3)
    return made


def test_silent_until_it_knows_where_it_is(world: Any, room: Any) -> None:
    harness = world.harness
    harness.spin(0.3)
    noise = np.random.default_rng(0).integers(0, 256, room[4].image.shape, dtype=np.uint8)
    for picture in (np.zeros_like(noise), noise):
        stamp_ns = answer(harness, picture, room.camera)
        assert harness.statuses[stamp_ns]["state"] == "INITIALIZING" and harness.statuses[stamp_ns]["reason"]
    assert not harness.poses and not harness.transforms and not harness.paths
    localize(harness, room[4])


def test_numbers_that_are_none_do_no_harm(world: Any, room: Any) -> None:
    """Infinite, NaN, and so large that their squares are infinite: on every input that takes numbers."""
    from builtin_interfaces.msg import Time
    from geometry_msgs.msg import PoseWithCovarianceStamped, TransformStamped
    from tf2_msgs.msg import TFMessage

    harness = world.harness
    localize(harness, room[4])
    poses = publisher(harness, PoseWithCovarianceStamped, "initialpose")
    transforms = publisher(harness, TFMessage, "/tf")
    for value in (math.nan, math.inf, 1e200, 1e308):
        for part, field in (("orientation", "x"), ("position", "x")):
            pose = PoseWithCovarianceStamped()
            pose.header.frame_id = "map"
            setattr(getattr(pose.pose.pose, part), field, value)
            poses.publish(pose)
        item = TransformStamped(child_frame_id="camera")
        item.header.frame_id = "odom"
        item.header.stamp = Time(sec=-(2**31), nanosec=2**32 - 1)
        item.transform.translation.x = value
        transforms.publish(TFMessage(transforms=[item]))
        harness.send_info(room.camera, time.time_ns(), p=[value] * 12, d=[value] * 5)
        harness.spin(0.05)
    message = harness.image_message(room[4].image)
    message.header.stamp = Time(sec=2**31 - 1, nanosec=2**32 - 1)
    harness.send_info(room.camera, time.time_ns())
    harness._publishers["raw"].publish(message)
    harness.wait(lambda: "no time that ROS can work with" in world.nodes[0].log)
    log = world.nodes[0].log
    assert "initial pose was refused" in log and "cannot be used" in log and "A callback failed" not in log
    harness.node.destroy_publisher(poses)
    harness.node.destroy_publisher(transforms)
    localize(harness, room[5])


def test_a_picture_that_nearly_fits_is_no_pose(world: Any, room: Any) -> None:
    """The outlier that would be a jump: mirrored, upside down."""
    harness, image = world.harness, room[4].image
    localize(harness, room[4])
    for picture in (image[:, ::-1], image[::-1, ::-1]):
        stamp_ns = answer(harness, np.ascontiguousarray(picture), room.camera)
        if stamp_ns in harness.poses:  # seen from elsewhere it may be the truth, but never with the old place's trust
            assert harness.statuses[stamp_ns]["state"] == "DEGRADED", harness.statuses[stamp_ns]
    localize(harness, room[5])


def test_the_same_images_give_the_same_poses(world: Any, room: Any) -> None:
    from std_srvs.srv import Trigger

    harness, runs = world.harness, []
    for _ in range(2):
        assert harness.call(Trigger, "/localizer/reset", Trigger.Request()).success
        messages, start_ns = [], time.time_ns()
        for position in (4, 5, 6, 7):
            stamp_ns = harness.send(room[position], start_ns + position * S // 10)
            harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses and stamp in harness.poses, 20.0)
            messages.append(harness.poses[stamp_ns].pose.pose)  # covariance shrinks as images confirm the camera
        runs.append(messages)
    assert runs[0] == runs[1], "to the last bit"


def test_a_frozen_camera_is_no_pose(world: Any, room: Any) -> None:
    """A driver that repeats its last image with new stamps, while the robot drives on."""
    harness = world.harness
    assert harness.set_parameter("/localizer", "max_repeat_s", 1.0).successful
    harness.localize(room[6])
    start_ns = time.time_ns()
    for k in range(1, 9):
        stamp_ns = harness.send(room[7], max(start_ns + k * S // 4, time.time_ns()))  # old images are not localized
        harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 20.0)
    status = harness.statuses[stamp_ns]
    assert status["state"] == "LOST" and "repeats one image" in status["reason"] and stamp_ns not in harness.poses
    assert harness.set_parameter("/localizer", "max_repeat_s", 0.0).successful
    harness.localize(room[8])


def test_a_flood_of_transforms_and_initial_poses_is_outlived(world: Any, room: Any) -> None:
    from geometry_msgs.msg import PoseWithCovarianceStamped, TransformStamped
    from tf2_msgs.msg import TFMessage

    harness = world.harness
    poses = publisher(harness, PoseWithCovarianceStamped, "initialpose")
    transforms = publisher(harness, TFMessage, "/tf")
    pose = PoseWithCovarianceStamped()
    pose.header.frame_id, pose.pose.pose.orientation.w = "map", 1.0
    for number in range(1500):
        item = TransformStamped(child_frame_id=f"wheel_{number % 50}")
        item.header.frame_id, item.header.stamp.sec = "robot", 1 + number
        transforms.publish(TFMessage(transforms=[item] * 5))
        poses.publish(pose)
        if number % 100 == 0:
            harness.send(room[number // 100 % 8])
            harness.spin(0.01)
    harness.node.destroy_publisher(poses)
    harness.node.destroy_publisher(transforms)
    localize(harness, room[4])
    assert world.nodes[0].process.poll() is None


def test_a_map_that_is_damaged_on_disk_while_it_is_in_use(
    world: Any, room: Any, room_map: Path, map_copy: Path
) -> None:
    harness = world.harness
    localize(harness, room[4])
    for name in ("scoordnet.safetensors", "references.safetensors"):
        path = map_copy / name
        with path.open("r+b") as stream:
            stream.write(b"\xff" * path.stat().st_size)
        with path.open("r+b") as stream:
            stream.truncate(100)
    localize(harness, room[5])
    refused = harness.set_parameter("/localizer", "map", f"{map_copy}/")
    assert not refused.successful and "damaged" in refused.reason
    localize(harness, room[4])
    assert harness.set_parameter("/localizer", "num_references", 2).successful, "made anew from what is in memory"
    harness.wait(harness.listens)
    harness.spin(0.5)
    localize(harness, room[5])
    for path in room_map.iterdir():
        shutil.copy(path, map_copy / path.name)


def test_a_disk_that_is_full_while_the_pose_is_saved(world: Any, room: Any, pose_file: Path, room_map: Path) -> None:
    from kfloc_ros.maps.scene_map import SceneMap

    harness, pid = world.harness, world.nodes[0].process.pid
    localize(harness, room[4])
    harness.wait(pose_file.exists)
    harness.spin(0.3)
    kept = pose_file.read_bytes()
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file can grow any more
    try:
        for position in (5, 6, 7):
            localize(harness, room[position])
            harness.spin(0.2)
        assert pose_file.read_bytes() == kept, "the last one that could be saved is whole"
        assert [path.name for path in pose_file.parent.iterdir()] == [pose_file.name], "nothing half-written is left"
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    localize(harness, room[8])
    harness.wait(lambda: pose_file.read_bytes() != kept)
    assert load_pose(pose_file, map_id(SceneMap.load(room_map))) is not None


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
import numpy as np
from kfloc_ros.nodes.pose_file import PoseFileError, SavedPose, save_pose
pose = SavedPose("room 1", 1, np.eye(4), np.eye(6))
save_pose(Path(sys.argv[1]), pose)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    save_pose(Path(sys.argv[1]), pose)
except PoseFileError as error:
    print(error)
"""
    path = tmp_path / "pose.json"
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"The last pose cannot be saved in '{path}': File too large.\n"
    assert load_pose(path, "room 1") is not None and list(tmp_path.iterdir()) == [path]


def test_killed_and_started_again(world: Any, room: Any, arguments: tuple[str, ...], pose_file: Path) -> None:
    """SIGKILL in the middle of the work; what is started in its place goes on from the saved pose."""
    harness = world.harness
    localize(harness, room[4])
    harness.wait(pose_file.exists)
    harness.send(room[5])
    world.nodes[0].process.kill()
    world.nodes[0].process.wait()
    world.nodes.clear()
    harness.wait(lambda: not harness.listens())
    again = world.start_localizer(*arguments)
    assert "The search starts at the saved pose" in again.log
    localize(harness, room[5])
    assert again.end(signal.SIGTERM) == 0, again.log
