# SPDX-License-Identifier: Apache-2.0
"""Where the search begins, over real DDS: an initial pose, a saved pose, and inputs that cannot be heard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.messages.poses import BodyPose, fill_pose_with_covariance, pose_from_message

pytestmark = pytest.mark.ros

NewWorld = Callable[[], Any]
BLIND = "pnp_min_inliers:=100000"
"""No coarse pose ever: only a place to start from leads to a pose."""


def send_initial_pose(harness: Any, T: Any, frame_id: str = "map", **changes: Any) -> None:
    from geometry_msgs.msg import PoseWithCovarianceStamped

    message = PoseWithCovarianceStamped()
    message.header.frame_id = frame_id
    fill_pose_with_covariance(message.pose, BodyPose(T, 0.02 * np.eye(6)))
    for name, value in changes.items():
        setattr(message.pose.pose.position, name, value)
    if "initialpose" not in harness._publishers:
        publisher = harness.node.create_publisher(PoseWithCovarianceStamped, "initialpose", 10)
        harness._publishers["initialpose"] = publisher
    harness.wait(lambda: harness._publishers["initialpose"].get_subscription_count() > 0)
    harness.spin(0.2)
    harness._publishers["initialpose"].publish(message)


def answer(harness: Any, frame: Any) -> tuple[int, str]:
    """Stamp and state of a frame, sent until it is answered."""
    for _ in range(5):
        stamp_ns = harness.send(frame)
        if harness.wait(lambda stamp=stamp_ns: stamp in harness.statuses, 5.0, must=False):
            return stamp_ns, harness.statuses[stamp_ns]["state"]
    raise AssertionError("no answer")


def test_an_initial_pose_is_tried_a_bad_one_refused_and_the_last_one_found_again_at_the_next_start(
    new_world: NewWorld, room_map: Path, room: Any, tmp_path: Path
) -> None:
    world, file = new_world(), tmp_path / "last_pose.json"
    arguments = (f"map:={room_map}", BLIND, "relocalize:=false", f"pose_file:={file}", "max_gap_s:=60.0")
    node = world.start_localizer(*arguments)
    harness, frame = world.harness, room[4]
    assert answer(harness, frame)[1] == "INITIALIZING"
    send_initial_pose(harness, frame.T_map_camera, x=float("nan"))
    harness.wait(lambda: "An initial pose was refused" in node.log)
    send_initial_pose(harness, frame.T_map_camera, "moon")
    harness.wait(lambda: "it is in the frame 'moon', the map is 'map'" in node.log)
    assert answer(harness, frame)[1] == "INITIALIZING"

    near = frame.T_map_camera @ make_pose(np.eye(3), [0.08, -0.03, 0.05])
    send_initial_pose(harness, near)
    harness.wait(lambda: "the next image tries it" in node.log)
    stamp_ns, state = answer(harness, frame)
    assert state == "TRACKING", harness.statuses[stamp_ns]
    T = pose_from_message(harness.poses[stamp_ns].pose.pose)
    assert np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3]) < 0.02
    assert node.end() == 0, node.log
    saved = json.loads(file.read_text())
    assert np.allclose(saved["T_map_camera"], T, atol=1e-3)

    world.nodes.clear()
    second = world.start_localizer(*arguments)
    assert "The search starts at the saved pose" in second.log
    assert answer(harness, frame)[1] == "TRACKING"
    assert second.end() == 0

    file.write_text(json.dumps({**saved, "map": "another"}))
    world.nodes.clear()
    third = world.start_localizer(*arguments)
    assert answer(harness, frame)[1] == "INITIALIZING"
    assert "belongs to another map" in third.log


def test_a_publisher_with_other_qos_is_named_with_the_parameter_to_change(
    new_world: NewWorld, room_map: Path, room: Any
) -> None:
    from geometry_msgs.msg import PoseWithCovarianceStamped
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image
    from tf2_msgs.msg import TFMessage

    world = new_world()
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    world.harness.node.create_publisher(Image, "image", best_effort)
    world.harness.node.create_publisher(PoseWithCovarianceStamped, "initialpose", best_effort)
    world.harness.node.create_publisher(TFMessage, "/tf", best_effort)
    node = world.start_localizer(f"map:={room_map}", "image_reliability:=reliable")
    world.harness.wait(lambda: "No messages can be received from a publisher on '/image'" in node.log, 10.0)
    assert "lower RELIABILITY" in node.log and "Set image_reliability" in node.log
    for topic, parameter in (("/initialpose", "initialpose_reliability"), ("/tf", "tf_reliability")):
        world.harness.wait(
            lambda topic=topic: f"No messages can be received from a publisher on '{topic}'" in node.log, 10.0
        )
        assert f"Set {parameter}" in node.log
    world.harness.localize(room[4])  # from the other publisher, which is reliable


def test_a_calibration_that_was_latched_before_the_start_is_received(
    new_world: NewWorld, room_map: Path, room: Any
) -> None:
    """As of a camera_info that is published once, also with the parameters' defaults."""
    from sensor_msgs.msg import CameraInfo

    from kfloc_ros.nodes.qos import latched

    world = new_world()
    harness = world.harness
    harness.node.destroy_publisher(harness._publishers["info"])
    harness._publishers["info"] = harness.node.create_publisher(CameraInfo, "camera_info", latched())
    harness.send_info(room.camera, time.time_ns())
    world.start_localizer(f"map:={room_map}")

    def send(frame: Any) -> int:
        stamp_ns = time.time_ns()
        harness.send_image(frame.image, stamp_ns)
        return stamp_ns

    harness.localize(room[4], send)
