# SPDX-License-Identifier: Apache-2.0
"""Localize a camera in a map: one process with everything (the default), or three nodes.

    ros2 launch kfloc_ros localize.launch.py
    ros2 launch kfloc_ros localize.launch.py map:=maps/kitchen image_topic:=/camera/image_raw \
        camera_info_topic:=/camera/camera_info base_frame:=base_link

An argument left empty leaves the value of the parameter file alone; one that is given wins over it.
"""

from __future__ import annotations

import os
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
"""Comes with the package: a first launch with no argument has a map to localize in."""
YES_NO = ("true", "false")
FASTDDS_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


class Argument(NamedTuple):
    """A launch argument. ``parameter``: the type of the node parameter of that name, which it overrides when given.

    A named tuple: launch loads this file without entering it in sys.modules, which dataclasses need.
    """

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()
    parameter: type | None = None


ARGUMENTS = (
    Argument("map", "", "Map folder (see `kfloc map build`), or the name of a map shipped with the package; "
             "empty: as the parameter file says, and the demo room without one.", parameter=str),
    Argument("params_file", "", "Parameter file for all nodes; empty: config/localizer.yaml of the package."),
    Argument("namespace", "", "Namespace of the nodes and of their relative topics."),
    Argument("composed", "true", "true: everything in one process, frames handed over in memory; "
             "false: camera_node, filter_node and refiner_node as processes of their own.", YES_NO),
    Argument("autostart", "", "true: the nodes configure and activate themselves; false: a lifecycle manager does; "
             "empty: as the parameter file says.", ("", *YES_NO), bool),
    Argument("use_sim_time", "", "Take the time from /clock, as for a played bag; empty: as the parameter file says.",
             ("", *YES_NO), bool),
    Argument("image_topic", "", "Topic of the camera's images, without the /compressed ending; empty: image."),
    Argument("camera_info_topic", "", "Topic of the camera's calibration; empty: camera_info."),
    Argument("image_transport", "", "raw: sensor_msgs/Image on image_topic; compressed: CompressedImage on "
             "image_topic/compressed; empty: as the parameter file says.", ("", "raw", "compressed"), str),
    Argument("base_frame", "", "TF frame whose pose is published; empty: as the parameter file says.", parameter=str),
    Argument("map_frame", "", "TF frame of the map; empty: as the parameter file says.", parameter=str),
    Argument("odom_frame", "", "TF frame of the odometry; empty: as the parameter file says.", parameter=str),
    Argument("tf_mode", "", "map_to_odom: broadcast map -> odom (REP-105, beside odometry); map_to_base: map -> base; "
             "empty: as the parameter file says.", ("", "map_to_odom", "map_to_base", "none"), str),
    Argument("respawn", "false", "Start a node again when it has ended by itself.", YES_NO),
    Argument("log_level", "info", "Least severe messages that the nodes log.",
             ("debug", "info", "warn", "error", "fatal")),
    Argument("rviz", "false", "Start RViz, too.", YES_NO),
    Argument("rviz_config", "", "RViz configuration; empty: rviz/localize.rviz of the package."),
)  # fmt: skip


def generate_launch_description() -> LaunchDescription:
    """What `ros2 launch` runs."""
    declared = [
        DeclareLaunchArgument(item.name, default_value=item.default, description=item.description,
                              choices=list(item.choices) or None)
        for item in ARGUMENTS
    ]  # fmt: skip
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes for the arguments as given."""
    given = with_demo_map({item.name: context.launch_configurations[item.name] for item in ARGUMENTS})
    share = Path(get_package_share_directory(PACKAGE))
    actions: list[LaunchDescriptionEntity] = []
    if not any(name in context.environment for name in FASTDDS_VARIABLES):
        actions.append(SetEnvironmentVariable(FASTDDS_VARIABLES[0], str(share / "config" / "fastdds.xml")))

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


def with_demo_map(given: dict[str, str]) -> dict[str, str]:
    """The arguments, with the map that comes with the package where nobody named one or a parameter file."""
    return given if given["map"] or given["params_file"] else {**given, "map": DEMO_MAP}


def overrides(given: dict[str, str]) -> dict[str, ParameterValue]:
    """The parameters that were given as arguments."""
    values: dict[str, ParameterValue] = {}
    for item in ARGUMENTS:
        text = given[item.name]
        if item.parameter is not None and text:
            # With its type, or a map named "1" would become a number on its way to the node.
            value = text == "true" if item.parameter is bool else text
            values[item.name] = ParameterValue(value, value_type=item.parameter)
    return values


def remappings(given: dict[str, str]) -> list[tuple[str, str]]:
    """From the nodes' own topic names to those of the camera."""
    pairs: list[tuple[str, str]] = []
    if image := given["image_topic"]:
        plain = image.removesuffix("/compressed")
        pairs += [("image", plain), ("image/compressed", f"{plain}/compressed")]
    if given["camera_info_topic"]:
        pairs.append(("camera_info", given["camera_info_topic"]))
    return pairs


def rviz(given: dict[str, str], share: Path) -> Node:
    """RViz in the same namespace; the topics in its configuration are written with a slash and made relative here."""
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
