# SPDX-License-Identifier: Apache-2.0
"""The camera component in this process: what its output raises never ends it."""

from __future__ import annotations

import array
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.errors import FrameError, MapError
from kfloc_ros.replay.processes import free_domain

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image

from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes.camera import ImageReceiver
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import EnableSwitch

pytestmark = pytest.mark.ros


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain(os.getpid()))
    node = Node("camera_test", context=context, automatically_declare_parameters_from_overrides=True)
    yield node
    node.destroy_node()
    context.try_shutdown()


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        threading.Event().wait(0.005)


def test_an_internal_error_is_counted_reported_and_survived(node: Node, room: Any) -> None:
    health, seen, resets = Health(node.get_logger()), [], []

    def output(packet: Any) -> None:
        seen.append(packet)
        if len(seen) == 1:
            raise ZeroDivisionError("as planned")
        if len(seen) == 2:
            raise FrameError("This frame is of no use.")

    switch = EnableSwitch(active=True)
    component = ImageReceiver(node, ParameterServer(node), room.camera, health, switch, output, resets.append)
    try:
        component._on_info(fill_info(CameraInfo(), room.camera))
        for number in range(1, 4):
            message = fill_image(Image(), room[number].image)
            fill_stamp(message.header.stamp, time.time_ns())
            message.header.frame_id = "lens"
            component._on_image(message)
            wait(lambda number=number: len(seen) == number)
    finally:
        component.stop()
    assert (health.counters.received, health.counters.failed, health.counters.refused) == (3, 1, 1)
    assert resets == ["an internal error"], "a refused frame is no reason to start anew"
    assert seen[-1].frame_id == "lens" and (seen[-1].frame.image == room[3].image).all()


class Listening(Health):
    """Keeps what is warned of."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.get_logger())
        self.said: list[str] = []

    def warn(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.mark.parametrize(("info_frame", "warned"), [("lens", False), ("", False), ("depth_lens", True)])
def test_a_camera_info_of_another_camera_is_warned_of(node: Node, room: Any, info_frame: str, warned: bool) -> None:
    health, seen = Listening(node), []
    component = ImageReceiver(node, ParameterServer(node), room.camera, health, EnableSwitch(active=True), seen.append)
    try:
        info = fill_info(CameraInfo(), room.camera)
        info.header.frame_id = info_frame
        component._on_info(info)
        message = fill_image(Image(), room[0].image)
        fill_stamp(message.header.stamp, time.time_ns())
        message.header.frame_id = "/lens"
        component._on_image(message)
        wait(lambda: len(seen) == 1)
    finally:
        component.stop()
    assert any("calibration of another camera" in sentence for sentence in health.said) == warned


def test_cameras_that_change_are_told_and_two_on_one_topic_are_refused(node: Node, room: Any) -> None:
    health, seen = Listening(node), []
    component = ImageReceiver(node, ParameterServer(node), room.camera, health, EnableSwitch(active=True), seen.append)
    zoomed = replace(room.camera, fx=1.1 * room.camera.fx, fy=1.1 * room.camera.fy)
    focused = replace(room.camera, fx=1.002 * room.camera.fx)
    try:
        for number, camera in enumerate([room.camera, focused, room.camera, zoomed, room.camera, zoomed]):
            component._on_info(fill_info(CameraInfo(), camera))
            message = fill_image(Image(), room[number].image)
            fill_stamp(message.header.stamp, time.time_ns())
            component._on_image(message)
            wait(lambda number=number: len(seen) + health.counters.refused == number + 1)
            assert any("The camera changes" in sentence for sentence in health.said) == (number > 2)
    finally:
        component.stop()
    assert [frame.frame.source_camera for frame in seen] == [room.camera, focused, room.camera, zoomed, room.camera]
    assert any("changes again and again between cameras" in sentence for sentence in health.said)


@pytest.mark.parametrize(
    ("topic", "transport", "rectified", "warned"),
    [("/cam/image_rect", "raw", False, True), ("/cam/image_rect", "compressed", False, True),
     ("/cam/image_rect", "raw", True, False), ("/cam/image_corrected", "raw", False, False)],
)  # fmt: skip
def test_a_rectified_topic_that_would_be_undistorted_once_more_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, room: Any, topic: str, transport: str, rectified: bool, warned: bool
) -> None:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain(os.getpid()))
    arguments = ["--ros-args", "-r", f"image:={topic}"]
    arguments += ["-p", f"image_transport:={transport}", "-p", f"rectified:={str(rectified).lower()}"]
    node = Node(
        "camera_test", context=context, cli_args=arguments, automatically_declare_parameters_from_overrides=True
    )
    health = Listening(node)
    try:
        component = ImageReceiver(
            node, ParameterServer(node), room.camera, health, EnableSwitch(active=True), lambda packet: None
        )
        component.stop()
    finally:
        node.destroy_node()
        context.try_shutdown()
    assert any("is called rectified" in sentence for sentence in health.said) == warned


def test_live_parameters_reach_the_configuration(node: Node) -> None:
    from rclpy.parameter import Parameter

    server = ParameterServer(node)
    assert node.set_parameters([Parameter("max_age_s", value=3.0)])[0].successful
    assert server.node.max_age_s == 3.0
    refused = node.set_parameters([Parameter("max_age_s", value=-3.0)])[0]
    assert not refused.successful and "3600" in refused.reason
    assert server.node.max_age_s == 3.0


def test_a_change_that_needs_a_reload_is_checked_before_it_is_accepted(node: Node) -> None:
    from rclpy.parameter import Parameter

    asked: list[str] = []

    def check(config: Any, localizer: Any) -> None:
        asked.append(config.map)
        if config.map == "nowhere":
            raise MapError("There is no map 'nowhere'.")

    server = ParameterServer(node, check)
    refused = node.set_parameters([Parameter("map", value="nowhere")])[0]
    assert not refused.successful and "no map 'nowhere'" in refused.reason and server.node.map == ""
    assert node.set_parameters([Parameter("map", value="kitchen"), Parameter("pnp_min_inliers", value=30)])[
        0
    ].successful
    assert (server.node.map, server.localizer.pnp_min_inliers) == ("kitchen", 30)
    assert node.set_parameters([Parameter("map", value="kitchen")])[0].successful
    assert asked == ["nowhere", "kitchen", "kitchen"], "what does not change anything reloads nothing"
    refused = node.set_parameters([Parameter("autostart", value=False)])[0]
    assert not refused.successful and "read-only" in refused.reason


class DepthWorld:
    """An image receiver that uses depth."""

    def __init__(self, room: Any) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=free_domain(os.getpid()))
        arguments = ["--ros-args", "-p", "use_depth:=true"]
        self.node = Node(
            "camera_test",
            context=self.context,
            cli_args=arguments,
            automatically_declare_parameters_from_overrides=True,
        )
        self.health, self.seen, self.room = Listening(self.node), [], room
        switch = EnableSwitch(active=True)
        parameters = ParameterServer(self.node)
        self.receiver = ImageReceiver(self.node, parameters, room.camera, self.health, switch, self.seen.append)
        self.receiver._on_info(fill_info(CameraInfo(), room.camera))

    def depth(self, stamp_ns: int, depth_m: Any, frame_id: str = "lens") -> None:
        message = Image(height=depth_m.shape[0], width=depth_m.shape[1], step=4 * depth_m.shape[1], encoding="32FC1")
        message.data = array.array("B", depth_m.astype(np.float32).tobytes())
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = frame_id
        assert self.receiver._depth is not None
        self.receiver._depth._on_depth(message)

    def image(self, stamp_ns: int, number: int) -> Any:
        message = fill_image(Image(), self.room[number].image)
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = "lens"
        count = len(self.seen)
        self.receiver._on_image(message)
        wait(lambda: len(self.seen) == count + 1)
        return self.seen[-1].frame

    def close(self) -> None:
        self.receiver.stop()
        self.node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def depth_world(monkeypatch: pytest.MonkeyPatch, room: Any) -> Iterator[DepthWorld]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    world = DepthWorld(room)
    yield world
    world.close()


def test_an_image_gets_the_depth_of_its_time(depth_world: DepthWorld, room: Any) -> None:
    now = time.time_ns()
    for k in range(4):
        depth_world.depth(now + k * 33_000_000, np.full_like(room[0].depth_m, 1.0 + k))
    assert (depth_world.image(now + 66_000_000 + 9_000_000, 1).depth_m == 3.0).all(), "9 ms apart"
    assert depth_world.image(now + 500_000_000, 2).depth_m is None, "none is within 20 ms"
    assert any("localized without depth" in sentence for sentence in depth_world.health.said)


def test_depth_that_comes_after_its_image_is_awaited_a_moment(
    depth_world: DepthWorld, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kfloc_ros.nodes.camera._DEPTH_WAIT_S", 3.0)  # a busy machine
    now = time.time_ns()
    late = threading.Timer(0.02, lambda: depth_world.depth(now, room[1].depth_m))
    late.start()
    frame = depth_world.image(now, 1)
    late.join()
    assert np.array_equal(frame.depth_m, room[1].depth_m)


def test_depth_that_is_not_registered_is_not_used_and_told(depth_world: DepthWorld, room: Any) -> None:
    now = time.time_ns()
    depth_world.depth(now, room[1].depth_m, frame_id="infrared_lens")
    assert depth_world.image(now, 1).depth_m is None
    depth_world.depth(now + 100_000_000, room[1].depth_m[::2, ::2])
    assert depth_world.image(now + 100_000_000, 2).depth_m is None
    said = " ".join(depth_world.health.said)
    assert "registered to the colour image" in said and "must have the image's size" in said
