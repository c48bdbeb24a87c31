# SPDX-License-Identifier: Apache-2.0
"""``kfloc pixloc``: PixLoc's own runs over the benchmarks' data sets, and one's own picture in a map."""

from __future__ import annotations

import argparse
from typing import Any

from kfloc_ros.cli import pixloc_localize, pixloc_preprocess, pixloc_run
from kfloc_ros.cli.arguments import OverridesParser

ACTIONS = (pixloc_run, pixloc_localize, pixloc_preprocess)

DESCRIPTION = """\
PixLoc: poses by direct alignment of deep features. `run` does what the original's run_7Scenes, run_Cambridge,
run_Aachen, run_CMU and run_RobotCar did, `localize` answers for a single picture, `preprocess` makes training data.
"""


def add_parser(subparsers: Any) -> None:
    """Add the ``pixloc`` subcommand."""
    parser = subparsers.add_parser(
        "pixloc",
        help="run PixLoc on the benchmarks' data sets, or on one picture",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OverridesParser)
    for module in ACTIONS:
        module.add_parser(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action asked for."""
    code: int = args.run_action(args)
    return code
