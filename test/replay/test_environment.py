# SPDX-License-Identifier: Apache-2.0
"""The environment of a replay's processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import kfloc_ros.replay
from kfloc_ros.errors import RosUnavailableError
from kfloc_ros.replay import processes as env


def test_a_domain_of_its_own_and_local_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    values = env.ros_environment()
    assert 1 <= int(values["ROS_DOMAIN_ID"]) <= env.MAX_DOMAIN_ID
    assert values["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    assert env.ros_environment(7)["ROS_DOMAIN_ID"] == "7"
    assert os.environ["ROS_DOMAIN_ID"] == "42"


def test_what_the_user_set_for_fast_dds_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRTPS_DEFAULT_PROFILES_FILE", raising=False)
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "mine.xml")
    assert env.ros_environment()["FASTDDS_DEFAULT_PROFILES_FILE"] == "mine.xml"
    monkeypatch.delenv("FASTDDS_DEFAULT_PROFILES_FILE")
    assert env.ros_environment()["FASTDDS_DEFAULT_PROFILES_FILE"].endswith("config/fastdds.xml")


def test_without_rclpy_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RosUnavailableError, match="make setup"):
        env.check_ros()


@pytest.mark.thorough
def test_preparing_a_replay_does_not_import_rclpy() -> None:
    code = "import sys, kfloc_ros.replay, kfloc_ros.cli.replay; sys.exit('rclpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", kfloc_ros.replay.__all__)
def test_names_that_are_imported_late_exist(name: str) -> None:
    assert callable(getattr(kfloc_ros.replay, name))
