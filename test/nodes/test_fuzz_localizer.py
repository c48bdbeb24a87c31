# SPDX-License-Identifier: Apache-2.0
"""The whole localizer in this process, its callbacks called with anything in any order.

No callback raises, no frame is lost to an internal error, nothing that is not finite is published, and the next good
image is localized.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: `make setup-dev` brings it")
pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import (
    Point,
    Pose,
    PoseWithCovariance,
    PoseWithCovarianceStamped,
    Quaternion,
    Transform,
    TransformStamped,
    Vector3,
)
from hypothesis import strategies as st
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from kfloc_ros.errors import KflocError
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp, pose_from_message
from kfloc_ros.nodes import worker as intake
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.localizer_stage import LocalizerStage
from kfloc_ros.nodes.managed_node import RELOCALIZE, RESET
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.parameters import parameter_table
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.replay.processes import free_domain

pytestmark = pytest.mark.ros


class Outlet:
    """A publisher that everybody listens to, and that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def publish(self, message: Any) -> None:
        self.sent.append(message)

    def get_subscription_count(self) -> int:
        return 1


class OpenNode(Node):
    """A real node whose callbacks can be called, and whose messages can be looked at."""

    def __init__(self, context: Any) -> None:
        self.inlets: dict[str, Callable[[Any], None]] = {}
        self.outlets: dict[str, Outlet] = {}
        self.ticks: list[Callable[[], None]] = []
        self.open = False
        super().__init__("fuzz_test", context=context, automatically_declare_parameters_from_overrides=True)
        self.open = True

    def create_subscription(self, kind: Any, topic: str, callback: Any, *args: Any, **more: Any) -> Any:
        self.inlets[topic.strip("/")] = callback
        return super().create_subscription(kind, topic, callback, *args, **more)

    def create_publisher(self, kind: Any, topic: str, *args: Any, **more: Any) -> Any:
        if not self.open:
            return super().create_publisher(kind, topic, *args, **more)
        return self.outlets.setdefault(topic.strip("/"), Outlet())

    def create_timer(self, period: float, callback: Any, *args: Any, **more: Any) -> Any:
        self.ticks.append(callback)
        return super().create_timer(period, callback, *args, **more)


class AtOnce:
    """A worker that works in the caller's thread."""

    is_idle = True

    def __init__(self, name: str, handle: Callable[[Any], None], on_error: Callable[[Exception], None]) -> None:
        self._handle, self._on_error = handle, on_error

    def submit(self, item: Any) -> bool:
        try:
            self._handle(item)
        except Exception as error:
            self._on_error(error)
        return False

    def hand_over(self, item: Any, patience_s: float, help_with: Callable[[], None]) -> bool:
        help_with()
        return self.submit(item)

    def discard(self) -> bool:
        return False

    def pause(self) -> None: ...
    def stop(self) -> None: ...


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenNode]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setattr(intake, "LatestWorker", AtOnce)
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain(os.getpid()))
    made = OpenNode(context)
    yield made
    made.destroy_node()
    context.try_shutdown()


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1e-310, 1e8, 1e200, 1e308, float("inf"), float("-inf"), float("nan")]), st.floats(-5.0, 5.0)
)
NAMES = st.sampled_from(["", "map", "/map", "odom", "base", "camera", "camera/", "\U0001f916", "a" * 300])
NOW = st.floats(-3.0, 3.0).map(lambda offset_s: offset_s)
ROTATIONS = st.one_of(st.just((0.0, 0.0, 0.0, 1.0)), st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS))
INFOS = st.fixed_dictionaries(
    {},
    optional={
        "width": st.sampled_from([0, 320, 321, 2**32 - 1]), "d": st.lists(NUMBERS, max_size=8),
        "k": st.lists(NUMBERS, min_size=9, max_size=9), "binning_x": st.sampled_from([0, 2, 2**32 - 1]),
        "distortion_model": st.sampled_from(["plumb_bob", "equidistant", "rational_polynomial", "?"]),
    },
)  # fmt: skip
IMAGES = st.fixed_dictionaries(
    {},
    optional={
        "width": st.sampled_from([0, 1, 319, 320, 2**32 - 1]), "height": st.sampled_from([0, 1, 255, 2**32 - 1]),
        "step": st.sampled_from([0, 959, 961, 2**32 - 1]), "encoding": st.sampled_from(["", "mono8", "bgra8", "32FC1"]),
    },
)  # fmt: skip
STAMPS = st.one_of(
    st.floats(-2.0, 2.0),
    st.builds(Time, sec=st.integers(-(2**31), 2**31 - 1), nanosec=st.integers(0, 2**32 - 1)),
    st.sampled_from([Time(), Time(sec=2**31 - 1, nanosec=2**32 - 1), Time(sec=-(2**31))]),
)
POSITIONS = st.tuples(NUMBERS, NUMBERS, NUMBERS)
VALUES = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.sampled_from(["", "hold", "mark", "odom", "~x/y"]),
    st.lists(st.integers(0, 5), max_size=2), st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
LIVE = [name for name, row in parameter_table().items() if row.option.live]
ACTIONS = st.one_of(
    st.tuples(st.just("info"), INFOS, STAMPS),
    st.tuples(st.just("image"), IMAGES, STAMPS, NAMES),
    st.tuples(st.just("noise"), st.integers(0, 9), STAMPS, NAMES),
    st.tuples(st.just("initialpose"), POSITIONS, ROTATIONS, st.one_of(st.just(0.1), NUMBERS), NAMES, STAMPS),
    st.tuples(st.just("tf"), NAMES, NAMES, POSITIONS, ROTATIONS, STAMPS),
    st.tuples(st.just("tf_static"), NAMES, NAMES, POSITIONS, ROTATIONS, STAMPS),
    st.tuples(st.just("parameter"), st.sampled_from(LIVE), VALUES),
    st.tuples(st.just("anew"), st.sampled_from([RELOCALIZE, RESET, "activated"])),
    st.tuples(st.just("tick")),
)


def stamp_of(when: Any) -> Time:
    """A time given as such, or as seconds from now."""
    if isinstance(when, Time):
        return when
    stamp = Time()
    fill_stamp(stamp, time.time_ns() + int(when * 1e9))
    return stamp


class Player:
    """Does what the actions say."""

    def __init__(self, node: OpenNode, stage: LocalizerStage, frame: Any) -> None:
        self.node, self.stage, self.frame = node, stage, frame

    def do(self, kind: str, *values: Any) -> None:
        getattr(self, kind)(*values)

    def info(self, changes: dict[str, Any], when: Any = 0.0) -> None:
        message = fill_info(CameraInfo(), self.frame.camera)
        message.header.stamp = stamp_of(when)
        for name, value in changes.items():
            setattr(message, name, value)
        self.node.inlets["camera_info"](message)

    def image(self, changes: dict[str, Any], when: Any = 0.0, frame_id: str = "camera", picture: Any = None) -> Time:
        message = fill_image(Image(), self.frame.image if picture is None else picture)
        message.header = Header(stamp=stamp_of(when), frame_id=frame_id)
        for name, value in changes.items():
            setattr(message, name, value)
        self.node.inlets["image"](message)
        return message.header.stamp

    def noise(self, seed: int, when: Any, frame_id: str) -> None:
        shape = self.frame.image.shape
        self.image({}, when, frame_id, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def initialpose(self, position: Any, rotation: Any, variance: float, frame_id: str, when: Any) -> None:
        x, y, z, w = rotation
        pose = Pose(
            position=Point(**dict(zip("xyz", position, strict=True))), orientation=Quaternion(x=x, y=y, z=z, w=w)
        )
        covariance = [variance if i % 7 == 0 else 0.0 for i in range(36)]
        header = Header(stamp=stamp_of(when), frame_id=frame_id)
        given = PoseWithCovariance(pose=pose, covariance=covariance)
        self.node.inlets["initialpose"](PoseWithCovarianceStamped(header=header, pose=given))

    def tf(self, parent: str, child: str, position: Any, rotation: Any, when: Any, topic: str = "tf") -> None:
        x, y, z, w = rotation
        transform = Transform(
            translation=Vector3(**dict(zip("xyz", position, strict=True))), rotation=Quaternion(x=x, y=y, z=z, w=w)
        )
        header = Header(stamp=stamp_of(when), frame_id=parent)
        item = TransformStamped(header=header, child_frame_id=child, transform=transform)
        self.node.inlets[topic](TFMessage(transforms=[item]))

    def tf_static(self, *values: Any) -> None:
        self.tf(*values, "tf_static")

    def parameter(self, name: str, value: Any) -> None:
        result = self.node.set_parameters([Parameter(name, value=value)])[0]
        assert result.successful or result.reason

    def anew(self, reason: str) -> None:
        self.stage.request_reset(reason)

    def tick(self) -> None:
        for callback in self.node.ticks:
            callback()


def numbers_in(message: Any) -> Iterator[float]:
    """Every floating-point number of a message."""
    if hasattr(message, "get_fields_and_field_types"):
        for name in message.get_fields_and_field_types():
            yield from numbers_in(getattr(message, name))
    elif isinstance(message, float):
        yield message
    elif isinstance(message, np.ndarray):
        yield from (float(value) for value in message.reshape(-1))
    elif isinstance(message, (list, tuple)):
        for item in message:
            yield from numbers_in(item)


def test_anything_in_any_order(
    fuzz: Callable[..., None], node: OpenNode, room: Any, room_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = []
    told = Health.fault
    monkeypatch.setattr(Health, "fault", lambda self, error: (faults.append(error), told(self, error))[1])
    parameters = ParameterServer(node)
    stage = LocalizerStage(node, parameters, SceneMap.load(room_map), EnableSwitch(active=True))
    player = Player(node, stage, room[4])
    defaults = {name: row.option.default for name, row in parameter_table().items()}

    def check(actions: list[Any]) -> None:
        faults.clear()
        player.info({})
        with np.errstate(all="ignore"):
            for action in actions:
                player.do(*action)
            player.tick()
        foreign = [error for error in faults if not isinstance(error, KflocError)]
        assert not foreign, foreign
        for topic, outlet in node.outlets.items():
            sent, outlet.sent = outlet.sent, []
            if topic != "map_points":  # may have gaps by its definition
                assert all(np.isfinite(value) for message in sent for value in numbers_in(message)), topic
        for name in LIVE:
            if getattr(parameters.node, name, defaults[name]) != defaults[name]:
                node.set_parameters([Parameter(name, value=defaults[name])])

    try:
        fuzz(check, st.lists(ACTIONS, min_size=1, max_size=6), share=0.5)
        node.inlets["tf"](TFMessage())
        stage.request_reset(RESET)
        monkeypatch.setattr("kfloc_ros.nodes.camera._CHANGES_S", 0.0)  # the cameras of before took turns
        player.info({})
        for outlet in node.outlets.values():
            outlet.sent.clear()
        for _ in range(3):  # stamps from before may lie ahead
            time.sleep(0.01)
            player.image({}, 0.0, "lens")
        poses = node.outlets["pose"].sent
        assert poses, faults
        T = pose_from_message(poses[-1].pose.pose)
        assert np.linalg.norm(T[:3, 3] - room[4].T_map_camera[:3, 3]) < 0.05
    finally:
        stage.stop()
