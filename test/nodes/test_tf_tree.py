# SPDX-License-Identifier: Apache-2.0
"""No transform is broadcast that breaks the tree of TF frames, and stamps lie as far ahead as lookups need."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from tf2_msgs.msg import TFMessage

from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.nodes import tf_publisher, transforms
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.tf_publisher import StampLead, TfPublisher, tree_fault
from kfloc_ros.nodes.transforms import TransformListener, stamped
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.replay.processes import free_domain

NOW = 10**18
MS = 10**6


class Parents(dict[str, str]):
    """Parents by frame, as a listener knows them."""

    def parent(self, frame: str) -> str | None:
        return self.get(frame)

    def above(self, frame: str) -> list[str]:
        found: list[str] = []
        while (frame := self.get(frame, "")) and frame not in found:
            found.append(frame)
        return found


@pytest.mark.parametrize(
    ("parents", "said"),
    [
        ({}, ""),
        ({"odom": "map", "base": "odom", "map": "earth"}, ""),
        ({"map": "odom"}, "TF has odom -> map. Stop the publisher of 'odom' -> 'map'"),
        ({"map": "tag", "tag": "dock", "dock": "odom"}, "TF has odom -> dock -> tag -> map"),
        ({"map": "odom", "odom": "map"}, "would close a loop"),
        ({"odom": "world"}, "already has the parent 'world'"),
        ({"odom": "base"}, "already has the parent 'base'"),
        ({"odom": "map", "base": "map"}, "only through 'map', so this is no odometry"),
        ({"odom": "map", "base": "gps", "gps": "map"}, "stop the publisher of 'map' -> 'gps'"),
    ],
)
def test_only_a_transform_that_keeps_the_tree_is_broadcast(parents: dict[str, str], said: str) -> None:
    fault = tree_fault(Parents(parents), "map", "odom", "map_to_odom", "base")
    assert (said in fault) if said else not fault, fault
    assert fault == tree_fault(Parents(parents), "/map", "/odom", "map_to_odom", "/base")


@pytest.mark.parametrize("mode", ["map_to_odom", "map_to_base"])
def test_the_map_is_not_its_own_parent(mode: str) -> None:
    assert "cannot be its own parent" in tree_fault(Parents(), "map", "/map", mode)


def test_the_stamps_lie_as_far_ahead_as_the_latency_and_the_period_need() -> None:
    lead = StampLead()
    assert lead.needed_s(20.0) == 0.0
    for number in range(20):
        lead.add(NOW + 400 * MS * number, NOW + 400 * MS * number + 700 * MS)
    assert lead.needed_s(20.0) == pytest.approx(0.7 + 0.1)
    assert lead.needed_s(0.0) == pytest.approx(0.7 + 0.8), "until the next pose but one"
    for number in range(20, 40):
        lead.add(NOW + 400 * MS * number, NOW + 400 * MS * number + 100 * MS)
    assert lead.needed_s(20.0) == pytest.approx(0.2), "a latency that is over does not count"


def test_a_period_that_a_busy_machine_draws_out_counts() -> None:
    lead = StampLead()
    lead.add(NOW, NOW + 100 * MS)
    for sent_s in (0.0, 0.05, 0.1, 0.4, 0.45, 60.0):
        lead.note_sent(sent_s)
    assert lead.needed_s(20.0) == pytest.approx(0.1 + 2 * 0.3), "a minute is a pause"
    for number in range(256):
        lead.note_sent(60.0 + 0.05 * number)
    assert lead.needed_s(20.0) == pytest.approx(0.2)


def test_clocks_that_differ_are_no_latency() -> None:
    lead = StampLead()
    for stamp_ns in (NOW, NOW + 3600 * 10**9, NOW + 1800 * 10**9):
        lead.add(stamp_ns, stamp_ns + 86_400 * 10**9)
        lead.add(stamp_ns, stamp_ns - 10**9)
    assert lead.needed_s(20.0) == lead.needed_s(0.0) == 0.0


class Health:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warn = self.inform = self.said.append


class World:
    """A listener and a publisher of transforms in this process, with what was broadcast."""

    def __init__(self, node: Any, sent: list[Any], **values: Any) -> None:
        self.sent, self.health = sent, Health()
        self.parameters = SimpleNamespace(node=NodeConfig(**{"transform_rate_hz": 20.0, **values}))
        self.listener = TransformListener(node, self.health.warn)
        self.publisher = TfPublisher(
            node,
            self.parameters,
            "map",
            self.listener,
            self.health,
            EnableSwitch(active=True),  # type: ignore[arg-type]
        )
        self.clock = node.get_clock()

    def hear(self, parent: str, child: str, stamp_ns: int = 0, x: float = 0.0, *, static: bool = False) -> None:
        item = stamped(parent, child, stamp_ns or self.clock.now().nanoseconds, make_pose(np.eye(3), [x, 0, 0]))
        self.listener._add(TFMessage(transforms=[item]), static=static)

    def hear_odometry(self, stamp_ns: int) -> None:
        for offset_ns in (-50 * MS, 50 * MS):
            self.hear("odom", "base", stamp_ns + offset_ns, 1.0)

    def hear_itself(self) -> None:
        self.listener._add(TFMessage(transforms=list(self.sent)), static=False)

    def publish(self, age_s: float = 0.0, base: str = "base") -> str:
        stamp_ns = self.clock.now().nanoseconds - int(age_s * 1e9)
        self.hear_odometry(stamp_ns)
        return self.publisher.publish(stamp_ns, np.eye(4), base)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    sent: list[Any] = []
    monkeypatch.setattr(tf_publisher, "make_broadcaster", lambda node: sent.append)
    rclpy.init(domain_id=free_domain(os.getpid()))
    node = rclpy.create_node("tree_test")
    yield lambda **values: World(node, sent, **values)
    node.destroy_node()
    rclpy.try_shutdown()


def test_a_loop_is_not_closed_and_what_was_sent_is_not_sent_again(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds(tf_mode="map_to_odom")
    assert world.publish() == "" and len(world.sent) == 1
    assert world.publisher.is_repeating
    world.hear_itself()
    time.sleep(0.06)
    world.publisher._resend()
    assert len(world.sent) == 2
    world.hear("odom", "map")
    time.sleep(0.06)
    world.publisher._resend()
    assert "would close a loop" in world.publish()
    assert len(world.sent) == 2 and "would close a loop" in world.health.said[-1]
    later = time.monotonic() + transforms.KEEP_S + 1.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert world.publish() == "", "its publisher has stopped"


def test_the_map_is_not_broadcast_below_itself(worlds: Any) -> None:
    world = worlds(tf_mode="map_to_base")
    assert "cannot be its own parent" in world.publish(base="map") and not world.sent


def test_a_renamed_odometry_frame_ends_the_old_transform(worlds: Any) -> None:
    world = worlds(tf_mode="map_to_odom")
    world.publish()
    world.parameters.node = NodeConfig(tf_mode="map_to_odom", odom_frame="odometry")
    time.sleep(0.06)
    world.publisher._resend()
    assert len(world.sent) == 1


@pytest.mark.parametrize("mode", ["map_to_odom", "map_to_base"])
def test_a_second_localizer_is_told(worlds: Any, mode: str) -> None:
    world = worlds(tf_mode=mode)
    child = "odom" if mode == "map_to_odom" else "camera"
    for _ in range(3):
        assert world.publish(base="base" if mode == "map_to_odom" else "camera") == ""
        world.hear_itself()
    world.hear("map", child, 17)
    said = world.publish(base="base" if mode == "map_to_odom" else "camera")
    assert f"Another node also broadcasts map -> {child}" in said
    assert len(world.sent) == 4, "one of the two must go on"


def test_a_second_mount_and_a_second_parent_are_told(worlds: Any) -> None:
    world = worlds()
    for _ in range(2):
        world.hear("base", "camera", x=0.1, static=True)
    assert not world.health.said
    world.hear("base", "camera", x=0.2, static=True)
    assert "'base' -> 'camera' changed" in world.health.said[-1]
    world.hear("mast", "camera")
    assert "changed from 'base' to 'mast'" in world.health.said[-1]


def test_map_to_odom_can_be_looked_up_now_at_a_high_latency(worlds: Any) -> None:
    world = worlds(tf_mode="map_to_odom")
    world.publish(age_s=0.7)
    now_ns = world.clock.now().nanoseconds
    stamp = world.sent[-1].header.stamp
    assert stamp.sec * 10**9 + stamp.nanosec >= now_ns + 50 * MS, "until after it is sent again"
    world.publish(age_s=0.7)
    told = [line for line in world.health.said if "transform_tolerance 0.3 s is too short" in line]
    assert len(told) == 1, world.health.said


@pytest.mark.thorough
def test_a_long_chain_of_frames_is_walked_in_linear_time(worlds: Any) -> None:
    world = worlds()
    items = [stamped(f"f{number}", f"f{number + 1}", NOW, np.eye(4)) for number in range(20_000)]
    world.listener._add(TFMessage(transforms=[*items, stamped("f20000", "f0", NOW, np.eye(4))]), static=False)
    start = time.process_time()
    assert len(world.listener.above("f20000")) == 20_001
    assert time.process_time() - start < 0.5
