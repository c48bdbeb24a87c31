# SPDX-License-Identifier: Apache-2.0
"""``kfloc map``: build, describe and check maps."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import (
    BuildBars,
    StageBars,
    add_build_options,
    build_config_from,
    need_poses,
    provenance_of,
)
from kfloc_ros.cli.check import add_no_check, check_first
from kfloc_ros.cli.map_join import add_join, describe_place
from kfloc_ros.cli.map_kfnet import add_kfnet
from kfloc_ros.cli.map_tools import add_tools
from kfloc_ros.cli.tables import describe

BUILD_EXAMPLE = """\
examples:
  kfloc map build 7scenes:/data/redkitchen --split blocks50:train --out maps/kitchen
  kfloc map build walk.mp4?every=10 --sfm out/walk --sfm-length 0 12 1.50 --out maps/walk

Trains the map's scene-coordinate head, chooses reference views, calibrates on views held out, and writes the
folder in one go at the end: interrupting a build leaves nothing behind.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc map``."""
    parser = subparsers.add_parser(
        "map", help="build, update, merge, join, migrate, describe, check, draw, export, pack and crop maps"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="build a map from a source",
        epilog=BUILD_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(build)
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="the map folder to write")
    build.add_argument("--name", default="", help="name of the map (default: that of the folder)")
    build.add_argument("--force", action="store_true", help="replace an existing map")
    add_build_options(build)
    add_no_check(build)
    structure = build.add_argument_group("poses from the images alone")
    structure.add_argument(
        "--sfm",
        type=Path,
        metavar="DIR",
        help="find the poses by structure from motion, and keep its model and images in DIR (read again as colmap:DIR)",
    )
    structure.add_argument(
        "--sfm-length",
        nargs=3,
        metavar=("FRAME", "FRAME", "METRES"),
        help="the distance between the camera's places in two frames, counted from 0, for the scale (default: from "
        "the source's depth, or else its poses)",
    )
    build.set_defaults(run_action=run_build)
    info = actions.add_parser("info", help="describe a map, or a place and its submaps")
    info.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    info.set_defaults(run_action=run_info)
    verify = actions.add_parser(
        "verify", help="check a map's files, checksums and values, or those of a place and its submaps"
    )
    verify.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    verify.set_defaults(run_action=run_verify)
    add_join(actions)
    add_tools(actions)
    add_kfnet(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    return int(args.run_action(args))


def run_build(args: argparse.Namespace) -> int:
    """``kfloc map build``."""
    started = time.monotonic()

    from kfloc_ros.mapping.build import build_map, check_free
    from kfloc_ros.mapping.motion_depth import with_depth
    from kfloc_ros.mapping.structure import reconstruct
    from kfloc_ros.mapping.structure_scale import known_length

    config = build_config_from(args)
    frames = open_source_from(args, depth=not args.no_depth)
    if args.sfm is not None:
        check_free(args.out, overwrite=args.force)
        frames = reconstruct(frames, args.sfm, length=known_length(args.sfm_length), on_progress=StageBars())
    else:
        need_poses(frames)
        check_first(frames, skip=args.no_check)
    source = with_depth(frames, hide=args.no_depth, device=config.device)
    command = shlex.join(["kfloc", "map", "build", args.source, "--out", str(args.out)])
    scene_map = build_map(
        source,
        args.out,
        config,
        name=args.name,
        overwrite=args.force,
        provenance=provenance_of(args, source, command) | ({"poses": "from the images"} if args.sfm else {}),
        started=started,
        on_progress=BuildBars(),
    )
    print(describe(scene_map))
    return 0


def run_info(args: argparse.Namespace) -> int:
    """``kfloc map info``."""
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import Place, load_map

    loaded = load_map(resolve_map(args.map))
    print(describe_place(loaded) if isinstance(loaded, Place) else describe(loaded))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """``kfloc map verify``: exit code 1 if something is wrong."""
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import is_place, verify_place
    from kfloc_ros.maps.scene_map import verify_map

    folder = resolve_map(args.map)
    problems = verify_place(folder) if is_place(folder) else verify_map(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        what = "the index and all submaps agree, " if is_place(folder) else ""
        print(f"'{folder}' is whole: {what}checksums match and all values are finite.")
    return 1 if problems else 0
