# SPDX-License-Identifier: Apache-2.0
"""``kfloc map export|view|pack|unpack|crop|align``: tools for an existing map or place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kfloc_ros.mapping.picture import Coverage

ALIGN = """\
Find how an occupancy grid (map_server, slam_toolbox) lies to a map, and write the map in the grid's frame, so that
`map` is the same frame for Nav2 and for the localizer. The map's points on upright surfaces are laid on the grid's
occupied cells, and its views on free ones. The map is leveled, too: its floor becomes z = 0, z points up.

If the grid fits in several ways, such as an empty rectangular room, nothing is written: give two points that you know
in both, --pair twice, with the map's coordinates as `kfloc map view` shows them. Look at the picture in any case.
"""

ALIGN_EXAMPLES = """\
examples:
  kfloc map align maps/hall nav2/hall.yaml --out maps/hall_aligned
  kfloc map align maps/hall nav2/hall.yaml --heights 0.1 0.6 --out maps/hall_aligned
  kfloc map align maps/hall nav2/hall.yaml --pair 0 0 1.2 -3.4 --pair 8.5 2 9.6 -1.1 --out maps/hall_aligned
"""

MAP_HELP = "folder of a map or a place, or name of an installed one"


def add_tools(actions: Any) -> None:
    """Register the actions below ``kfloc map``."""
    export = actions.add_parser(
        "export", help="export a map or a place as a COLMAP model, a PLY point cloud or ONNX networks"
    )
    export.add_argument("map", metavar="MAP", help=MAP_HELP)
    export.add_argument("--to", choices=("colmap", "ply", "onnx"), required=True, help="format")
    export.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="folder (colmap, onnx) or file (ply) to write"
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

    align = actions.add_parser(
        "align",
        help="lay a map on an occupancy grid of Nav2, and write it in the grid's frame",
        description=ALIGN,
        epilog=ALIGN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    align.add_argument("map", metavar="MAP", help="folder of a map, or name of an installed one")
    align.add_argument("grid", type=Path, metavar="GRID", help="yaml file of the grid")
    align.add_argument("--out", type=Path, required=True, metavar="DIR", help="map folder to write")
    align.add_argument(
        "--picture", type=Path, default=None, metavar="PNG", help="picture to write (default: DIR with .png)"
    )
    align.add_argument(
        "--heights",
        type=float,
        nargs=2,
        default=(0.1, 2.0),
        metavar=("LOW", "HIGH"),
        help="heights above the floor of the points that are compared, in metres (default: 0.1 2.0)",
    )
    align.add_argument(
        "--pair",
        type=float,
        nargs=4,
        action="append",
        default=[],
        metavar=("X", "Y", "GX", "GY"),
        help="a point by its coordinates in the map and in the grid's frame, in metres; twice or more",
    )
    align.add_argument("--force", action="store_true", help="replace an existing map and picture")
    align.set_defaults(run_action=run_align)


def run_export(args: argparse.Namespace) -> int:
    """Run ``kfloc map export``; return 0."""
    from kfloc_ros.mapping.export import export_colmap, export_onnx, export_ply
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import load_map

    known = load_map(resolve_map(args.map))
    write = {"colmap": export_colmap, "ply": export_ply, "onnx": export_onnx}[args.to]
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
    from kfloc_ros.mapping.place_making import crop_place
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


def run_align(args: argparse.Namespace) -> int:
    """Run ``kfloc map align``; return 0, or 1 if no alignment is believed."""
    from dataclasses import replace

    from kfloc_ros.errors import MapError
    from kfloc_ros.mapping.export import write_new_file
    from kfloc_ros.mapping.grid_alignment import align_by_hand, align_with_grid, read_grid
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import Place, load_map
    from kfloc_ros.maps.scene_map import in_frame
    from kfloc_ros.visualization.overlay import picture_on_grid

    picture: Path = args.picture or args.out.with_name(f"{args.out.name}.png")
    for path in (args.out, picture):
        if path.exists() and not args.force:
            raise MapError(f"'{path}' exists; pass --force to replace it or give another name.")
    known = load_map(resolve_map(args.map))
    if isinstance(known, Place):
        raise MapError(
            f"'{known.name}' is a place. Align its submaps one by one, and combine them again by `kfloc map place`."
        )
    grid = read_grid(args.grid)
    if args.pair:
        found = align_by_hand(known, grid, [tuple(pair) for pair in args.pair])
    else:
        found = align_with_grid(known, grid, *args.heights)
    picture.unlink(missing_ok=True)
    T = found.T_grid_map
    walls, views = (
        points @ T[:3, :3].T + T[:3, 3] for points in (found.wall_points, known.references.T_map_camera[:, :3, 3])
    )
    written = write_new_file(picture, picture_on_grid(grid, walls, views, f"{known.name} on {grid.name}"))
    print(
        f"{100 * found.share:.0f} % of the map's points on upright surfaces are on occupied cells of '{args.grid}', "
        f"and {100 * found.free_share:.0f} % of its views over free ones; see '{written}'."
    )
    if found.fault:
        print(f"No map was written: {found.fault}. Give two points that you know in both: --pair, twice.")
        return 1
    aligned = in_frame(known, T, "map")
    text = f"to {grid.name}: " + " ".join(f"{value:.6g}" for value in T[:3].reshape(-1))
    aligned = replace(aligned, provenance={**known.provenance, "aligned": text}, path=None)
    print(f"Written to '{aligned.save(args.out, overwrite=args.force)}'.")
    return 0
