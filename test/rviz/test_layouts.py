# SPDX-License-Identifier: Apache-2.0
"""RViz and Foxglove are shown plug-ins that they have and topics that the nodes have, of the right types."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfloc_ros.nodes.topic_table import TOPICS

ROOT = Path(__file__).resolve().parents[2]
RVIZ = ROOT / "rviz" / "localize.rviz"
FOXGLOVE = ROOT / "rviz" / "localize.foxglove.json"

RVIZ_DISPLAYS = {
    "Axes": None,
    "Grid": None,
    "Image": "sensor_msgs/msg/Image",
    "MarkerArray": "visualization_msgs/msg/MarkerArray",
    "Path": "nav_msgs/msg/Path",
    "PointCloud2": "sensor_msgs/msg/PointCloud2",
    "Pose": "geometry_msgs/msg/PoseStamped",
    "PoseArray": "geometry_msgs/msg/PoseArray",
    "PoseWithCovariance": "geometry_msgs/msg/PoseWithCovarianceStamped",
    "TF": "tf2_msgs/msg/TFMessage",
}
"""Displays of rviz_default_plugins (its plugins_description.xml) and the message type each takes."""
RVIZ_TOOLS = {
    "FocusCamera", "Interact", "Measure", "MoveCamera", "PublishPoint", "Select", "SetGoal", "SetInitialPose",
}  # fmt: skip
RVIZ_VIEWS = {"FPS", "Orbit", "ThirdPersonFollower", "TopDownOrtho", "XYOrbit"}
RVIZ_PANELS = {"Displays", "Help", "Selection", "Time", "Tool Properties", "Views"}
TRANSFORMERS = {"RGB8", "Intensity", "AxisColor", "FlatColor"}
FOXGLOVE_PANELS = {"3D", "DiagnosticSummary", "Image", "Plot"}
FOXGLOVE_TYPES = {
    "geometry_msgs/msg/PoseWithCovarianceStamped", "nav_msgs/msg/Path", "sensor_msgs/msg/PointCloud2",
    "visualization_msgs/msg/MarkerArray",
}  # fmt: skip
"""What the 3D panel draws, of what is shown."""

INPUTS = {
    "/image": "sensor_msgs/msg/Image",
    "/initialpose": "geometry_msgs/msg/PoseWithCovarianceStamped",
}
PUBLISHED = {f"/{topic.name.lstrip('/')}": topic for topic in TOPICS}


@pytest.fixture(scope="module")
def manager() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RVIZ.read_text(encoding="utf-8"))
    assert {panel["Class"] for panel in loaded["Panels"]} <= {f"rviz_common/{name}" for name in RVIZ_PANELS}
    return loaded["Visualization Manager"]


def displays(manager: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for display in manager["Displays"]:
        package, _, name = display["Class"].partition("/")
        assert package == "rviz_default_plugins"
        yield name, display


def test_every_display_tool_and_view_is_one_that_rviz_has(manager: dict[str, Any]) -> None:
    assert {name for name, _ in displays(manager)} <= RVIZ_DISPLAYS.keys()
    tools = {tool["Class"].removeprefix("rviz_default_plugins/") for tool in manager["Tools"]}
    assert tools <= RVIZ_TOOLS
    assert manager["Views"]["Current"]["Class"].removeprefix("rviz_default_plugins/") in RVIZ_VIEWS
    names = [display["Name"] for _, display in displays(manager)]
    assert len(names) == len(set(names))
    colourings = {d["Color Transformer"] for name, d in displays(manager) if name == "PointCloud2"}
    assert colourings <= TRANSFORMERS


def test_every_display_gets_messages_of_its_type_from_the_nodes(manager: dict[str, Any]) -> None:
    for name, display in displays(manager):
        if "Topic" not in display:
            assert RVIZ_DISPLAYS[name] is None or name == "TF", display["Name"]
            continue
        topic = display["Topic"]["Value"]
        given = PUBLISHED[topic].type if topic in PUBLISHED else INPUTS[topic]
        assert given == RVIZ_DISPLAYS[name], topic


def test_what_is_latched_is_asked_for_so_and_nothing_else(manager: dict[str, Any]) -> None:
    """A display that asks for transient local hears nothing from a volatile publisher, and misses what came before."""
    for _, display in displays(manager):
        if "Topic" in display and display["Topic"]["Value"] in PUBLISHED:
            latched = PUBLISHED[display["Topic"]["Value"]].latched
            wanted = "Transient Local" if latched else "Volatile"
            assert display["Topic"]["Durability Policy"] == wanted, display["Name"]


def test_everything_worth_seeing_is_there(manager: dict[str, Any]) -> None:
    shown = {display["Topic"]["Value"] for _, display in displays(manager) if "Topic" in display}
    unseen = {"/tf", "/status", "/diagnostics", "/localization_state", "/odometry/map"}  # TF needs no topic
    assert PUBLISHED.keys() - shown == unseen
    assert "TF" in {name for name, _ in displays(manager)}
    covariance = [d for _, d in displays(manager) if d.get("Topic", {}).get("Value") == "/pose"]
    assert covariance[0]["Covariance"]["Value"] is True


LAUNCH_NAMES = {
    "ament_index_python.packages": ("get_package_share_directory",),
    "launch": ("LaunchContext", "LaunchDescription", "LaunchDescriptionEntity"),
    "launch.actions": ("DeclareLaunchArgument", "OpaqueFunction", "SetEnvironmentVariable"),
    "launch_ros.actions": ("Node",),
    "launch_ros.parameter_descriptions": ("ParameterValue",),
}


@pytest.fixture
def rviz_node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the launch file starts for rviz:=true: the arguments of its Node, also where there is no launch package."""
    for module, names in LAUNCH_NAMES.items():
        for part in (module.partition(".")[0], module):
            if part not in LAUNCH_NAMES or part == module:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        for name in names:
            setattr(sys.modules[module], name, type(name, (types.SimpleNamespace,), {}))
    spec = importlib.util.spec_from_file_location("launch_under_test", ROOT / "launch" / "localize.launch.py")
    assert spec is not None and spec.loader is not None
    module_under_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module_under_test)
    given = {"image_topic": "/camera/image_raw", "namespace": "robot", "rviz_config": "", "use_sim_time": "true"}
    return module_under_test.rviz(given, Path("share"))


def test_rviz_is_started_with_this_file_and_all_its_topics_in_the_nodes_namespace(
    manager: dict[str, Any], rviz_node: Any
) -> None:
    assert (rviz_node.package, rviz_node.executable, rviz_node.namespace) == ("rviz2", "rviz2", "robot")
    assert rviz_node.arguments == ["-d", str(Path("share") / "rviz" / RVIZ.name)]
    assert rviz_node.parameters == [{"use_sim_time": True}]
    remapped = dict(rviz_node.remappings)
    shown = {display["Topic"]["Value"] for _, display in displays(manager) if "Topic" in display}
    assert {topic: remapped[topic] for topic in shown - {"/image"}} == {
        topic: topic.lstrip("/") for topic in shown - {"/image"}
    }
    assert remapped["/image"] == "/camera/image_raw" and remapped["/initialpose"] == "initialpose"


@pytest.fixture(scope="module")
def layout() -> dict[str, Any]:
    return json.loads(FOXGLOVE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    else:
        assert tree["direction"] in ("row", "column") and 0 < tree["splitPercentage"] < 100
        yield from leaves(tree["first"])
        yield from leaves(tree["second"])


def test_every_panel_of_foxglove_is_placed_and_of_a_kind_that_it_has(layout: dict[str, Any]) -> None:
    assert sorted(leaves(layout["layout"])) == sorted(layout["configById"])
    assert {panel.partition("!")[0] for panel in layout["configById"]} <= FOXGLOVE_PANELS


def test_every_topic_of_foxglove_is_one_of_the_nodes(layout: dict[str, Any]) -> None:
    for panel, config in layout["configById"].items():
        kind = panel.partition("!")[0]
        if kind == "3D":
            assert all(PUBLISHED[topic].type in FOXGLOVE_TYPES for topic in config["topics"])
            assert config["publish"]["poseEstimateTopic"] in INPUTS
        elif kind == "Image":
            assert PUBLISHED[config["imageMode"]["imageTopic"]].type == "sensor_msgs/msg/Image"
        elif kind == "Plot":
            assert all(path["value"].partition(".")[0] in PUBLISHED for path in config["paths"])
        else:
            assert config["topicToRender"] in PUBLISHED


def test_both_are_installed() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'folder("rviz", "*.rviz", "*.json")' in text


def test_the_table_in_the_documentation_is_the_one_in_the_code() -> None:
    from kfloc_ros.nodes.topic_table import render_markdown

    assert render_markdown() in (ROOT / "docs" / "ros_interface.md").read_text(encoding="utf-8")
