# SPDX-License-Identifier: Apache-2.0
r"""Localization of a camera in a map: one process for everything (the default), or three nodes.

    ros2 launch kfloc_ros localize.launch.py
    ros2 launch kfloc_ros localize.launch.py map:=maps/kitchen image_topic:=/camera/image_raw \
        camera_info_topic:=/camera/camera_info base_frame:=base_link

An argument that is given overrides the parameter file; an empty one does not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from kfloc_ros.nodes.topic_table import TOPICS

PACKAGE = "kfloc_ros"
DEMO_MAP = "demo_room"
"""Map shipped with the package, for a first launch without arguments."""
YES_NO = ("true", "false")
DISCOVERY_VARIABLE = "ROS_AUTOMATIC_DISCOVERY_RANGE"
FASTDDS_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


class Argument(NamedTuple):
    """Launch argument. ``parameter``: type of the node parameter of the same name, which the argument overrides.

    It is a named tuple because launch loads this file without an entry in sys.modules, which dataclasses need.
    """

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()
    parameter: type | None = None


ARGUMENTS = (
    Argument("map", "", "Map folder (see `kfloc map build`), or the name of a shipped map; empty: map of the "
                        "parameter file, or the demo room without one.", parameter=str),
    Argument("params_file", "", "Parameter file for all nodes; empty: config/localizer.yaml of the package."),
    Argument("namespace", "", "Namespace of the nodes and of their relative topics."),
    Argument("composed", "true", "true: one process, frames passed in memory; false: camera_node, filter_node and "
                                 "refiner_node in separate processes.", YES_NO),
    Argument("autostart", "", "true: the nodes configure and activate themselves; false: a lifecycle manager does; "
                              "empty: as in the parameter file.", ("", *YES_NO), bool),
    Argument("use_sim_time", "", "Use the time of /clock, for a bag; empty: as in the parameter file.",
             ("", *YES_NO), bool),
    Argument("image_topic", "", "Topic of the camera's images, without the suffix /compressed; empty: image."),
    Argument("camera_info_topic", "", "Topic of the camera's calibration; empty: camera_info."),
    Argument("image_transport", "", "raw: sensor_msgs/Image on image_topic; compressed: CompressedImage on "
                                    "image_topic/compressed; empty: as in the parameter file.",
             ("", "raw", "compressed"), str),
    Argument("base_frame", "", "TF frame whose pose is published; empty: as in the parameter file.", parameter=str),
    Argument("map_frame", "", "TF frame of the map; empty: as in the parameter file.", parameter=str),
    Argument("odom_frame", "", "TF frame of the odometry; empty: as in the parameter file.", parameter=str),
    Argument("tf_mode", "", "map_to_odom: broadcast map -> odom (REP-105, with odometry); map_to_base: map -> base; "
                            "empty: as in the parameter file.", ("", "map_to_odom", "map_to_base", "none"), str),
    Argument("discovery", "", "local: nodes of this machine only; network: also those of the local network; empty: "
                              "as ROS_AUTOMATIC_DISCOVERY_RANGE says, and local without it.", ("", "local", "network")),
    Argument("respawn", "false", "Restart a node that has ended by itself.", YES_NO),
    Argument("log_level", "info", "Lowest severity of the nodes' log messages.",
             ("debug", "info", "warn", "error", "fatal")),
    Argument("rviz", "false", "Also start RViz.", YES_NO),
    Argument("rviz_config", "", "RViz configuration; empty: rviz/localize.rviz of the package."),
)  # fmt: skip


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    declared = [
        DeclareLaunchArgument(item.name, default_value=item.default, description=item.description,
                              choices=list(item.choices) or None)
        for item in ARGUMENTS
    ]  # fmt: skip
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Return the processes for the given arguments."""
    given = with_demo_map({item.name: context.launch_configurations[item.name] for item in ARGUMENTS})
    share = Path(get_package_share_directory(PACKAGE))
    actions: list[LaunchDescriptionEntity] = []
    if not any(name in context.environment for name in FASTDDS_VARIABLES):
        actions.append(SetEnvironmentVariable(FASTDDS_VARIABLES[0], str(share / "config" / "fastdds.xml")))

    if discovery := discovery_range(given["discovery"], context.environment):
        actions.append(SetEnvironmentVariable(DISCOVERY_VARIABLE, discovery))

    parameters = [given["params_file"] or str(share / "config" / "localizer.yaml"), overrides(given)]
    executables = ("localizer",) if given["composed"] == "true" else ("camera_node", "filter_node", "refiner_node")
    for executable in executables:
        actions.append(
            Node(
                package=PACKAGE,
                executable=executable,
                namespace=given["namespace"] or None,
                parameters=parameters,
                remappings=remappings(given),
                arguments=["--ros-args", "--log-level", given["log_level"]],
                respawn=given["respawn"] == "true",
                respawn_delay=2.0,
                output="both",
                emulate_tty=True,
            )
        )
    if given["rviz"] == "true":
        actions.append(rviz(given, share))
    return actions


def discovery_range(asked: str, environment: Mapping[str, str]) -> str:
    """Return the value of ``ROS_AUTOMATIC_DISCOVERY_RANGE`` to set; empty if the user's own remains."""
    if asked:
        return "LOCALHOST" if asked == "local" else "SUBNET"
    return "" if DISCOVERY_VARIABLE in environment or "ROS_LOCALHOST_ONLY" in environment else "LOCALHOST"


def with_demo_map(given: dict[str, str]) -> dict[str, str]:
    """Return the arguments, with the shipped map if neither a map nor a parameter file is given."""
    return given if given["map"] or given["params_file"] else {**given, "map": DEMO_MAP}


def overrides(given: dict[str, str]) -> dict[str, ParameterValue]:
    """Return the parameters that are given as arguments."""
    values: dict[str, ParameterValue] = {}
    for item in ARGUMENTS:
        text = given[item.name]
        if item.parameter is not None and text:
            # With its type: otherwise, a map named "1" would reach the node as a number.
            value = text == "true" if item.parameter is bool else text
            values[item.name] = ParameterValue(value, value_type=item.parameter)
    return values


def remappings(given: dict[str, str]) -> list[tuple[str, str]]:
    """Return the remappings from the nodes' topic names to the camera's."""
    pairs: list[tuple[str, str]] = []
    if image := given["image_topic"]:
        plain = image.removesuffix("/compressed")
        pairs += [("image", plain), ("image/compressed", f"{plain}/compressed")]
    if given["camera_info_topic"]:
        pairs.append(("camera_info", given["camera_info_topic"]))
    return pairs


def rviz(given: dict[str, str], share: Path) -> Node:
    """Return RViz in the same namespace; the topics in its configuration start with a slash and are made relative
    here.
    """
    image = given["image_topic"].removesuffix("/compressed") or "image"
    relative = [topic.name for topic in TOPICS if not topic.name.startswith("/")]
    return Node(
        package="rviz2",
        executable="rviz2",
        namespace=given["namespace"] or None,
        arguments=["-d", given["rviz_config"] or os.fspath(share / "rviz" / "localize.rviz")],
        parameters=[{"use_sim_time": given["use_sim_time"] == "true"}],
        remappings=[*((f"/{name}", name) for name in (*relative, "initialpose")),
                    ("/image", image), ("/image/compressed", f"{image}/compressed")],
        output="log",
    )  # fmt: skip
