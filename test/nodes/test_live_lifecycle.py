# SPDX-License-Identifier: Apache-2.0
"""Lifecycle, services, and parameters that make a new stage, over real DDS."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ros

NewWorld = Callable[[], Any]


@pytest.fixture(scope="module")
def world(new_world: NewWorld, room_map: Path) -> Any:
    """A localizer that waits to be configured."""
    world = new_world()
    world.start("localizer", f"map:={room_map}", "autostart:=false")
    return world


def change_state(harness: Any, label: str, node: str = "localizer") -> bool:
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState

    ids = {"configure": 1, "cleanup": 2, "activate": 3, "deactivate": 4}
    request = ChangeState.Request(transition=Transition(id=ids[label], label=label))
    return bool(harness.call(ChangeState, f"/{node}/change_state", request).success)


def state(harness: Any) -> str:
    from lifecycle_msgs.srv import GetState

    return str(harness.call(GetState, "/localizer/get_state", GetState.Request()).current_state.label)


def trigger(harness: Any, name: str) -> Any:
    from std_srvs.srv import Trigger

    return harness.call(Trigger, f"/localizer/{name}", Trigger.Request())


def is_silent(harness: Any, frame: Any) -> bool:
    """Whether a good frame is answered with nothing."""
    stamp_ns = harness.send(frame)
    harness.spin(0.6)
    return stamp_ns not in harness.statuses and stamp_ns not in harness.poses


def test_a_node_goes_up_and_down_and_up_again(world: Any, room: Any) -> None:
    harness = world.harness
    assert state(harness) == "unconfigured"
    assert not trigger(harness, "relocalize").success
    assert not harness.listens()
    for _ in range(2):
        assert change_state(harness, "configure") and state(harness) == "inactive"
        harness.wait(harness.listens)
        assert is_silent(harness, room[4])
        assert change_state(harness, "activate")
        harness.localize(room[4])
        assert change_state(harness, "deactivate") and is_silent(harness, room[4])
        assert change_state(harness, "activate")
        harness.localize(room[5])
        assert change_state(harness, "deactivate") and change_state(harness, "cleanup")
        harness.wait(lambda: not harness.listens())
    assert change_state(harness, "configure") and change_state(harness, "activate")
    harness.wait(harness.listens)
    harness.spin(0.5)


def test_work_can_be_switched_off_and_on(world: Any, room: Any) -> None:
    from std_srvs.srv import SetBool

    harness = world.harness
    assert harness.call(SetBool, "/localizer/enable", SetBool.Request(data=False)).success
    assert is_silent(harness, room[4])
    harness.diagnostics.clear()
    harness.wait(lambda: "localizer: localization" in harness.diagnostics)
    assert "switched off" in harness.diagnostics["localizer: localization"].message
    assert harness.call(SetBool, "/localizer/enable", SetBool.Request(data=True)).success
    harness.localize(room[4])
    harness.diagnostics.clear()
    harness.wait(lambda: "localizer: localization" in harness.diagnostics)
    assert harness.diagnostics["localizer: localization"].message, "never empty"


def test_relocalize_and_reset_start_anew(world: Any, room: Any) -> None:
    harness = world.harness
    for service, reason in (("relocalize", "asked to relocalize"), ("reset", "asked to reset")):
        harness.localize(room[4])
        assert trigger(harness, service).success
        stamp = harness.localize(room[5]).header.stamp
        assert harness.statuses[stamp.sec * 10**9 + stamp.nanosec]["filter_reset"] == reason


def documented(heading: str) -> dict[str, str]:
    """First and second column of the table under a heading of the interface's documentation."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "ros_interface.md").read_text()
    section = re.split(r"^#+ ", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", section, flags=re.MULTILINE))


def test_what_it_listens_to_and_offers_is_what_is_documented(world: Any) -> None:
    node = world.harness.node
    world.harness.wait(world.harness.listens)
    heard = dict(node.get_subscriber_names_and_types_by_node("localizer", "/"))
    of_rclpy = {"/parameter_events", "/clock"}
    inputs = documented("### In")
    assert inputs.pop("image/compressed"), "with another image_transport"
    assert inputs.pop("depth"), "with use_depth"
    expected = {f"/{name.lstrip('/')}": kind.replace("/", "/msg/") for name, kind in inputs.items()}
    assert {name: kinds[0] for name, kinds in heard.items() if name not in of_rclpy} == expected
    services = dict(node.get_service_names_and_types_by_node("localizer", "/"))
    ours = {name: kinds[0] for name, kinds in services.items() if kinds[0].startswith("std_srvs/")}
    listed = documented("## Services")
    expected = {
        name.replace("~", "/localizer") if name[0] == "~" else f"/{name}": kind for name, kind in listed.items()
    }
    assert ours == {name: kind.replace("/", "/srv/") for name, kind in expected.items()}


def test_the_map_changes_through_a_parameter_and_a_bad_one_is_refused(
    world: Any, room: Any, room_map: Path, tmp_path: Path
) -> None:
    harness = world.harness
    other = tmp_path / "other"
    shutil.copytree(room_map, other)
    description = (other / "map.yaml").read_text()
    (other / "map.yaml").write_text(description.replace("name: room", "name: other"))
    refused = harness.set_parameter("/localizer", "map", str(tmp_path / "nothing"))
    assert not refused.successful and "no map folder" in refused.reason
    stamp = harness.localize(room[4]).header.stamp
    assert harness.statuses[stamp.sec * 10**9 + stamp.nanosec]["map"] == "room", "the old one goes on"
    assert harness.set_parameter("/localizer", "map", str(other)).successful
    assert harness.set_parameter("/localizer", "num_references", 2).successful
    deadline = time.monotonic() + 30.0
    values = {"map": ""}
    while values["map"] != "other" or len(values["alignment_references"].split()) != 2:
        assert time.monotonic() < deadline, values
        harness.wait(harness.listens)
        harness.spin(0.3)
        stamp = harness.localize(room[4]).header.stamp
        values = harness.statuses[stamp.sec * 10**9 + stamp.nanosec]
    assert state(harness) == "active", "without leaving its lifecycle state"
    assert {"input_hz", "latency_p50_ms", "latency_p95_ms", "nis", "inliers", "alignment_final_cost"} <= values.keys()


def test_it_ends_well(world: Any) -> None:
    import signal

    world.nodes[0].end_well(signal.SIGTERM)


@pytest.mark.parametrize("delay_s", [0.0, 0.4, 1.2])
def test_a_node_may_be_interrupted_while_it_still_loads_its_libraries(
    new_world: NewWorld, room_map: Path, delay_s: float
) -> None:
    import signal

    world = new_world()
    node = world.start("localizer", f"map:={room_map}")
    status = Path(f"/proc/{node.process.pid}/status")
    while not int(next(x for x in status.read_text().splitlines() if x.startswith("SigCgt")).split()[1], 16) >> 14 & 1:
        time.sleep(0.005)  # Python itself is still starting
    time.sleep(delay_s)
    assert node.end(signal.SIGINT, 10.0) == 0, node.log
    assert "Traceback" not in node.log


@pytest.mark.slow
def test_the_three_nodes_go_up_and_down_too(new_world: NewWorld, room_map: Path, room: Any) -> None:
    world = new_world()
    names = ("filter_node", "refiner_node", "camera_node")
    for name in names:
        world.start(name, f"map:={room_map}", "autostart:=false")
    harness = world.harness
    for _ in range(2):
        for label in ("configure", "activate"):
            assert all(change_state(harness, label, name) for name in names)
        harness.wait(harness.listens)
        harness.wait(lambda: harness.node.count_subscribers("coarse_status") > 0)
        harness.wait(lambda: harness.node.count_subscribers("frame/image") > 1)
        harness.spin(0.5)
        harness.localize(room[4])
        for label in ("deactivate", "cleanup"):
            assert all(change_state(harness, label, name) for name in names)
        harness.wait(lambda: not harness.listens())
    for node in world.nodes:
        assert node.end() == 0 and "Traceback" not in node.log, node.log
