# SPDX-License-Identifier: Apache-2.0
"""``kfloc convert``: weights of the original papers into files of this package, one module for each kind."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

CONVERTERS = ("kfloc_ros.cli.convert_kfnet", "kfloc_ros.cli.convert_pixloc")
"""Modules with ``add_parser(actions)`` that sets ``run_action``."""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc convert``."""
    parser = subparsers.add_parser("convert", help="convert published weights")
    actions = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for module in CONVERTERS:
        importlib.import_module(module).add_parser(actions)


def run(args: argparse.Namespace) -> int:
    """Run the conversion that was asked for."""
    return int(args.run_action(args))
