# SPDX-License-Identifier: Apache-2.0
"""Executables: ``camera_node``, ``filter_node``, ``refiner_node`` and ``localizer``.

``python -m kfloc_ros.nodes.executables NAME --ros-args ...`` starts one where the package is not installed.
A node can be interrupted at any time, including the seconds in which torch is imported.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

STAGES = {
    "camera_node": ("kfloc_ros.nodes.camera", "CameraStage"),
    "filter_node": ("kfloc_ros.nodes.halves", "FilterStage"),
    "refiner_node": ("kfloc_ros.nodes.halves", "RefinerStage"),
    "localizer": ("kfloc_ros.nodes.localizer_stage", "localizer_stage"),
}
"""Module of the stage of each node, and what makes it."""

MAX_COMPRESSED_PIXELS = 100_000_000
"""Limit on the size of a compressed image, in pixels."""


def camera_node() -> NoReturn:
    """Run ``camera_node``."""
    run("camera_node")


def filter_node() -> NoReturn:
    """Run ``filter_node``."""
    run("filter_node")


def refiner_node() -> NoReturn:
    """Run ``refiner_node``."""
    run("refiner_node")


def localizer() -> NoReturn:
    """Run ``localizer``, which hosts all three stages."""
    run("localizer")


def run(name: str) -> NoReturn:
    """Import and run the node ``name``, and end the process with its exit code."""
    # Until the node installs its own handlers. Nothing is open yet that must be closed, and an exception raised while
    # a library is being loaded would appear as a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    # OpenCV reads this once, when it is loaded: a small file must not decompress to gigabytes.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_COMPRESSED_PIXELS))
    module, stage = STAGES[name]
    build = getattr(importlib.import_module(module), stage)
    runtime = importlib.import_module("kfloc_ros.nodes.runtime")
    code = int(runtime.run_node(name, build))
    gc.collect()  # the node's handles refer to each other in cycles, and its participant leaves with the last one
    # All is closed. The interpreter would now free the libraries one by one: a second of computing, which on a busy
    # robot takes longer than `ros2 launch` waits before it sends SIGTERM.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Run the node named by the first argument."""
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        print(f"Give the name of a node to run: {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    run(sys.argv.pop(1))


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
