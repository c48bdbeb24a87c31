# SPDX-License-Identifier: Apache-2.0
"""``~/localize`` as an action, and services that a hundred callers call at once, over real DDS."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.messages.poses import pose_from_message

pytestmark = pytest.mark.ros
needs_action = pytest.mark.skipif(
    importlib.util.find_spec("kfloc_msgs") is None, reason="kfloc_msgs is not built: `make setup` builds it"
)


@pytest.fixture(scope="module")
def world(new_world: Callable[[], Any], room_map: Path) -> Any:
    made = new_world()
    made.start_localizer(f"map:={room_map}", "max_gap_s:=60.0")
    return made


class Caller:
    """A client of the action that sends images meanwhile."""

    def __init__(self, harness: Any) -> None:
        from kfloc_msgs.action import Localize
        from rclpy.action import ActionClient

        self.kind, self.harness = Localize, harness
        self.client = ActionClient(harness.node, Localize, "/localizer/localize")
        harness.wait(self.client.server_is_ready)
        self.feedback: list[Any] = []

    def send(self, **goal: Any) -> Any:
        future = self.client.send_goal_async(
            self.kind.Goal(**goal), feedback_callback=lambda m: self.feedback.append(m.feedback)
        )
        self.harness.wait(future.done)
        return future.result()

    def result(self, handle: Any, frame: Any = None, timeout_s: float = 40.0) -> Any:
        """The response with status and result; a frame is sent again and again until then."""
        future, sent_s = handle.get_result_async(), 0.0
        deadline = time.monotonic() + timeout_s
        while not future.done():
            assert time.monotonic() < deadline, "no result"
            if frame is not None and time.monotonic() - sent_s > 0.4:
                self.harness.send(frame)
                sent_s = time.monotonic()
            self.harness.spin(0.05)
        return future.result()


@pytest.fixture
def caller(world: Any) -> Any:
    made = Caller(world.harness)
    yield made
    made.client.destroy()


@needs_action
@pytest.mark.parametrize("forget", [False, True])
def test_a_goal_ends_with_the_pose(world: Any, room: Any, caller: Caller, forget: bool) -> None:
    world.harness.localize(room[9])
    handle = caller.send(forget=forget)
    assert handle.accepted
    answer = caller.result(handle, room[4])
    assert answer.status == 4 and answer.result.found and answer.result.reason == "", "STATUS_SUCCEEDED"
    T = pose_from_message(answer.result.pose.pose.pose)
    assert np.allclose(T[:3, 3], room[4].T_map_camera[:3, 3], atol=0.05)
    assert answer.result.pose.header.frame_id == "map"
    assert caller.feedback[-1].stage == "found" and caller.feedback[-1].images >= 1


@needs_action
def test_what_does_not_look_like_the_map_is_tried_until_the_time_is_over(world: Any, room: Any, caller: Caller) -> None:
    from builtin_interfaces.msg import Duration

    grey = type(room[4])(np.full_like(room[4].image, 90), room.camera, 0)
    answer = caller.result(caller.send(timeout=Duration(sec=20)), grey)
    assert answer.status == 6 and not answer.result.found, "STATUS_ABORTED"
    assert "not found in time" in answer.result.reason
    assert {item.stage for item in caller.feedback} == {"tried"} and caller.feedback[-1].reason


@needs_action
def test_a_goal_can_be_cancelled_and_a_new_one_ends_the_old(world: Any, room: Any, caller: Caller) -> None:
    first = caller.send()
    second = caller.send()
    answer = caller.result(first)
    assert answer.status == 6 and "another goal" in answer.result.reason
    cancelled = second.cancel_goal_async()
    world.harness.wait(cancelled.done)
    answer = caller.result(second)
    assert answer.status == 5 and answer.result.reason == "cancelled", "STATUS_CANCELED"
    assert caller.result(caller.send(), room[4]).result.found, "and it goes on"


@needs_action
def test_a_node_that_is_switched_off_refuses(world: Any, room: Any, caller: Caller) -> None:
    from std_srvs.srv import SetBool

    assert world.harness.call(SetBool, "/localizer/enable", SetBool.Request(data=False)).success
    assert not caller.send().accepted
    assert world.harness.call(SetBool, "/localizer/enable", SetBool.Request(data=True)).success
    handle = caller.send()
    assert world.harness.call(SetBool, "/localizer/enable", SetBool.Request(data=False)).success
    assert "switched off" in caller.result(handle).result.reason
    assert world.harness.call(SetBool, "/localizer/enable", SetBool.Request(data=True)).success


@pytest.mark.parametrize(("callers", "calls"), [(1, 100), (20, 5), (100, 1)])
def test_a_hundred_calls_at_once_are_all_answered(world: Any, room: Any, callers: int, calls: int) -> None:
    """Every client of a service hears all answers, so that in one process its own queue must hold them, too."""
    from std_srvs.srv import Trigger

    from kfloc_ros.nodes.qos import services

    harness = world.harness
    harness.localize(room[4])
    clients = [
        harness.node.create_client(Trigger, "/localizer/relocalize", qos_profile=services()) for _ in range(callers)
    ]
    harness.wait(lambda: all(client.service_is_ready() for client in clients))
    futures = [client.call_async(Trigger.Request()) for client in clients for _ in range(calls)]
    harness.wait(lambda: all(future.done() for future in futures), 20.0)
    assert all(future.result().success for future in futures)
    for client in clients:
        harness.node.destroy_client(client)
    harness.localize(room[4])
