# SPDX-License-Identifier: Apache-2.0
"""The ``camera_node`` executable."""

from __future__ import annotations

from kfloc_ros.nodes.entry import run


def main() -> int:
    """Run ``camera_node``."""
    return run("camera_node", "kfloc_ros.nodes.camera_component", "CameraApplication")


if __name__ == "__main__":
    raise SystemExit(main())
