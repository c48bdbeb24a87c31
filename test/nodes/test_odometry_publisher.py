# SPDX-License-Identifier: Apache-2.0
"""``odometry/map`` and what else the publisher of poses tells, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from geometry_msgs.msg import PoseWithCovarianceStamped
from sensor_msgs.msg import Imu
from tf2_msgs.msg import TFMessage

from kfloc_ros.errors import ConfigError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.messages.poses import BodyPose, fill_stamp, pose_from_message
from kfloc_ros.nodes.odometry_publisher import OdometryPublisher
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.pose_publisher import PosePublisher
from kfloc_ros.nodes.transforms import TransformListener, stamped
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.replay.processes import free_domain
from kfloc_ros.types import PoseEstimate, TrackingState

pytestmark = pytest.mark.ros
START_NS = 1_700_000_000 * 10**9
MS = 1_000_000
T_BASE_CAMERA = make_pose(so3_exp([-np.pi / 2, 0.0, 0.0]), [0.1, 0.0, 0.5])


class Health:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warn = self.inform = self.said.append


def at(x: float, turn_rad: float = 0.0, z: float = 0.0) -> Any:
    return make_pose(so3_exp([0.0, 0.0, turn_rad]), [x, 0.0, z])


class World:
    """A listener, and publishers whose messages are kept instead of sent."""

    def __init__(self, node: Any, **values: Any) -> None:
        self.node, self.health, self.sent = node, Health(), []
        given = {"rate_hz": 50.0, "base_frame": "base", "tf_mode": "map_to_odom", "transform_timeout": 0.0, **values}
        self.parameters: Any = SimpleNamespace(node=NodeConfig(**given))
        self.listener = TransformListener(node, self.health.warn)
        self.switch = EnableSwitch(active=True)

    def odometry_publisher(self) -> OdometryPublisher:
        made = OdometryPublisher(self.node, self.parameters, "map", self.listener, self.health, self.switch)  # type: ignore[arg-type]
        made._publisher = SimpleNamespace(publish=self.sent.append)
        return made

    def pose_publisher(self) -> PosePublisher:
        return PosePublisher(self.node, self.parameters, "map", self.listener, self.health, self.switch)  # type: ignore[arg-type]

    def hear(self, parent: str, child: str, stamp_ns: int, T: Any, *, static: bool = False) -> None:
        self.listener._add(TFMessage(transforms=[stamped(parent, child, stamp_ns, T)]), static=static)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    rclpy.init(domain_id=free_domain(os.getpid()))
    made = rclpy.create_node("odometry_test")
    yield made
    made.destroy_node()
    rclpy.try_shutdown()


def test_the_pose_goes_on_with_odometry(node: Any) -> None:
    world = World(node)
    publisher = world.odometry_publisher()
    publisher._publish()
    assert not world.sent and "needs odometry" in world.health.said[-1]
    publisher.fix(START_NS + 10 * MS, BodyPose(at(5.0, np.pi / 2), 1e-4 * np.eye(6)), "base")
    for number in range(40):
        world.hear("odom", "base", START_NS + 20 * MS * number, at(0.02 * number))
        publisher._publish()
    assert len(world.sent) == 39, "none before there is odometry after the image"
    last = world.sent[-1]
    assert (last.header.frame_id, last.child_frame_id) == ("map", "base")
    T = pose_from_message(last.pose.pose)
    assert np.allclose(T[:3, 3], [5.0, 0.77, 0.0], atol=1e-6)
    assert last.pose.covariance[0] > world.sent[0].pose.covariance[0] > 1e-4
    assert last.twist.twist.linear.x == pytest.approx(1.0)
    before = len(world.sent)
    publisher._publish()
    assert len(world.sent) == before, "nothing new is known"
    publisher.reset()
    world.hear("odom", "base", START_NS + 2000 * MS, at(1.0))
    publisher._publish()
    assert len(world.sent) == before, "after a reset there is no pose"


def test_a_gyroscope_bridges_late_odometry_and_nonsense_is_refused(node: Any) -> None:
    world = World(node, use_imu=True, planar=True, ground_height=0.25)
    publisher = world.odometry_publisher()
    world.hear("base", "imu", 0, make_pose(so3_exp([np.pi, 0, 0]), [0, 0, 0.1]), static=True)
    publisher.fix(START_NS, BodyPose(at(1.0, z=0.25), 1e-4 * np.eye(6)), "base")
    for number in range(6):
        world.hear("odom", "base", START_NS + 20 * MS * number, at(0.0))
        publisher._publish()

    def turn(stamp_ns: int, rate: float) -> None:
        message = Imu()
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = "imu"
        message.angular_velocity.z = rate
        publisher._on_imu(message)

    for number in range(1, 21):
        turn(START_NS + (100 + 5 * number) * MS, -1.0)  # the sensor is mounted upside down
    publisher._publish()
    last = world.sent[-1]
    T = pose_from_message(last.pose.pose)
    assert rotation_angle_deg(T[:3, :3]) == pytest.approx(np.degrees(0.1), abs=0.1) and T[1, 0] > 0
    assert T[2, 3] == 0.25, "on the ground plane"
    turn(START_NS + 300 * MS, float("nan"))
    assert "is not finite" in world.health.said[-1]


def estimate(stamp_ns: int, T_map_base: Any, state: TrackingState = TrackingState.TRACKING) -> PoseEstimate:
    covariance = np.diag([0.01**2] * 3 + [0.005**2] * 3)
    return PoseEstimate(stamp_ns, state, "", T_map_camera=T_map_base @ T_BASE_CAMERA, covariance=covariance)


def test_planar_poses_and_those_off_the_plane(node: Any) -> None:
    world = World(node, planar=True)
    publisher = world.pose_publisher()
    world.hear("base", "camera", 0, T_BASE_CAMERA, static=True)
    for number in range(5):
        world.hear("odom", "base", START_NS + 100 * MS * number, at(0.0))
    tilted = make_pose(so3_exp([0.01, 0.0, 0.0]), [1.0, 2.0, 0.01])
    good = publisher.publish(estimate(START_NS + 50 * MS, tilted), "camera")
    assert good.transform_text == "sound" and good.suspect == "" and 0.005 < good.deviation_m < 0.02
    assert publisher.last is not None and publisher.last.body.T_map_body[2, 3] == 0.0
    off = publisher.publish(estimate(START_NS + 150 * MS, at(1.0, z=0.6)), "camera")
    assert "0.60 m above the ground plane" in off.suspect and off.deviation_m > 0.05
    with pytest.raises(ConfigError, match="'planar' needs 'base_frame'"):
        NodeConfig(planar=True)


def test_odometry_predicts_the_next_image(node: Any) -> None:
    world = World(node)
    publisher = world.pose_publisher()
    assert publisher.predict("camera", START_NS) is None
    world.hear("base", "camera", 0, T_BASE_CAMERA, static=True)
    for number in range(60):
        world.hear("odom", "base", START_NS + 100 * MS * number, at(0.1 * number, 0.05 * number))
    publisher.publish(estimate(START_NS + 100 * MS, at(4.0, 0.05)), "camera")
    predicted = publisher.predict("camera", START_NS + 5000 * MS)
    assert predicted is not None
    expected = at(4.0, 0.05) @ inverse_pose(at(0.1, 0.05)) @ at(5.0, 2.5) @ T_BASE_CAMERA
    assert np.allclose(predicted, expected, atol=1e-6)
    assert publisher.predict("camera", START_NS + 60_000 * MS) is None, "odometry does not reach so far"


def test_a_first_pose_that_waits_for_others_moves_no_transform(node: Any) -> None:
    world = World(node)
    publisher = world.pose_publisher()
    world.hear("base", "camera", 0, T_BASE_CAMERA, static=True)
    for number in range(5):
        world.hear("odom", "base", START_NS + 100 * MS * number, at(0.0))
    first = replace(estimate(START_NS + 50 * MS, at(1.0)), tentative=True, reason="waits for 1 more")
    waiting = publisher.publish(first, "camera")
    assert waiting.pose == "" and waiting.suspect == "waits for 1 more" and not waiting.is_repeating
    assert publisher.last is not None, "the pose itself is published"
    second = publisher.publish(estimate(START_NS + 150 * MS, at(1.0)), "camera")
    assert second.transform_text == "sound" and second.is_repeating


def test_a_second_publisher_of_poses_is_told_in_every_tf_mode(node: Any) -> None:
    world = World(node, tf_mode="none")
    publisher = world.pose_publisher()
    assert publisher.rival() == ""
    other = node.create_publisher(PoseWithCovarianceStamped, "pose", 1)
    assert "also publish on /pose" in publisher.rival()
    node.destroy_publisher(other)
