# SPDX-License-Identifier: Apache-2.0
"""TF over real DDS: map -> odom as REP-105 wants it, and what happens when there is nothing to go by."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.messages.poses import pose_from_message, transform_from_message

pytestmark = pytest.mark.ros

T_BASE_CAMERA = make_pose(so3_exp([0.3, -0.2, 1.0]), [0.2, 0.02, 0.5])
TOLERANCE_NS = 300_000_000


def odometry(stamp_ns: int) -> Any:
    """``T_odom_base``: somewhere far from the map's origin, and moving."""
    seconds = (stamp_ns % 10**12) * 1e-9
    return make_pose(so3_exp([0, 0, 0.2 * seconds]), [5.0 + seconds, -3.0, 0.1])


@pytest.fixture(scope="module")
def robot(new_world: Callable[[], Any], room_map: Path) -> Any:
    """A localizer on a robot whose camera mount is on /tf_static."""
    world = new_world()
    world.start_localizer(f"map:={room_map}", "base_frame:=base_link", "tf_mode:=map_to_odom", "max_gap_s:=60.0")
    world.harness.send_transform("base_link", "camera", 0, T_BASE_CAMERA, static=True)
    world.harness.spin(0.3)
    return world


def drive(harness: Any, frame: Any) -> int:
    """A frame with odometry on both sides of its stamp."""
    stamp_ns = time.time_ns()
    for offset_ns in (-10_000_000, 10_000_000):
        harness.send_transform("odom", "base_link", stamp_ns + offset_ns, odometry(stamp_ns + offset_ns))
    return int(harness.send(frame, stamp_ns))


def anchors(harness: Any) -> list[Any]:
    return [item for item in harness.transforms if item.header.frame_id == "map"]


def stamp_of(message: Any) -> int:
    return int(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)


def test_without_odometry_there_is_a_pose_but_no_transform_and_the_way_out_is_named(robot: Any, room: Any) -> None:
    harness = robot.harness
    message = harness.localize(room[4])
    truth = room[4].T_map_camera @ inverse_pose(T_BASE_CAMERA)
    assert np.allclose(pose_from_message(message.pose.pose)[:3, 3], truth[:3, 3], atol=0.05)
    assert not anchors(harness)
    assert "TF does not connect 'base_link' and 'odom'. Known frames: base_link, camera" in robot.nodes[0].log


def test_map_to_odom_is_right_at_the_images_stamp_dated_ahead_and_sent_again(robot: Any, room: Any) -> None:
    harness = robot.harness
    harness.transforms.clear()
    message = harness.localize(room[4], lambda frame: drive(harness, frame))
    stamp_ns = stamp_of(message)
    harness.wait(lambda: len(anchors(harness)) > 3)
    first, *later = anchors(harness)
    assert (first.header.frame_id, first.child_frame_id) == ("map", "odom")
    assert stamp_of(first) >= stamp_ns + TOLERANCE_NS, "and further where the latency needs it"
    T_map_base = transform_from_message(first.transform) @ odometry(stamp_ns)
    assert np.allclose(T_map_base, pose_from_message(message.pose.pose), atol=1e-3)
    stamps = [stamp_of(item) for item in (first, *later)]
    assert all(a < b for a, b in pairwise(stamps)), "a listener refuses a stamp that it has"
    assert all(item.transform == first.transform for item in later)
    assert not any(item.child_frame_id != "odom" for item in anchors(harness)), "one parent per frame"


def test_odometry_that_is_too_late_is_not_extrapolated(robot: Any, room: Any) -> None:
    harness = robot.harness
    harness.spin(0.2)
    before = transform_from_message(anchors(harness)[-1].transform)
    stamp_ns = stamp_of(harness.localize(room[5]))
    assert "no 'odom' -> 'base_link'" in harness.statuses[stamp_ns]["reason"]
    assert np.allclose(transform_from_message(anchors(harness)[-1].transform), before)


def test_odometry_that_jumps_moves_map_to_odom_and_not_the_pose(robot: Any, room: Any) -> None:
    harness = robot.harness
    before = pose_from_message(harness.localize(room[4], lambda frame: drive(harness, frame)).pose.pose)
    jump = make_pose(so3_exp([0.0, 0.0, 2.0]), [100.0, -40.0, 0.0])

    def drive_after_jump(frame: Any) -> int:
        stamp_ns = time.time_ns()
        for offset_ns in (-10_000_000, 10_000_000):
            T = jump @ odometry(stamp_ns + offset_ns)
            harness.send_transform("odom", "base_link", stamp_ns + offset_ns, T)
        return int(harness.send(frame, stamp_ns))

    message = harness.localize(room[4], drive_after_jump)
    T_map_base = pose_from_message(message.pose.pose)
    assert np.allclose(T_map_base[:3, 3], before[:3, 3], atol=0.02)

    T_odom_base = jump @ odometry(stamp_of(message))

    def has_jumped() -> bool:
        found = anchors(harness)
        return bool(found) and np.allclose(
            transform_from_message(found[-1].transform) @ T_odom_base, T_map_base, atol=0.02
        )

    harness.wait(has_jumped)


def test_a_second_parent_is_refused(robot: Any, room: Any) -> None:
    harness = robot.harness
    assert harness.set_parameter("/localizer", "tf_mode", "map_to_base").successful
    harness.spin(0.2)
    harness.transforms.clear()
    stamp_ns = stamp_of(harness.localize(room[4], lambda frame: drive(harness, frame)))
    assert "'base_link' already has the parent 'odom'" in harness.statuses[stamp_ns]["reason"]
    assert not anchors(harness)
    assert harness.set_parameter("/localizer", "tf_mode", "map_to_odom").successful


@pytest.mark.parametrize("policy", ["hold", "stop", "mark"])
def test_when_lost(robot: Any, room: Any, policy: str) -> None:
    harness = robot.harness
    assert harness.set_parameter("/localizer", "when_lost", policy).successful
    last = harness.localize(room[4], lambda frame: drive(harness, frame))
    black_ns = drive(harness, type(room[4])(np.zeros_like(room[4].image), room.camera, 0))
    harness.wait(lambda: black_ns in harness.statuses)
    assert harness.statuses[black_ns]["state"] == "LOST"
    harness.spin(0.2)
    harness.transforms.clear()
    harness.spin(0.4)
    assert bool(anchors(harness)) == (policy != "stop")
    assert (black_ns in harness.poses) == (policy == "mark")
    if policy == "mark":
        held = harness.poses[black_ns]
        expected = pose_from_message(last.pose.pose) @ inverse_pose(odometry(stamp_of(last))) @ odometry(black_ns)
        T = pose_from_message(held.pose.pose)
        assert np.allclose(T[:3, 3], expected[:3, 3], atol=1e-2)
        assert rotation_angle_deg(T[:3, :3].T @ expected[:3, :3]) < 0.5
        assert held.pose.covariance[0] > 4 * last.pose.covariance[0]


def test_stop_also_stops_when_no_image_says_that_it_is_lost(robot: Any, room: Any) -> None:
    harness = robot.harness
    assert harness.set_parameter("/localizer", "when_lost", "stop").successful
    assert harness.set_parameter("/localizer", "lost_after_s", 0.5).successful
    harness.localize(room[4], lambda frame: drive(harness, frame))
    harness.spin(1.0)
    harness.transforms.clear()
    harness.spin(0.3)
    assert not anchors(harness)
    harness.localize(room[5], lambda frame: drive(harness, frame))
    harness.wait(lambda: bool(anchors(harness)))


def test_a_pose_that_the_odometry_contradicts_waits_for_a_second_one(robot: Any, room: Any) -> None:
    harness = robot.harness
    assert harness.set_parameter("/localizer", "when_lost", "hold").successful
    harness.localize(room[4], lambda frame: drive(harness, frame))
    assert harness.set_parameter("/localizer", "max_odom_jump", 0.001).successful
    harness.spin(2.2)  # so that the next pose is believed whatever it is
    believed = stamp_of(harness.localize(room[4], lambda frame: drive(harness, frame)))
    assert harness.statuses[believed]["state"] == "TRACKING"
    suspect = stamp_of(harness.localize(room[5], lambda frame: drive(harness, frame)))  # the odometry moves, we do not
    if suspect - believed < 2 * 10**9:
        values = harness.statuses[suspect]
        assert values["state"] == "DEGRADED" and "prediction by odometry" in values["reason"], values
        assert values["published"] == "true" and values["transform"] == values["reason"]
    assert harness.set_parameter("/localizer", "max_odom_jump", 0.0).successful
    last = stamp_of(harness.localize(room[4], lambda frame: drive(harness, frame)))
    assert harness.statuses[last]["state"] == "TRACKING"


def status_of(harness: Any, frame: Any) -> dict[str, str]:
    """Status of a frame with odometry; sent until one is processed."""
    for _ in range(10):
        stamp_ns = drive(harness, frame)
        if harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 5.0, must=False):
            return dict(harness.statuses[stamp_ns])
    raise AssertionError("no frame was processed")


def test_without_a_mount_nothing_is_sound(robot: Any, room: Any) -> None:
    harness = robot.harness
    assert harness.set_parameter("/localizer", "base_frame", "mast").successful
    harness.wait(lambda: status_of(harness, room[4])["published"] == "false")
    values = status_of(harness, room[4])
    assert values["state"] == "TRACKING"
    assert values["transform"] == f"none is broadcast: {values['reason']}" and "'mast'" in values["reason"]
    assert harness.set_parameter("/localizer", "base_frame", "base_link").successful
    harness.wait(lambda: status_of(harness, room[4])["transform"] == "sound")
    log = robot.nodes[0].log
    assert "First pose in map" in log and "TRACKING -> LOST: " in log and "LOST -> TRACKING." in log


def test_a_loop_of_another_node_is_not_closed(robot: Any, room: Any) -> None:
    harness = robot.harness
    harness.send_transform("odom", "map", time.time_ns(), np.eye(4))
    harness.spin(0.3)
    harness.transforms.clear()
    values = status_of(harness, room[4])
    assert "it would close a loop, because TF has odom -> map" in values["transform"]
    harness.spin(0.3)
    assert not anchors(harness), "and what was sent before is not sent again"


def test_a_mount_that_is_not_latched_is_used_and_told(new_world: Callable[[], Any], room: Any, room_map: Path) -> None:
    """As from a bag that was written without QoS profiles, and is played after the node has started."""
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.qos import results
    from kfloc_ros.nodes.transforms import stamped

    world = new_world()
    node = world.start_localizer(f"map:={room_map}", "base_frame:=base_link")
    mounts = world.harness.node.create_publisher(TFMessage, "/tf_static", results())
    world.harness.wait(lambda: mounts.get_subscription_count() > 0)
    mount = TFMessage(transforms=[stamped("base_link", "camera", 0, T_BASE_CAMERA)])

    def published() -> bool:
        mounts.publish(mount)
        stamp_ns = world.harness.send(room[4])
        return bool(world.harness.wait(lambda: stamp_ns in world.harness.poses, 0.5, must=False))

    world.harness.wait(published)
    assert "does not latch its transforms" in node.log
