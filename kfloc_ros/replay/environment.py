# SPDX-License-Identifier: Apache-2.0
"""The environment that nodes and agent are started in: a domain of their own, local discovery, large shared memory."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from kfloc_ros.errors import RosUnavailableError

MAX_DOMAIN_ID = 101
"""Larger ROS domain ids reach into the port range that Linux hands out to programs."""


def check_ros() -> None:
    """Raise RosUnavailableError where rclpy is not installed; importing it here could restart the interpreter."""
    if importlib.util.find_spec("rclpy") is None:
        raise RosUnavailableError(
            "Replaying needs ROS 2, and rclpy is not installed here. "
            "Run `make setup`, or source a ROS 2 installation (Jazzy or newer) and use its Python."
        )


def ros_environment(domain_id: int | None = None) -> dict[str, str]:
    """This process's environment, changed so that ROS children find each other and nobody else.

    What the user has set for Fast DDS and the discovery range is kept. ``domain_id`` None takes one
    that follows from this process's id.
    """
    environment = dict(os.environ)
    environment["ROS_DOMAIN_ID"] = str(1 + os.getpid() % MAX_DOMAIN_ID if domain_id is None else domain_id)
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not ({"FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"} & environment.keys()):
        profile = find_config("fastdds.xml")
        if profile is not None:
            environment["FASTDDS_DEFAULT_PROFILES_FILE"] = str(profile)
    libraries = Path(sys.prefix) / "lib"
    if (libraries / "librcl.so").exists():  # ROS as wheels: without this, importing rclpy restarts the interpreter
        known = environment.get("LD_LIBRARY_PATH", "")
        if str(libraries) not in known.split(os.pathsep):
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(libraries), known)))
    package_root = str(Path(__file__).resolve().parents[2])
    known = environment.get("PYTHONPATH", "")
    if package_root not in known.split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, known)))
    return environment


def find_config(name: str) -> Path | None:
    """A file of the package's ``config`` folder, in a ROS prefix, the environment or the source tree."""
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    folders = [prefix / "share" / "kfloc_ros" / "config" for prefix in (*prefixes, Path(sys.prefix))]
    for folder in (Path(__file__).resolve().parents[2] / "config", *folders):
        if (folder / name).is_file():
            return folder / name
    return None
