# SPDX-License-Identifier: Apache-2.0
"""The nodes over real DDS: images in, poses, transforms and states out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.messages.poses import pose_from_message, transform_from_message

pytestmark = pytest.mark.ros

NewWorld = Callable[[], Any]


def assert_near(T: np.ndarray, truth: np.ndarray, metres: float = 0.03, degrees: float = 1.0) -> None:
    assert np.linalg.norm(T[:3, 3] - truth[:3, 3]) < metres
    assert rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]) < degrees


@pytest.fixture(scope="module")
def world(new_world: NewWorld, room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}")
    return world


def test_an_image_becomes_pose_transform_path_and_status(world: Any, room: Any) -> None:
    harness, frame = world.harness, room[4]
    message = harness.localize(frame)
    stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
    assert message.header.frame_id == "map"
    T = pose_from_message(message.pose.pose)
    assert_near(T, frame.T_map_camera)
    covariance = np.array(message.pose.covariance).reshape(6, 6)
    assert np.allclose(covariance, covariance.T) and (np.linalg.eigvalsh(covariance) > 0).all()

    harness.wait(lambda: bool(harness.transforms) and stamp_ns in harness.coarse)
    transform = harness.transforms[-1]
    assert (transform.header.frame_id, transform.child_frame_id) == ("map", "camera")
    assert transform.header.stamp == message.header.stamp
    assert np.allclose(transform_from_message(transform.transform), T)

    values = harness.statuses[stamp_ns]
    assert values["state"] == "TRACKING" and values["published"] == "true"
    for stage in ("decode", "rectify", "backbone", "measure", "filter", "pnp", "refine", "total", "publish"):
        assert float(values[f"{stage}_ms"]) >= 0
    assert float(values["latency_ms"]) >= float(values["total_ms"])
    assert int(values["processed"]) >= 1 and int(values["inliers"]) > 0

    harness.spin(0.6)  # paths come twice a second
    harness.localize(frame)
    harness.wait(lambda: any(pose.header.stamp == message.header.stamp for p in harness.paths for pose in p.poses))


def test_diagnostics_name_map_and_rates(world: Any, room: Any) -> None:
    world.harness.localize(room[4])
    world.harness.diagnostics.clear()
    world.harness.wait(lambda: "localizer: localization" in world.harness.diagnostics)
    status = world.harness.diagnostics["localizer: localization"]
    values = {pair.key: pair.value for pair in status.values}
    assert status.hardware_id == "room" and values["map"] == "room"
    assert {"input_hz", "output_hz", "latency_p50_ms", "latency_p95_ms", "dropped", "state"} <= values.keys()


def test_another_camera_with_a_distorting_lens_is_brought_to_the_maps(world: Any, room: Any) -> None:
    camera = Camera(400, 300, 300.0, 302.0, 203.0, 148.0, "plumb_bob", (-0.2, 0.05, 0.001, -0.001, 0.0))
    frame = room.at(5.0, camera=camera)
    assert_near(pose_from_message(world.harness.localize(frame).pose.pose), frame.T_map_camera)
    world.harness.localize(room[4])  # and back again


def test_only_the_newest_of_a_burst_is_worked_on_and_the_rest_are_counted(world: Any, room: Any) -> None:
    harness = world.harness
    harness.localize(room[4])
    before = max(harness.statuses)
    frames = [room[position] for position in range(8)]  # rendered before: that takes as long as to localize them
    stamps = []
    for position in range(30):
        stamps.append(harness.send(frames[position % 8]))
        harness.spin(0.001)  # much less than a frame takes
    while not harness.wait(lambda: stamps[-1] in harness.statuses, 5.0, must=False):
        assert len(stamps) < 35
        stamps.append(harness.send(frames[4]))  # the last one may be lost on the way: images are best effort
    values = harness.statuses[stamps[-1]]
    handled = sum(stamp in harness.statuses for stamp in stamps)
    assert handled < 30
    received = int(values["received"]) - int(harness.statuses[before]["received"])
    dropped = int(values["dropped"]) - int(harness.statuses[before]["dropped"])
    assert received <= len(stamps) and dropped == received - handled


def test_too_old_images_are_dropped_and_counted(world: Any, room: Any) -> None:
    harness = world.harness
    first = harness.localize(room[4]).header.stamp
    old_ns = harness.send(room[4], time.time_ns() - 20 * 10**9)
    harness.spin(0.5)
    after = harness.localize(room[4]).header.stamp
    assert old_ns not in harness.statuses and old_ns not in harness.poses
    counts = [int(harness.statuses[s.sec * 10**9 + s.nanosec]["dropped"]) for s in (first, after)]
    assert counts[1] > counts[0]
    assert "max_age_s" in world.nodes[0].log


def test_parameters_are_described_checked_and_live(world: Any) -> None:
    from rcl_interfaces.srv import DescribeParameters

    def set_parameter(name: str, value: Any) -> Any:
        return world.harness.set_parameter("/localizer", name, value)

    request = DescribeParameters.Request(names=["max_age_s", "map"])
    described = world.harness.call(DescribeParameters, "/localizer/describe_parameters", request)
    max_age, map_name = described.descriptors
    assert max_age.floating_point_range[0].to_value == 3600.0 and not max_age.read_only and max_age.description
    assert not map_name.read_only and map_name.description
    assert set_parameter("max_age_s", 2.0).successful
    assert not set_parameter("max_age_s", -1.0).successful
    assert not set_parameter("max_age_s", "soon").successful
    refused = set_parameter("autostart", False)
    assert not refused.successful and refused.reason
    refused = set_parameter("map", "elsewhere")
    assert not refused.successful and refused.reason
    assert set_parameter("max_age_s", 1.0).successful


def test_compressed_images_under_sim_time_and_a_clock_that_jumps_back(
    new_world: NewWorld, room_map: Path, room: Any
) -> None:
    world = new_world()
    node = world.start_localizer(f"map:={room_map}", "use_sim_time:=true", transport="compressed")
    harness = world.harness

    def send_at(time_ns: int) -> Callable[[Any], int]:
        def send(frame: Any) -> int:
            send.time_ns += 30_000_000
            for _ in range(5):
                harness.send_clock(send.time_ns)
                harness.spin(0.02)
            harness.send_info(frame.camera, send.time_ns)
            _, data = cv2.imencode(".jpg", frame.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            harness.send_compressed(data.tobytes(), send.time_ns)
            return send.time_ns

        send.time_ns = time_ns
        return send

    # In sim time the year is 1970: on the wall clock these images would be half a century too old.
    later = send_at(500 * 10**9)
    for position in range(3):
        assert_near(pose_from_message(harness.localize(room[position], later).pose.pose), room[position].T_map_camera)
    earlier = send_at(100 * 10**9)
    message = harness.localize(room[3], earlier)
    assert_near(pose_from_message(message.pose.pose), room[3].T_map_camera)
    values = harness.statuses[message.header.stamp.sec * 10**9 + message.header.stamp.nanosec]
    assert values["filter_reset"] == "time went backwards"
    harness.spin(0.6)
    harness.paths.clear()
    harness.localize(room[4], earlier)
    harness.wait(lambda: bool(harness.paths))
    assert all(pose.header.stamp.sec < 500 for pose in harness.paths[-1].poses)
    node.end_well(signal.SIGTERM)


def test_pose_of_a_base_frame_through_static_transforms(new_world: NewWorld, room_map: Path, room: Any) -> None:
    from geometry_msgs.msg import TransformStamped
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.messages.poses import fill_transform
    from kfloc_ros.nodes.qos import static_transforms

    world = new_world()
    node = world.start_localizer(f"map:={room_map}", "base_frame:=base_link")
    harness, frame = world.harness, room[4]
    stamp_ns = harness.send(frame)
    harness.wait(lambda: stamp_ns in harness.statuses)
    assert stamp_ns not in harness.poses and not harness.transforms, "no pose may be made up"
    assert "base_link" in harness.statuses[stamp_ns]["reason"]
    assert "TF does not connect" in node.log

    publisher = harness.node.create_publisher(TFMessage, "/tf_static", static_transforms())
    T_base_mount = make_pose(np.eye(3), [0.2, 0.0, 0.5])
    T_mount_camera = make_pose(so3_exp([0.3, -0.2, 1.0]), [0.01, 0.02, 0.03])
    transforms = []
    for parent, child, T in (("base_link", "mount", T_base_mount), ("mount", "camera", T_mount_camera)):
        item = TransformStamped(child_frame_id=child)
        item.header.frame_id = parent
        fill_transform(item.transform, T)
        transforms.append(item)
    publisher.publish(TFMessage(transforms=transforms))
    harness.wait(lambda: publisher.get_subscription_count() > 0)
    harness.spin(0.5)
    message = harness.localize(frame)
    truth = frame.T_map_camera @ np.linalg.inv(T_base_mount @ T_mount_camera)
    assert_near(pose_from_message(message.pose.pose), truth)
    harness.wait(lambda: bool(harness.transforms))
    assert harness.transforms[-1].child_frame_id == "base_link"


def test_three_processes_answer_as_one_does(new_world: NewWorld, room_map: Path, room: Any) -> None:
    world = new_world()
    for module in ("filter_node", "refiner_node", "camera_node"):
        world.start(module, f"map:={room_map}", "max_gap_s:=60.0")  # frames may take long here
    world.wait_ready()
    harness = world.harness
    harness.wait(lambda: {name for name, _ in harness.node.get_node_names_and_namespaces()} >= {
        "filter_node", "refiner_node", "camera_node"})  # fmt: skip
    harness.wait(lambda: harness.node.count_subscribers("coarse_status") > 0, 60.0)
    harness.wait(lambda: harness.node.count_subscribers("frame/image") > 1, 60.0)
    harness.wait(lambda: harness.node.count_subscribers("refined_pose") > 0, 60.0)
    from diagnostic_msgs.msg import DiagnosticArray

    confirmed: dict[int, str] = {}

    def read(message: Any) -> None:
        values = {pair.key: pair.value for pair in message.status[0].values}
        confirmed[message.header.stamp.sec * 10**9 + message.header.stamp.nanosec] = values["confirmed"]

    harness.node.create_subscription(DiagnosticArray, "coarse_status", read, 10)
    harness.spin(1.0)
    for position in (4, 4, 5, 5):
        message = harness.localize(room[position])
        assert_near(pose_from_message(message.pose.pose), room[position].T_map_camera)
    assert next(iter(confirmed.values())) == "false" and "true" in confirmed.values(), "refined poses go back"
    stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
    values = harness.statuses[stamp_ns]
    assert values["state"] == "TRACKING"
    assert {
        "decode_ms",
        "backbone_ms",
        "pnp_ms",
        "refine_ms",
        "latency_ms",
        "inliers",
        "received",
        "dropped",
    } <= values.keys()
    harness.wait(lambda: stamp_ns in harness.coarse)
    assert harness.transforms[-1].child_frame_id == "camera"
    for node, how in zip(world.nodes, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=True):
        node.end_well(how)
        assert "Traceback" not in node.log
