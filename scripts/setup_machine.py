# SPDX-License-Identifier: Apache-2.0
"""Requirements on the machine, checked before anything is installed. Each error is one sentence with the remedy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setup_progress import SetupError

NEEDED_GB = {"cpu": 5.0, "cuda": 14.0}
OLDEST_CMAKE = (3, 21)
OLDEST_GLIBC = (2, 28)


def sourced_ros() -> str:
    """Return the name of the ROS 2 installation sourced in this shell; empty if there is none.

    It counts only if this interpreter can import its packages: a partly sourced shell is not an installation.
    """
    if not (os.environ.get("ROS_DISTRO") or os.environ.get("AMENT_PREFIX_PATH")):
        return ""
    probe = "import rclpy, tf2_msgs.msg, sensor_msgs.msg"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
    if done.returncode == 0:
        return os.environ.get("ROS_DISTRO") or "of AMENT_PREFIX_PATH"
    if os.environ.get("ROS_DISTRO"):
        raise SetupError(
            f"ROS 2 {os.environ['ROS_DISTRO']} is sourced, but {sys.executable} cannot import its rclpy and tf2_msgs; "
            "run set-up with the Python of that ROS installation (PYTHON=/usr/bin/python3 make setup), or in a shell "
            "that has not sourced it."
        )
    return ""


def check_python() -> None:
    """Check the Python version, and the modules for virtual environments."""
    if sys.implementation.name != "cpython" or not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise SetupError(
            f"{sys.executable} is {platform.python_implementation()} {platform.python_version()}; CPython 3.10 to 3.13 "
            "is needed (developed on 3.11): run set-up as PYTHON=python3.11 make setup."
        )
    missing = [name for name in ("ensurepip", "venv") if not _importable(name)]
    if missing:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments ({' and '.join(missing)} missing); "
            "on Debian: apt-get install python3-venv."
        )


def check_wheels_fit() -> None:
    """Check that ROS 2's wheels exist for this machine."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(
            f"ROS 2's Python wheels exist for x86-64 Linux only, and this is {platform.machine()} {platform.system()}; "
            "install ROS 2 itself (docs.ros.org), source it, and run set-up again: it will use that one."
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SetupError("ROS 2's wheels do not exist for the free-threaded Python; name an ordinary one with PYTHON=.")
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        raise SetupError(
            f"ROS 2's wheels need glibc {'.'.join(map(str, OLDEST_GLIBC))} or newer, and this system has {version}; "
            "install ROS 2 itself, source it, and run set-up again."
        )
    if name != "glibc":
        raise SetupError("ROS 2's wheels need a Linux with glibc (such as Debian); this one has another C library.")


def check_compiler() -> None:
    """Check for a C++ compiler, CMake, make and Python's headers, which build tf2_msgs."""
    packages = [package for command, package in (("make", "make"), ("cmake", "cmake")) if not shutil.which(command)]
    if not any(shutil.which(command) for command in (os.environ.get("CXX") or "c++", "g++")):
        packages.insert(0, "g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        packages.append("python3-dev")
    if packages:
        raise SetupError(
            "The tf2_msgs package is compiled here and needs a C++ compiler, CMake, make and Python's headers; "
            f"missing on this machine: apt-get install {' '.join(packages)}."
        )
    said = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    if found and (int(found[1]), int(found[2])) < OLDEST_CMAKE:
        raise SetupError(
            f"CMake {found[0]} is too old: {'.'.join(map(str, OLDEST_CMAKE))} or newer is needed; "
            "Debian 12's (apt-get install cmake) is, or `pip install cmake` into a folder on PATH."
        )


def check_disk(folder: Path, kind: str) -> None:
    """Check for disk space for the environment and for pip's unpacking."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB[kind]:
        raise SetupError(
            f"Only {free_gb:.1f} GB are free where {folder} lies; the environment needs about {NEEDED_GB[kind]:.0f} GB "
            "while it is being made. Free some and run set-up again: finished steps are kept."
        )
    if not os.access(folder, os.W_OK):
        raise SetupError(f"{folder} cannot be written to; set-up makes the folder .venv in it.")


def _importable(name: str) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False)
    return done.returncode == 0
