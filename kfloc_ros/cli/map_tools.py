# SPDX-License-Identifier: Apache-2.0
"""``kfloc map export|view|pack|unpack|crop``: what can be done with a map that is there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MAP_HELP = "map folder, or name of an installed map"


def add_tools(actions: Any) -> None:
    """Register the actions below ``kfloc map``."""
    export = actions.add_parser("export", help="write a map for other programs: a COLMAP model or a PLY point cloud")
    export.add_argument("map", metavar="MAP", help=MAP_HELP)
    export.add_argument("--to", choices=("colmap", "ply"), required=True, help="format")
    export.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder (colmap) or file (ply) to write"
    )
    export.set_defaults(run_action=run_export)

    view = actions.add_parser(
        "view", help="draw a map from above: points, reference views, extent; or where it will localize"
    )
    view.add_argument("map", metavar="MAP", help=MAP_HELP)
    view.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    view.add_argument(
        "--accuracy", action="store_true", help="draw where it will localize, and how well: a forecast over the floor"
    )
    view.set_defaults(run_action=run_view)

    pack = actions.add_parser("pack", help="put a map into one file")
    pack.add_argument("map", metavar="MAP", help=MAP_HELP)
    pack.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as kitchen.kfmap")
    pack.add_argument("--force", action="store_true", help="replace an existing file")
    pack.set_defaults(run_action=run_pack)

    unpack = actions.add_parser("unpack", help="take a map out of such a file, checked")
    unpack.add_argument("file", type=Path, metavar="FILE", help="a packed map")
    unpack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the map folder to create")
    unpack.set_defaults(run_action=run_unpack)

    crop = actions.add_parser("crop", help="keep the part of a map inside a box")
    crop.add_argument("map", metavar="MAP", help=MAP_HELP)
    crop.add_argument("--out", type=Path, required=True, metavar="DIR", help="the map folder to write")
    crop.add_argument(
        "--box",
        type=float,
        nargs=6,
        required=True,
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="smallest and largest corner in metres, map frame (`kfloc map view` shows them)",
    )
    crop.add_argument("--force", action="store_true", help="replace an existing map")
    crop.set_defaults(run_action=run_crop)


def run_export(args: argparse.Namespace) -> int:
    """``kfloc map export``."""
    from kfloc_ros.mapping.export import export_colmap, export_ply
    from kfloc_ros.mapping.scene_map import SceneMap, resolve_map

    scene_map = SceneMap.load(resolve_map(args.map))
    write = export_colmap if args.to == "colmap" else export_ply
    print(f"Written to '{write(scene_map, args.out)}'.")
    return 0


def run_view(args: argparse.Namespace) -> int:
    """``kfloc map view``."""
    import numpy as np

    from kfloc_ros.mapping.coverage import floor_coverage
    from kfloc_ros.mapping.export import write_new_file
    from kfloc_ros.mapping.picture import picture_from_above, picture_of_coverage, up_axis
    from kfloc_ros.mapping.scene_map import SceneMap, resolve_map

    scene_map = SceneMap.load(resolve_map(args.map))
    if args.accuracy:
        coverage = floor_coverage(scene_map, *up_axis(scene_map))
        picture = picture_of_coverage(scene_map, coverage)
        covered = coverage.share > 0
        if covered.any():
            area_m2, share = covered.sum() * coverage.step_m**2, 100 * coverage.share[covered].mean()
            error_cm = 100 * np.nanmedian(coverage.error_m)
            print(
                f"{area_m2:.1f} m2 are covered, on average in {share:.0f} % of the directions, with a median expected "
                f"error of {error_cm:.1f} cm."
            )
        else:
            print("No level view at the height of the recording is covered.")
    else:
        picture = picture_from_above(scene_map)
    print(f"Drawn as '{write_new_file(args.out, picture)}'.")
    return 0


def run_pack(args: argparse.Namespace) -> int:
    """``kfloc map pack``."""
    from kfloc_ros.mapping.archive import pack_map
    from kfloc_ros.mapping.scene_map import resolve_map

    archive = pack_map(resolve_map(args.map), args.out, overwrite=args.force)
    print(f"Packed into '{archive}' ({archive.stat().st_size / 1e6:.1f} MB).")
    return 0


def run_unpack(args: argparse.Namespace) -> int:
    """``kfloc map unpack``."""
    from kfloc_ros.mapping.archive import unpack_map

    scene_map = unpack_map(args.file, args.out)
    print(f"The map '{scene_map.name}' is whole, and now in '{args.out}'.")
    return 0


def run_crop(args: argparse.Namespace) -> int:
    """``kfloc map crop``."""
    from kfloc_ros.mapping.crop import crop_map
    from kfloc_ros.mapping.scene_map import SceneMap, resolve_map

    whole = SceneMap.load(resolve_map(args.map))
    part = crop_map(whole, args.box[:3], args.box[3:])
    folder = part.save(args.out, overwrite=args.force)
    print(f"{len(part.references.ids)} of {len(whole.references.ids)} reference views are in '{folder}'.")
    return 0
