# SPDX-License-Identifier: Apache-2.0
"""Stamps of every kind over real DDS; jumps of /clock are in test_live_localizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ros

S = 10**9


@pytest.fixture(scope="module")
def world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}", "max_age_s:=0.0", "max_gap_s:=5.0")
    return world


def values_at(harness: Any, frame: Any, stamp_ns: int) -> dict[str, str]:
    """Status of a frame that is answered."""
    harness.send(frame, stamp_ns)
    harness.wait(lambda: stamp_ns in harness.statuses, 10.0)
    assert harness.statuses[stamp_ns]["published"] == "true"
    return dict(harness.statuses[stamp_ns])


def settle(harness: Any, frame: Any) -> int:
    """A stamp of now that is answered, whatever was before."""
    stamp = harness.localize(frame).header.stamp
    return int(stamp.sec * S + stamp.nanosec)


def test_an_image_without_a_stamp_is_refused(world: Any, room: Any) -> None:
    harness = world.harness
    settle(harness, room[4])
    harness.send(room[4], 0)
    harness.wait(lambda: "An image has no time stamp" in world.nodes[0].log)
    harness.spin(0.2)
    assert 0 not in harness.statuses
    settle(harness, room[5])


def test_duplicates_and_stragglers_are_dropped_without_harm(world: Any, room: Any) -> None:
    harness = world.harness
    now_ns = settle(harness, room[4])
    first = int(values_at(harness, room[4], now_ns + S // 10)["dropped"])
    before = dict(harness.statuses)
    harness.send(room[5], now_ns + S // 10)
    harness.wait(lambda: "the same stamp" in world.nodes[0].log)
    harness.send(room[5], now_ns + S // 20)
    harness.wait(lambda: "50 ms older" in world.nodes[0].log)
    harness.spin(0.2)
    assert harness.statuses == before
    values = values_at(harness, room[5], now_ns + S // 5)
    assert values["filter_reset"] == "" and int(values["dropped"]) == first + 2


def test_stamps_that_loop_without_a_clock_start_anew_and_clear_the_path(world: Any, room: Any) -> None:
    harness = world.harness
    now_ns = settle(harness, room[4])
    values = values_at(harness, room[4], now_ns - 100 * S)
    assert values["filter_reset"] == "time went backwards"
    assert values_at(harness, room[5], now_ns - 100 * S + S // 10)["filter_reset"] == ""


def test_a_small_loop_is_noticed_too(world: Any, room: Any) -> None:
    harness = world.harness
    start_ns = time.time_ns() + 1000 * S
    for number in range(4):
        values_at(harness, room[4], start_ns + number * S // 10)
    stamps = [start_ns - S + number * S // 10 for number in range(4)]
    for stamp_ns in stamps:
        harness.send(room[4], stamp_ns)
        harness.spin(0.3)
    harness.wait(lambda: stamps[-1] in harness.statuses)
    assert [stamp_ns in harness.statuses for stamp_ns in stamps] == [False, False, True, True]
    assert harness.statuses[stamps[2]]["filter_reset"] == "time went backwards"


def test_a_camera_whose_clock_is_ahead_is_localized_and_named(world: Any, room: Any) -> None:
    harness = world.harness
    values_at(harness, room[4], time.time_ns() + 5000 * S)
    assert "ahead of this node's clock" in world.nodes[0].log
    settle(harness, room[4])


def test_callbacks_do_not_wait_for_the_work(world: Any, room: Any) -> None:
    """The executor's answers while every frame is worked on; a heavy callback would starve /clock and TF."""
    from lifecycle_msgs.srv import GetState

    harness = world.harness
    settle(harness, room[4])
    client = harness.node.create_client(GetState, "/localizer/get_state")
    harness.wait(client.service_is_ready)
    lags_s = []
    for number in range(20):
        harness.send(room[number % 8])
        start_s = time.perf_counter()
        future = client.call_async(GetState.Request())
        while not future.done():
            harness._executor.spin_once(timeout_sec=0.005)
            assert time.perf_counter() - start_s < 5.0
        lags_s.append(time.perf_counter() - start_s)
    assert sorted(lags_s)[10] < 0.2, lags_s
