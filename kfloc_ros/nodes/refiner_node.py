# SPDX-License-Identifier: Apache-2.0
"""The ``refiner_node`` executable."""

from __future__ import annotations

from kfloc_ros.nodes.entry import run


def main() -> int:
    """Run ``refiner_node``."""
    return run("refiner_node", "kfloc_ros.nodes.refiner_component", "RefinerApplication")


if __name__ == "__main__":
    raise SystemExit(main())
