# SPDX-License-Identifier: Apache-2.0
"""``localize.launch.py`` as `ros2 launch` runs it: the node comes up with the demo room's map, and ends well."""

from __future__ import annotations

import time
import unittest
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("launch_testing", reason="needs the ROS 2 launch packages, which no wheel brings")
pytest.importorskip("launch_ros", reason="needs the ROS 2 launch packages, which no wheel brings")
pytest.importorskip("ament_index_python", reason="needs a ROS 2 installation")

import launch_testing.actions
import launch_testing.asserts
from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from launch import LaunchDescription
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

try:
    get_package_share_directory("kfloc_ros")
except PackageNotFoundError:
    pytest.skip("kfloc_ros is not in AMENT_PREFIX_PATH", allow_module_level=True)

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PATIENCE_S = 90.0


@pytest.mark.ros
@pytest.mark.slow
@pytest.mark.launch_test
def generate_test_description() -> LaunchDescription:
    """The launch file with nothing given."""
    localize = IncludeLaunchDescription(PythonLaunchDescriptionSource(str(LAUNCH / "localize.launch.py")))
    return LaunchDescription([localize, launch_testing.actions.ReadyToTest()])


class TestRunning(unittest.TestCase):
    """While it runs."""

    def test_it_is_active_and_names_its_map(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor

        context = rclpy.Context()
        rclpy.init(context=context)
        node = rclpy.create_node("launch_test", context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        heard: list[Any] = []
        node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: heard.extend(m.status), 10)
        try:
            until_s = time.monotonic() + PATIENCE_S
            while not heard and time.monotonic() < until_s:
                executor.spin_once(timeout_sec=0.1)
            assert heard, "the node said nothing on /diagnostics"
            values = {pair.key: pair.value for pair in heard[0].values}
            assert heard[0].name == "localizer: localization"
            assert values["working"] == "true" and values["map"]
        finally:
            executor.shutdown()
            node.destroy_node()
            context.try_shutdown()


@launch_testing.post_shutdown_test()
class TestEnd(unittest.TestCase):
    """After SIGINT."""

    def test_it_ended_well(self, proc_info: Any) -> None:
        launch_testing.asserts.assertExitCodes(proc_info)
