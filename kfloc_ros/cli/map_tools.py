# SPDX-License-Identifier: Apache-2.0
"""``kfloc map export|view|pack|unpack|crop``: tools for an existing map or place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kfloc_ros.mapping.picture import Coverage

MAP_HELP = "folder of a map or a place, or name of an installed one"


def add_tools(actions: Any) -> None:
    """Register the actions below ``kfloc map``."""
    export = actions.add_parser("export", help="export a map or a place as a COLMAP model or a PLY point cloud")
    export.add_argument("map", metavar="MAP", help=MAP_HELP)
    export.add_argument("--to", choices=("colmap", "ply"), required=True, help="format")
    export.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder (colmap) or file (ply) to write"
    )
    export.set_defaults(run_action=run_export)

    view = actions.add_parser(
        "view",
        help="draw a map, or a place with all its submaps, from above: points, reference views, extent, or expected "
        "accuracy",
    )
    view.add_argument("map", metavar="MAP", help=MAP_HELP)
    view.add_argument("--out", type=Path, required=True, metavar="PNG", help="picture to write")
    view.add_argument(
        "--accuracy", action="store_true", help="draw the expected accuracy of localization over the floor"
    )
    view.set_defaults(run_action=run_view)

    pack = actions.add_parser("pack", help="pack a map or a place into one file")
    pack.add_argument("map", metavar="MAP", help=MAP_HELP)
    pack.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as kitchen.kfmap")
    pack.add_argument("--force", action="store_true", help="replace an existing file")
    pack.set_defaults(run_action=run_pack)

    unpack = actions.add_parser("unpack", help="unpack and verify a packed map or place")
    unpack.add_argument("file", type=Path, metavar="FILE", help="packed map or place")
    unpack.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    unpack.set_defaults(run_action=run_unpack)

    crop = actions.add_parser("crop", help="crop a map or a place to a box")
    crop.add_argument("map", metavar="MAP", help=MAP_HELP)
    crop.add_argument("--out", type=Path, required=True, metavar="DIR", help="map folder to write")
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
    """Run ``kfloc map export``; return 0."""
    from kfloc_ros.mapping.export import export_colmap, export_ply
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import load_map

    known = load_map(resolve_map(args.map))
    write = export_colmap if args.to == "colmap" else export_ply
    print(f"Exported to '{write(known, args.out)}'.")
    return 0


def run_view(args: argparse.Namespace) -> int:
    """Run ``kfloc map view``; return 0."""
    from kfloc_ros.mapping.export import write_new_file
    from kfloc_ros.mapping.picture import (
        floor_coverage,
        path_errors_m,
        picture_from_above,
        picture_of_coverage,
        up_axis,
    )
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import each_map, load_map

    known = load_map(resolve_map(args.map))
    if args.accuracy:
        coverages = []
        for submap, scene_map in each_map(known):
            coverages.append(floor_coverage(scene_map, *up_axis(known)))
            along_cm = 100 * path_errors_m(scene_map)
            text = f"{_describe_coverage(coverages[-1])} {_describe_path(along_cm)}"
            print(f"{submap}: " * bool(submap) + text)
        picture = picture_of_coverage(known, coverages)
    else:
        picture = picture_from_above(known)
    print(f"Written to '{write_new_file(args.out, picture)}'.")
    return 0


def _describe_coverage(coverage: Coverage) -> str:
    import numpy as np

    covered = coverage.share > 0
    if not covered.any():
        return "No place around the recording is covered."
    area_m2, share = covered.sum() * coverage.step_m**2, 100 * coverage.share[covered].mean()
    return (
        f"{area_m2:.1f} m2 are covered, on average in {share:.0f} % of the directions, with a median expected error "
        f"of {100 * np.nanmedian(coverage.error_m):.1f} cm."
    )


def _describe_path(along_cm: NDArray[np.float64]) -> str:
    import numpy as np

    known = along_cm[np.isfinite(along_cm)]
    if not len(known):
        return "No view of the recorded path has enough points to be localized."
    return (
        f"On the recorded path, {len(known)} of {len(along_cm)} views can be localized, with a median expected error "
        f"of {np.median(known):.1f} cm."
    )


def run_pack(args: argparse.Namespace) -> int:
    """Run ``kfloc map pack``; return 0."""
    from kfloc_ros.maps.archive import pack_map
    from kfloc_ros.maps.format import resolve_map

    archive = pack_map(resolve_map(args.map), args.out, overwrite=args.force)
    print(f"Packed into '{archive}' ({archive.stat().st_size / 1e6:.1f} MB).")
    return 0


def run_unpack(args: argparse.Namespace) -> int:
    """Run ``kfloc map unpack``; return 0."""
    from kfloc_ros.maps.archive import unpack_map

    known = unpack_map(args.file, args.out)
    print(f"'{known.name}' is intact and unpacked to '{args.out}'.")
    return 0


def run_crop(args: argparse.Namespace) -> int:
    """Run ``kfloc map crop``; return 0."""
    from kfloc_ros.mapping.merge import crop_map
    from kfloc_ros.mapping.place_editing import crop_place
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import Place, load_map

    whole = load_map(resolve_map(args.map))
    low, high = args.box[:3], args.box[3:]
    if isinstance(whole, Place):
        cropped = crop_place(whole, low, high, args.out, overwrite=args.force)
        print(
            f"{len(cropped.submaps)} of {len(whole.submaps)} submaps, with {len(cropped.references.ids)} of "
            f"{len(whole.references.ids)} reference views, are in '{cropped.path}'."
        )
        return 0
    part = crop_map(whole, low, high)
    folder = part.save(args.out, overwrite=args.force)
    print(f"{len(part.references.ids)} of {len(whole.references.ids)} reference views are in '{folder}'.")
    return 0
