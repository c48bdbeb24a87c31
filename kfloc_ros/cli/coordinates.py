# SPDX-License-Identifier: Apache-2.0
"""``kfloc coordinates``: what the filter believes about every frame, in KFNet's file formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from

DESCRIPTION = """\
Write the scene coordinates of every frame of SOURCE as KFNet does: OUT/coord_<i>.npy, h x w x 4 float32 with map
metres and 1/sigma (the inverse standard deviation), i counting from 0; with --flow also <a>_<b>_flow.npy, h x w x 3,
from each frame to the one before. coordinates.json says which frame each is, and which pixel a cell stands for.
`kfloc pnp OUT` turns them into poses; with --gt-out their true poses are written as its --gt takes them.
"""

EPILOG = """\
example:
  kfloc coordinates 7scenes:DIR --split blocks50:test --map maps/kitchen --out out/coordinates
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc coordinates``."""
    parser = subparsers.add_parser(
        "coordinates",
        help="write scene-coordinate maps in KFNet's format",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="DIR", help="map folder, or the name of a shipped map")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument("--no-filter", action="store_true", help="each frame's measurement alone")
    parser.add_argument("--flow", action="store_true", help="also the flow between frames")
    parser.add_argument("--gt-out", type=Path, metavar="DIR", help="write the true poses and gt_list.txt here")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run")


def run(args: argparse.Namespace) -> int:
    """Write the maps."""
    source = open_source_from(args, depth=False)

    from tqdm import tqdm

    from kfloc_ros.kfnet.export import export_coordinates
    from kfloc_ros.localizer_config import LocalizerConfig
    from kfloc_ros.mapping.map_folders import resolve_map
    from kfloc_ros.mapping.scene_map import SceneMap

    scene_map = SceneMap.load(resolve_map(args.map))
    config = LocalizerConfig(device=args.device, filter=not args.no_filter)
    written = export_coordinates(source, scene_map, config, args.out, flow=args.flow, truth=args.gt_out)
    count = sum(1 for _ in tqdm(written, total=len(source), unit="frame", disable=not sys.stderr.isatty()))
    print(f"{args.out}: {count} coordinate maps")
    return 0
