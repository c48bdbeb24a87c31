# SPDX-License-Identifier: Apache-2.0
"""The ``filter_node`` executable."""

from __future__ import annotations

from kfloc_ros.nodes.entry import run


def main() -> int:
    """Run ``filter_node``."""
    return run("filter_node", "kfloc_ros.nodes.filter_component", "FilterApplication")


if __name__ == "__main__":
    raise SystemExit(main())
