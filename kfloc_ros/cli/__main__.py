# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``python -m kfloc_ros.cli``: the ``kfloc`` command where it is not installed."""

from __future__ import annotations

from kfloc_ros.cli.main import run

run()
