# SPDX-License-Identifier: Apache-2.0
"""``kfloc view``: localization in a map, live or recorded, in the Rerun viewer."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from kfloc_ros.cli.arguments import positive
from kfloc_ros.errors import ConfigError, SourceError

DESCRIPTION = """\
Show localization in 3-D and over time in the Rerun viewer (Python package rerun-sdk), for machines without RViz.

WHAT is a bag or any other SOURCE (KIND:PATH), which is localized and shown: map, camera, scene coordinates, overlay,
noise, flow, both trajectories and errors. Or WHAT is a result folder of `kfloc localize` or `kfloc replay`: map, both
trajectories, states, errors and latencies. --live shows the topics of running ROS 2 nodes. Without --save, a window
opens.
"""

EPILOG = """\
examples:
  kfloc view out/kitchen_bag --map maps/kitchen --frames 0:300
  kfloc view out/kitchen_live --save kitchen.rrd
  kfloc view --live --save now.rrd --duration 60
"""
VIEWER = "kfloc_ros.nodes.viewer"
"""Module that shows the topics of running nodes, in a process of its own."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``view`` subcommand."""
    parser = subparsers.add_parser(
        "view",
        help="show localization, live or recorded, in the Rerun viewer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", metavar="WHAT", help="a bag, a SOURCE, or a result folder")
    parser.add_argument("--map", metavar="DIR", help="map folder or name (default for a result folder: its map)")
    parser.add_argument(
        "--frames", metavar="RANGES", help="use only these frames of a bag or SOURCE, such as 0:150,200:350"
    )
    parser.add_argument(
        "--save", type=Path, metavar="FILE.rrd", help="write a recording to this file instead of opening a window"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    live = parser.add_argument_group("running nodes")
    live.add_argument("--live", action="store_true", help="show the topics of running nodes, until Ctrl-C")
    live.add_argument("--namespace", metavar="NS", help="namespace of the nodes, such as /robot")
    live.add_argument("--duration", type=positive, metavar="S", help="end after this many seconds")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc view``; return 0 when done, 1 if running nodes sent no message, 130 when interrupted."""
    _check(args)
    if args.live:
        return _run_live(args)
    folder = Path(args.what)
    return _run_results(args, folder) if (folder / "summary.json").is_file() else _run_source(args)


def _check(args: argparse.Namespace) -> None:
    if args.live == (args.what is not None):
        raise ConfigError("Give a bag, a SOURCE or a result folder to view, or --live for running nodes.")
    if args.live and args.map is not None:
        raise ConfigError("--live shows the map that the nodes publish; omit --map.")
    if args.save is not None and args.save.exists() and not args.force:
        raise ConfigError(f"'{args.save}' exists; replace it with --force or give another file.")


def _run_results(args: argparse.Namespace, folder: Path) -> int:
    from kfloc_ros.files import read_json
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.visualization.rerun_views import begin, view_results

    try:
        made_with = read_json(folder / "summary.json")["map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"'{folder / 'summary.json'}' is damaged: {error}") from error
    scene_map = SceneMap.load(resolve_map(args.map or str(made_with)))
    with begin(folder.name, scene_map, args.save) as recording:
        count = view_results(recording, folder)
    _say_done(args, count)
    return 0


def _run_source(args: argparse.Namespace) -> int:
    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.datasets import SOURCE_KINDS, open_source

    if args.map is None:
        raise ConfigError("Give the map to localize in with --map.")
    kind = args.what.partition(":")[0]
    source = open_source(args.what if kind in SOURCE_KINDS else f"bag:{args.what}", frames=args.frames, depth=False)

    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.localizer import Localizer
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.visualization.rerun_views import begin, view_source

    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device))
    count = 0
    with (
        begin(f"{source.name} in {scene_map.name}", scene_map, args.save) as recording,
        progress_bar(total=len(source), unit="frame", disable=args.quiet) as bar,
    ):
        for estimate in view_source(recording, scene_map, localizer, source):
            count += 1
            bar.set_postfix_str(estimate.state.value, refresh=False)
            bar.update()
    _say_done(args, count)
    return 0


def _run_live(args: argparse.Namespace) -> int:
    from kfloc_ros.replay.processes import check_ros, ros_environment, tied_command

    check_ros()
    # In a separate process: if ROS comes from wheels, its libraries must be known before Python starts.
    try:
        domain_id = int(os.environ.get("ROS_DOMAIN_ID", "0"))
    except ValueError:
        raise ConfigError(f"ROS_DOMAIN_ID must be a number, not '{os.environ['ROS_DOMAIN_ID']}'.") from None
    environment = ros_environment(domain_id)
    if "ROS_AUTOMATIC_DISCOVERY_RANGE" not in os.environ:
        del environment["ROS_AUTOMATIC_DISCOVERY_RANGE"]  # the nodes may be on another machine
    words = ["--save", str(args.save)] if args.save is not None else []
    words += ["--duration", str(args.duration)] if args.duration is not None else []
    if args.namespace:
        words += ["--ros-args", "-r", f"__ns:=/{args.namespace.strip('/')}"]
    with subprocess.Popen(tied_command(VIEWER, words), env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # it was interrupted as well, and closes the recording


def _say_done(args: argparse.Namespace, count: int) -> None:
    if not args.quiet:
        where = "the window" if args.save is None else f"{args.save}; open it with `rerun {args.save}`"
        print(f"{count} frames are in {where}.")
