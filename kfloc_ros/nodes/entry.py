# SPDX-License-Identifier: Apache-2.0
"""Starts a node so that it can be interrupted at any time, also during the seconds that importing torch takes."""

from __future__ import annotations

import importlib
import os
import signal
from types import FrameType

MAX_COMPRESSED_PIXELS = 100_000_000
"""Of an image that comes compressed."""


def run(name: str, module: str, application: str) -> int:
    """Import what the node consists of and run it; returns its exit code.

    Args:
        name: of the node.
        module: that holds ``application``, what :func:`kfloc_ros.nodes.runtime.run_node` builds.
    """
    # Until the node has handlers of its own. Nothing is begun yet that would have to be ended, and an exception
    # raised in the middle of loading a library comes out as a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    # OpenCV reads it once, when it is loaded: a small file must not unpack into gigabytes.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_COMPRESSED_PIXELS))
    build = getattr(importlib.import_module(module), application)
    runtime = importlib.import_module("kfloc_ros.nodes.runtime")
    return int(runtime.run_node(name, build))


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)
