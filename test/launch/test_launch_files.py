# SPDX-License-Identifier: Apache-2.0
"""The launch files, read by the real launch package: arguments, parameters, topics, environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("launch_ros", reason="needs the ROS 2 launch packages, which no wheel brings")
pytest.importorskip("ament_index_python", reason="needs a ROS 2 installation")

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from launch import LaunchContext
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, SetEnvironmentVariable
from launch.launch_description_sources import get_launch_description_from_python_launch_file as load
from launch_ros.actions import Node

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = ("localize.launch.py", "replay.launch.py")

pytestmark = pytest.mark.ros


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        get_package_share_directory("kfloc_ros")
    except PackageNotFoundError:
        pytest.skip("kfloc_ros is not in AMENT_PREFIX_PATH")


def entities(file: str, **given: str) -> tuple[LaunchContext, list[Any]]:
    """What the file starts for these arguments."""
    description = load(str(LAUNCH / file))
    context = LaunchContext()
    context.environment.pop("FASTDDS_DEFAULT_PROFILES_FILE", None)
    context.launch_configurations.update(given)
    result: list[Any] = []
    for entity in description.entities:
        if isinstance(entity, DeclareLaunchArgument):
            entity.execute(context)
        elif isinstance(entity, OpaqueFunction):
            result += entity.execute(context) or []
    return context, result


def command_of(context: LaunchContext, node: Node) -> list[str]:
    """The words that a node is started with, found as launch does it."""
    node._perform_substitutions(context)
    return ["".join(part.perform(context) for part in word) for word in node.cmd]


@pytest.mark.parametrize("file", FILES)
def test_every_argument_is_explained(file: str) -> None:
    arguments = load(str(LAUNCH / file)).get_launch_arguments()
    assert arguments
    for argument in arguments:
        assert argument.description not in ("", "no description given"), argument.name


def test_one_process_unless_asked_for_three() -> None:
    def executables(composed: str) -> list[str]:
        _, actions = entities("localize.launch.py", composed=composed)
        return [action.node_executable for action in actions if isinstance(action, Node)]

    assert executables("true") == ["localizer"]
    assert executables("false") == ["camera_node", "filter_node", "refiner_node"]


def test_empty_arguments_leave_the_parameter_file_alone() -> None:
    module = python_of("localize.launch.py")
    given = {item.name: item.default for item in module.ARGUMENTS}
    assert module.overrides(given) == {}
    changed = module.overrides({**given, "map": "1", "use_sim_time": "true", "tf_mode": "none"})
    context = LaunchContext()
    assert {name: value.evaluate(context) for name, value in changed.items()} == {
        "map": "1", "use_sim_time": True, "tf_mode": "none",
    }  # fmt: skip


def test_camera_topics_are_remapped_for_both_transports() -> None:
    context, actions = entities(
        "localize.launch.py", image_topic="/camera/image_raw/compressed", camera_info_topic="/camera/info"
    )
    words = command_of(context, next(a for a in actions if isinstance(a, Node)))
    assert "image:=/camera/image_raw" in words
    assert "image/compressed:=/camera/image_raw/compressed" in words
    assert "camera_info:=/camera/info" in words


def test_dds_profile_is_set_unless_the_user_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, actions = entities("localize.launch.py")
    assert any(isinstance(action, SetEnvironmentVariable) for action in actions)
    description = load(str(LAUNCH / "localize.launch.py"))
    context = LaunchContext()
    # The context's environment is that of this process, which the next test's nodes inherit.
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", "mine.xml")
    for entity in description.entities:
        actions = entity.execute(context) or []
    assert not any(isinstance(action, SetEnvironmentVariable) for action in actions)


def test_discovery_stays_on_this_machine_unless_the_user_says_otherwise() -> None:
    module = python_of("localize.launch.py")
    assert module.discovery_range("", {}) == "LOCALHOST"
    assert module.discovery_range("", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET"}) == ""
    assert module.discovery_range("", {"ROS_LOCALHOST_ONLY": "0"}) == ""
    assert module.discovery_range("network", {"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}) == "SUBNET"
    assert module.discovery_range("local", {}) == "LOCALHOST"


def test_replay_passes_its_arguments_on() -> None:
    context, actions = entities(
        "replay.launch.py", bag="b", map="m", out="o", composed="false", truth="/pose", require="frames>=1 dropped<=2",
        loop="2", truth_of="base_link", every_frame="true",
    )  # fmt: skip
    process = next(action for action in actions if isinstance(action, ExecuteProcess))
    words = ["".join(part.perform(context) for part in word) for word in process.cmd]
    assert Path(words[0]).name == "kfloc"
    assert words[1:] == [
        "replay", "b", "--map", "m", "--out", "o", "--rate", "1.0", "--start", "0.0", "--loop", "2", "--truth", "/pose",
        "--truth-of", "base_link", "--require", "frames>=1", "--require", "dropped<=2", "--separate", "--every-frame",
    ]  # fmt: skip


def python_of(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("kfloc_launch_under_test", LAUNCH / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_any_argument_there_is_the_demo_room() -> None:
    module = python_of("localize.launch.py")
    assert (LAUNCH.parent / "maps" / module.DEMO_MAP / "map.yaml").is_file()
    given = {item.name: item.default for item in module.ARGUMENTS}
    assert module.with_demo_map(given)["map"] == module.DEMO_MAP
    assert module.with_demo_map({**given, "map": "kitchen"})["map"] == "kitchen"
    assert module.with_demo_map({**given, "params_file": "mine.yaml"})["map"] == ""
