# SPDX-License-Identifier: Apache-2.0
"""The ``localizer`` executable."""

from __future__ import annotations

from kfloc_ros.nodes.entry import run


def main() -> int:
    """Run ``localizer``."""
    return run("localizer", "kfloc_ros.nodes.localizer_component", "LocalizerApplication")


if __name__ == "__main__":
    raise SystemExit(main())
