# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end every executable within five seconds with exit code 0, whatever it is doing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ros

NewWorld = Callable[[], Any]
EXECUTABLES = ("localizer", "camera_node", "filter_node", "refiner_node")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def both(number: int) -> signal.Signals:
    return SIGNALS[number % 2]


def test_the_end_takes_little_computing(new_world: NewWorld, room_map: Path) -> None:
    """On a robot whose cores are busy, a second of it takes five, and launch sends the next signal."""
    node = new_world().start_localizer(f"map:={room_map}")
    pid, per_s = node.process.pid, os.sysconf("SC_CLK_TCK")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    start_s = (int(fields[11]) + int(fields[12])) / per_s
    node.process.send_signal(signal.SIGINT)
    _, status, usage = os.wait4(pid, 0)
    node.process.returncode = os.waitstatus_to_exitcode(status)
    assert node.process.returncode == 0, node.log
    assert usage.ru_utime + usage.ru_stime - start_s < 0.15 * start_s


def test_what_has_ended_is_gone_for_the_others(new_world: NewWorld, room_map: Path) -> None:
    """And not only after twenty seconds without a sign of life."""
    world = new_world()
    for name in EXECUTABLES:
        world.start(name, f"map:={room_map}")
    world.harness.wait(lambda: all("Ready: map" in node.log for node in world.nodes), 120.0)
    names = world.harness.node.get_node_names
    world.harness.wait(lambda: set(EXECUTABLES) <= set(names()))
    for node in world.nodes:
        node.end_well()
    world.harness.wait(lambda: not set(EXECUTABLES) & set(names()), 10.0)


@pytest.mark.slow
def test_without_a_map_all_four_end_well(new_world: NewWorld, tmp_path: Path) -> None:
    """Up, unconfigured, and a map that is not there asked for."""
    from lifecycle_msgs.srv import ChangeState

    world = new_world()
    for name in EXECUTABLES:
        world.start(name, f"map:={tmp_path}/nowhere", "autostart:=false")
    for number, name in enumerate(EXECUTABLES):
        request = ChangeState.Request()
        request.transition.id = 1
        assert not world.harness.call(ChangeState, f"/{name}/change_state", request).success
        assert "no map folder" in world.nodes[number].log
        world.nodes[number].end_well(both(number))


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, 1])
def test_under_load(new_world: NewWorld, room_map: Path, room: Any, turn: int) -> None:
    world = new_world()
    for name in ("filter_node", "refiner_node", "camera_node"):
        world.start(name, f"map:={room_map}")
    world.wait_ready()
    harness = world.harness
    harness.wait(lambda: harness.node.count_subscribers("coarse_status") > 0, 60.0)
    harness.wait(lambda: harness.node.count_subscribers("frame/image") > 1, 60.0)
    harness.spin(1.0)
    harness.localize(room[4])
    flood(harness, room)
    # The first in the chain last, so that the others are busy when they are asked to end.
    for number, node in enumerate(world.nodes):
        flood(harness, room)
        node.end_well(both(number + turn))
    world.nodes.clear()
    node = world.start_localizer(f"map:={room_map}")
    harness.localize(room[4])
    flood(harness, room)
    node.end_well(both(turn))


def flood(harness: Any, room: Any) -> None:
    for position in range(40):
        harness.send(room[position % 8])
        harness.spin(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, 1])
def test_idle(new_world: NewWorld, room_map: Path, turn: int) -> None:
    world = new_world()
    for name in EXECUTABLES:
        world.start(name, f"map:={room_map}")
    world.harness.wait(lambda: all("Ready: map" in node.log for node in world.nodes), 120.0)
    for number, node in enumerate(world.nodes):
        node.end_well(both(number + turn))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTABLES)
@pytest.mark.parametrize("delay_s", [0.5, 1.5, 2.5, 3.5])
def test_while_loading(new_world: NewWorld, room_map: Path, name: str, delay_s: float) -> None:
    world = new_world()
    node = world.start(name, f"map:={room_map}")
    time.sleep(delay_s)
    node.end_well(both(int(delay_s)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTABLES)
def test_a_missing_map_ends_it_by_itself_with_code_1(new_world: NewWorld, tmp_path: Path, name: str) -> None:
    node = new_world().start(name, f"map:={tmp_path}/nowhere")
    assert node.process.wait(120.0) == 1
    assert "[FATAL]" in node.log and "no map folder" in node.log and "Traceback" not in node.log
