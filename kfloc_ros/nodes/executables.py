# SPDX-License-Identifier: Apache-2.0
"""The executables: ``camera_node``, ``filter_node``, ``refiner_node`` and ``localizer``.

``python -m kfloc_ros.nodes.executables NAME --ros-args ...`` starts one where the package is not installed.
A node can be interrupted at any time, also during the seconds that importing torch takes.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType

APPLICATIONS = {
    "camera_node": ("kfloc_ros.nodes.camera", "CameraApplication"),
    "filter_node": ("kfloc_ros.nodes.filter", "FilterApplication"),
    "refiner_node": ("kfloc_ros.nodes.refiner", "RefinerApplication"),
    "localizer": ("kfloc_ros.nodes.localizer_app", "LocalizerApplication"),
}
"""Module and class of what each node hosts."""

MAX_COMPRESSED_PIXELS = 100_000_000
"""Of an image that comes compressed."""


def camera_node() -> int:
    """Run ``camera_node``; return its exit code."""
    return run("camera_node")


def filter_node() -> int:
    """Run ``filter_node``; return its exit code."""
    return run("filter_node")


def refiner_node() -> int:
    """Run ``refiner_node``; return its exit code."""
    return run("refiner_node")


def localizer() -> int:
    """Run ``localizer``, which hosts all three; return its exit code."""
    return run("localizer")


def run(name: str) -> int:
    """Import what a node consists of and run it; return its exit code."""
    # Until the node has handlers of its own. Nothing is begun yet that would have to be ended, and an exception
    # raised in the middle of loading a library comes out as a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    # OpenCV reads it once, when it is loaded: a small file must not unpack into gigabytes.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_COMPRESSED_PIXELS))
    module, application = APPLICATIONS[name]
    build = getattr(importlib.import_module(module), application)
    runtime = importlib.import_module("kfloc_ros.nodes.runtime")
    return int(runtime.run_node(name, build))


def main() -> int:
    """Run the node named by the first argument."""
    if len(sys.argv) < 2 or sys.argv[1] not in APPLICATIONS:
        print(f"Name a node to run: {', '.join(APPLICATIONS)}.", file=sys.stderr)
        return 2
    return run(sys.argv.pop(1))


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
