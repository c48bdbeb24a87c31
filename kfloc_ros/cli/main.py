# SPDX-License-Identifier: Apache-2.0
"""Entry point of the ``kfloc`` command: runs a subcommand and converts errors into sentences and exit codes.

Exit codes: 0 done, 1 a check failed, 2 invalid input (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, ModuleType
from typing import NamedTuple, NoReturn

from kfloc_ros import __version__
from kfloc_ros.errors import KflocError


class Command(NamedTuple):
    """Subcommand: a module with ``add_parser(subparsers)`` and ``run(args) -> int``, and its help.

    A second subcommand of a module has its parser from ``add_NAME_parser(subparsers)``. Its parser, and those of
    actions, set ``run_action(args) -> int``, which is run instead of ``run``.
    """

    module: str
    help: str


COMMANDS = {
    "map": Command("kfloc_ros.cli.map", "build, describe and check maps"),
    "localize": Command("kfloc_ros.cli.localize", "localize the frames of a source in a map, without ROS"),
    "sources": Command("kfloc_ros.cli.sources", "list the kinds of SOURCE that commands read"),
    "download": Command("kfloc_ros.cli.download", "download public data sets and weights into their layout"),
    "check": Command("kfloc_ros.cli.sources", "find mistakes in a source's poses, calibration and depth by its images"),
    "record": Command("kfloc_ros.cli.bag", "record a running camera for a map, with help while walking"),
    "bag": Command("kfloc_ros.cli.bag", "write a source as a rosbag2, or list the content of one"),
    "replay": Command("kfloc_ros.cli.replay", "play a bag to the live ROS 2 nodes and evaluate their poses"),
    "compare": Command("kfloc_ros.cli.evaluate", "compare two result folders"),
    "evaluate": Command("kfloc_ros.cli.evaluate", "judge any trajectory file against its truth"),
    "convert": Command("kfloc_ros.cli.download", "convert published weights of KFNet and PixLoc"),
    "labels": Command("kfloc_ros.cli.coordinates", "write scene-coordinate labels in KFNet's format"),
    "kfnet": Command("kfloc_ros.cli.kfnet", "evaluate KFNet's networks on a folder in KFNet's format"),
    "coordinates": Command("kfloc_ros.cli.coordinates", "write scene-coordinate maps in KFNet's format"),
    "pnp": Command("kfloc_ros.cli.kfnet", "compute camera poses from scene-coordinate maps in KFNet's format"),
    "show": Command("kfloc_ros.cli.show", "draw intermediate results: pictures, videos, point clouds, an HTML page"),
    "train": Command("kfloc_ros.cli.train", "train KFNet's and PixLoc's networks"),
    "pixloc": Command("kfloc_ros.cli.pixloc", "run PixLoc on benchmark data sets or on one image"),
    "view": Command("kfloc_ros.cli.view", "show localization, live or recorded, in the Rerun viewer"),
    "bench": Command("kfloc_ros.cli.bench", "measure how fast this machine localizes"),
    "demo": Command("kfloc_ros.cli.demo", "run the whole pipeline on a rendered room"),
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


def run() -> NoReturn:
    """Run the command line and end the process with its exit code, without the interpreter's own end.

    That would free the libraries one by one: with torch up to a second of computing. Threads are waited for, and all
    that is registered with ``atexit`` is done, such as the removal of temporary folders.
    """
    codes: list[int] = []
    atexit.register(_end, codes)  # what is registered first is done last
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    codes.append(main())
    sys.exit(codes[0])


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, though not while a library is imported: some swallow it, and C++ aborts for it."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    again = threading.Timer(0.02, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _end(codes: Sequence[int]) -> None:
    """End the process with the exit code of its command; after an exception without one, do nothing."""
    if not codes:
        return
    gc.collect()  # frees what only cycles refer to, such as a video that is being written
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # main() has told it
            print(end="", file=stream, flush=True)
    os._exit(codes[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        print("Interrupted; nothing more was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (such as `head`) has exited: redirect stdout so that the exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if os.environ.get("KFLOC_DEBUG") or library in ("", "kfloc_ros"):
            raise
        note = " It has no wheel for Linux on ARM." if library == "pycolmap" else ""
        print(
            f"kfloc: the library '{library}' is not installed, which this needs: pip install {library}.{note}",
            file=sys.stderr,
        )
        return 2
    except (KflocError, OSError) as error:
        if os.environ.get("KFLOC_DEBUG"):
            raise
        print(f"kfloc: {describe(error)}", file=sys.stderr)
        return 2


def _run(arguments: Sequence[str]) -> int:
    selected = next((word for word in arguments if not word.startswith("-")), "")
    # Only the selected module is imported, so that `kfloc --help` does not load torch or rclpy.
    module = importlib.import_module(COMMANDS[selected].module) if selected in COMMANDS else None
    parser = build_parser(selected, module)
    try:
        args = parser.parse_args(arguments)
        if module is None:
            parser.print_help()
            return 2
        args.words = arguments
        return int((getattr(args, "run_action", None) or module.run)(args))
    except SystemExit as stop:  # argparse ends this way; its message is already printed
        return stop.code if isinstance(stop.code, int) else 0


def build_parser(selected: str = "", module: ModuleType | None = None) -> argparse.ArgumentParser:
    """Return the parser with all commands listed and the arguments of the command ``selected``."""
    parser = argparse.ArgumentParser(
        prog="kfloc",
        description="Camera relocalization: builds maps, localizes a camera in them, evaluates the results.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kfloc {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name == selected and module is not None:
            getattr(module, f"add_{name}_parser", module.add_parser)(subparsers)
        else:
            subparsers.add_parser(name, help=command.help, add_help=False)
    return parser


def describe(error: KflocError | OSError) -> str:
    """Return one sentence for the user."""
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        return f"The operating system refused an operation on{where or ' a file'}: {error.strerror}."
    return " ".join(str(error).split())
