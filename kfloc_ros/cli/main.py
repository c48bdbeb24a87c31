# SPDX-License-Identifier: Apache-2.0
"""The ``kfloc`` command: finds the subcommand, runs it, and turns errors into sentences and exit codes.

Exit codes: 0 done, 1 a check failed, 2 the input was at fault (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from kfloc_ros import __version__
from kfloc_ros.errors import KflocError


class Command(NamedTuple):
    """Where a subcommand lives: a module with ``add_parser(subparsers)`` and ``run(args) -> int``."""

    module: str
    help: str


COMMANDS = {
    "map": Command("kfloc_ros.cli.map", "build, describe and check maps"),
    "localize": Command("kfloc_ros.cli.localize", "localize the frames of a source in a map, without ROS"),
    "sources": Command("kfloc_ros.cli.sources", "list the kinds of SOURCE that commands read"),
    "check": Command("kfloc_ros.cli.check", "find mistakes in a source's poses, calibration and depth by its images"),
    "bag": Command("kfloc_ros.cli.bag", "write a source as a rosbag2, or list what one holds"),
    "replay": Command("kfloc_ros.cli.replay", "play a bag to the live ROS 2 nodes and evaluate what they answer"),
    "compare": Command("kfloc_ros.cli.compare", "two result folders side by side"),
    "convert": Command("kfloc_ros.cli.convert", "convert weights of the original papers"),
    "labels": Command("kfloc_ros.cli.labels", "write scene-coordinate labels in KFNet's format"),
    "coordinates": Command("kfloc_ros.cli.coordinates", "write scene-coordinate maps in KFNet's format"),
    "pnp": Command("kfloc_ros.cli.pnp", "camera poses of scene-coordinate maps in KFNet's format"),
    "show": Command("kfloc_ros.cli.show", "see what happens inside: pictures, videos, point clouds, a page"),
    "train": Command("kfloc_ros.cli.train", "train KFNet's networks"),
    "pixloc": Command("kfloc_ros.cli.pixloc", "run PixLoc on the benchmarks' data sets, or on one picture"),
    "view": Command("kfloc_ros.cli.view", "see localization in a map, live or recorded, in the Rerun viewer"),
    "demo": Command("kfloc_ros.cli.demo", "the whole path on a scene that the project renders itself"),
}

EXAMPLES = """\
a first session:
  kfloc map build 7scenes:DIR --split blocks50:train --out maps/kitchen
  kfloc map info maps/kitchen
  kfloc localize 7scenes:DIR --split blocks50:test --map maps/kitchen --out out/kitchen
  kfloc bag make 7scenes:DIR --split blocks50:test --out out/kitchen_bag
  kfloc replay out/kitchen_bag --map maps/kitchen --out out/kitchen_live

`kfloc COMMAND --help` explains one command. KFLOC_DEBUG=1 shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in arguments if not word.startswith("-")), "")
    try:
        # Only the module asked for is imported, so that `kfloc --help` does not wait for torch or rclpy.
        module = importlib.import_module(COMMANDS[asked].module) if asked in COMMANDS else None
        parser = build_parser(asked, module)
        args = parser.parse_args(arguments)
        if module is None:
            parser.print_help()
            return 2
        code = int(module.run(args))
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's way of ending; its message is out already
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("Interrupted; nothing more was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (such as `head`) is gone: point stdout elsewhere so that exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KflocError, OSError) as error:
        if os.environ.get("KFLOC_DEBUG"):
            raise
        print(f"kfloc: {describe(error)}", file=sys.stderr)
        return 2


def build_parser(asked: str = "", module: ModuleType | None = None) -> argparse.ArgumentParser:
    """The parser, with every command listed and the command asked for filled in."""
    parser = argparse.ArgumentParser(
        prog="kfloc",
        description="Where is this camera in a place that was mapped before? Builds maps, localizes, evaluates.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kfloc {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name == asked and module is not None:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def describe(error: KflocError | OSError) -> str:
    """One sentence for the user."""
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        return f"The system refused a file operation on{where or ' a file'}: {error.strerror}."
    return " ".join(str(error).split())
