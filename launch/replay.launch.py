# SPDX-License-Identifier: Apache-2.0
"""Replay: plays a bag to the live nodes, records their poses, and evaluates them against the bag's ground truth.

    ros2 launch kfloc_ros replay.launch.py bag:=out/kitchen_bag map:=maps/kitchen out:=out/kitchen_live

It runs `kfloc replay`, which starts the nodes itself, so that they are ready before the first frame.
"""

from __future__ import annotations

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction
from launch.events import Shutdown
from launch_ros.substitutions import ExecutableInPackage


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("bag", description="Folder of the rosbag2 to play (see `kfloc bag make`)."),
            DeclareLaunchArgument("map", description="Map folder, or the name of a map shipped with the package."),
            DeclareLaunchArgument(
                "out", description="Folder for the results: summary.json, report.html and other files."
            ),
            DeclareLaunchArgument("rate", default_value="1.0", description="Playback rate; 1.0 is real time."),
            DeclareLaunchArgument("start", default_value="0.0", description="Seconds of the bag to skip."),
            DeclareLaunchArgument("duration", default_value="", description="Seconds to play; empty: to the end."),
            DeclareLaunchArgument(
                "loop", default_value="1", description="Number of times to play it; the clock jumps back in between."
            ),
            DeclareLaunchArgument("image_topic", default_value="", description="Image topic, if the bag has several."),
            DeclareLaunchArgument(
                "camera_info_topic", default_value="", description="camera_info topic, if it is not beside the images."
            ),
            DeclareLaunchArgument(
                "base_frame",
                default_value="",
                description="Frame whose pose is published, such as base_link; the bag's TF is played and must "
                "connect it to the camera. Empty: the camera's frame, no TF.",
            ),
            DeclareLaunchArgument(
                "truth",
                default_value="",
                description="Ground truth of the camera in the map: /topic, tf:MAP:CAMERA or a TUM file; empty: the "
                "bag's PoseStamped topic, if it has exactly one.",
            ),
            DeclareLaunchArgument(
                "truth_of",
                default_value="",
                description="Frame of the ground truth, such as base_link, if it is not the camera's; the bag's "
                "/tf_static must connect it to the camera.",
            ),
            DeclareLaunchArgument(
                "require",
                default_value="",
                description="Required metrics of summary.json, separated by blanks, such as 'recall.5cm_5deg>=0.95 "
                "latency_ms.p95<=100'; if one is not met, the exit code is 1.",
            ),
            DeclareLaunchArgument(
                "composed",
                default_value="true",
                choices=["true", "false"],
                description="true: all nodes in one process; false: three processes.",
            ),
            DeclareLaunchArgument(
                "every_frame",
                default_value="false",
                choices=["true", "false"],
                description="true: wait for the result of each image before the next one, so that none is dropped.",
            ),
            OpaqueFunction(function=start),
        ]
    )


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Return the replay process; the launch ends with it."""
    given = context.launch_configurations
    command = [
        ExecutableInPackage("kfloc", "kfloc_ros"), "replay", given["bag"], "--map", given["map"],
        "--out", given["out"], "--rate", given["rate"], "--start", given["start"],
    ]  # fmt: skip
    if given["loop"] != "1":
        command += ["--loop", given["loop"]]
    for name in ("duration", "image_topic", "camera_info_topic", "base_frame", "truth", "truth_of"):
        if given[name]:
            command += [f"--{name.replace('_', '-')}", given[name]]
    for requirement in given["require"].split():
        command += ["--require", requirement]
    if given["composed"] == "false":
        command.append("--separate")
    if given["every_frame"] == "true":
        command.append("--every-frame")
    return [
        ExecuteProcess(
            cmd=command,
            name="replay",
            output="screen",
            emulate_tty=True,
            # On SIGINT it ends its own processes, which takes longer than launch waits by default.
            sigterm_timeout="20",
            on_exit=[EmitEvent(event=Shutdown(reason="the replay has ended"))],
        )
    ]
