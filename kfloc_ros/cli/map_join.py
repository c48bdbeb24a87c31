# SPDX-License-Identifier: Apache-2.0
"""``kfloc map update|merge|migrate``: more of a place in one map, and the format version of a map."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import BuildBars, add_build_options, build_config_from, need_poses, provenance_of
from kfloc_ros.errors import MapError

UPDATE = """\
Maps a recording by itself, finds where it lies in MAP by localizing some of its views there, and adds it: a head of its
own, which leaves what the map knows as it was, and reference views where they add coverage, newer before older.

Of a place of several maps one submap is updated, that of --submap or the one in which the recording's images are found
(with --same-frame: whose views are nearest to its poses); the others are copied.
"""
UPDATE_EXAMPLE = """\
examples:
  kfloc map update maps/kitchen bag:out/second_visit --out maps/kitchen --force --budget 3min
  kfloc map update maps/kitchen 7scenes:DIR --same-frame --out maps/kitchen_2
  kfloc map update maps/house bag:out/visit --submap attic --out maps/house --force
"""
MERGE = """\
Makes one map of two. The second is placed in the first's frame by matching their reference points; --same-frame skips
that for maps that have one frame already, such as maps of neighbouring rooms in one building's frame.

Maps that are to stay apart are made a place of: see `kfloc map place --help`, which also adds a map to a place.
"""


def add_join(actions: Any) -> None:
    """Register the actions below ``kfloc map``."""
    update = actions.add_parser(
        "update",
        help="add a recording to a map",
        description=UPDATE,
        epilog=UPDATE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    update.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    add_source_arguments(update)
    _add_common(update, "the recording's poses")
    update.add_argument(
        "--submap", metavar="NAME", help="of a place, the submap to add to (default: where the recording is found)"
    )
    add_build_options(update)
    update.set_defaults(run_action=run_update)

    merge = actions.add_parser("merge", help="make one map of two", description=MERGE)
    merge.add_argument("map", metavar="MAP", help="the map whose frame and camera stay: folder or name")
    merge.add_argument("other", metavar="OTHER", help="the map that is added")
    merge.add_argument("--name", default="", help="name of the result (default: that of MAP)")
    _add_common(merge, "OTHER's poses")
    merge.set_defaults(run_action=run_merge)

    migrate = actions.add_parser("migrate", help="bring a map or a place to the present format version")
    migrate.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    migrate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="map folder to write, if there is anything to migrate; MAP itself with --force",
    )
    migrate.add_argument("--force", action="store_true", help="replace an existing map")
    migrate.set_defaults(run_action=run_migrate)


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="map folder to write; MAP itself with --force"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing map")
    parser.add_argument("--same-frame", action="store_true", help=f"{what} are in the frame of MAP: do not look for it")


def run_update(args: argparse.Namespace) -> int:
    """``kfloc map update``."""
    started = time.monotonic()

    from kfloc_ros.mapping.build import check_free
    from kfloc_ros.mapping.motion_depth import with_depth
    from kfloc_ros.mapping.place_editing import submap_of, update_place
    from kfloc_ros.mapping.update import update_map
    from kfloc_ros.maps.format import SUBMAPS, resolve_map
    from kfloc_ros.maps.place import Place, load_map

    check_free(args.out, overwrite=args.force)
    config = build_config_from(args)
    known = load_map(resolve_map(args.map))
    if args.submap and not isinstance(known, Place):
        raise MapError(f"'{args.map}' is a single map, which has no submap '{args.submap}'; leave out --submap.")
    number = known.number_of(args.submap) if args.submap and isinstance(known, Place) else None
    frames = open_source_from(args, depth=not args.no_depth)
    need_poses(frames)
    source = with_depth(frames, hide=args.no_depth, device=config.device)
    command = shlex.join(["kfloc", "map", "update", args.map, args.source, "--out", str(args.out)])
    options: dict[str, Any] = {
        "same_frame": args.same_frame,
        "provenance": {f"last_update_{k}": value for k, value in provenance_of(args, source, command).items()},
        "started": started,
        "on_progress": BuildBars(),
    }
    if isinstance(known, Place):
        if number is None:
            number = submap_of(known, frames, same_frame=args.same_frame, device=config.device)
        before, out = known.load_submap(number), args.out / SUBMAPS / known.submaps[number].name
        _, updated = update_place(known, number, source, args.out, config, overwrite=args.force, **options)
    else:
        before, out = known, args.out
        updated = update_map(known, source, config, **options)
        updated.scene_map.save(args.out, overwrite=args.force)
    placed = updated.placement
    if placed is not None:
        where = "its poses, moved into the map's frame" if placed.moved else "its poses as they are"
        print(f"Placed by {placed.agreeing} of {placed.tried} views that agree: {where}.")
    print(_counts(before, updated.scene_map, out))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """``kfloc map merge``."""
    import numpy as np

    from kfloc_ros.mapping.build import MapBuildConfig, check_free
    from kfloc_ros.mapping.merge import merge_maps
    from kfloc_ros.mapping.registration import register
    from kfloc_ros.maps.format import SUBMAPS, resolve_map
    from kfloc_ros.maps.place import is_place
    from kfloc_ros.maps.scene_map import SceneMap

    check_free(args.out, overwrite=args.force)
    for folder in (resolve_map(args.map), resolve_map(args.other)):
        if is_place(folder):
            raise MapError(
                f"'{folder}' is a place of several maps, and only single maps are merged: name one of its submaps, the "
                f"folders in '{folder / SUBMAPS}'. To have the submaps of both side by side, make one place of them: "
                f"kfloc map place {args.map} {args.other} --out PLACE"
            )
    older, newer = SceneMap.load(resolve_map(args.map)), SceneMap.load(resolve_map(args.other))
    T = np.eye(4)
    if not args.same_frame:
        found = register(older.references, newer.references)
        T = found.T_fixed_moving
        print(
            f"Placed by {found.views} views and {found.pairs} pairs of points, "
            f"half of them within {100 * found.residual_m:.1f} cm."
        )
    config = MapBuildConfig()
    merged = merge_maps(
        older, newer, T, spacing_m=config.reference_spacing_m, max_points=config.max_points, name=args.name
    )
    merged.save(args.out, overwrite=args.force)
    print(_counts(older, merged, args.out))
    return 0


def run_migrate(args: argparse.Namespace) -> int:
    """``kfloc map migrate``: versions before the present one are refused when read, so that nothing is left to do."""
    from kfloc_ros.maps.format import read_description, resolve_map

    folder = resolve_map(args.map)
    version = read_description(folder)["version"]
    print(f"'{folder}' has format version {version}, the present one: there is nothing to migrate.")
    return 0


def _counts(before: Any, after: Any, out: Path) -> str:
    from kfloc_ros.kfnet.scoordnet import heads_of

    views = len(before.references.ids), len(after.references.ids)
    heads = len(heads_of(before.head)), len(heads_of(after.head))
    return f"'{out}' has {views[1]} reference views (before: {views[0]}) and {heads[1]} heads (before: {heads[0]})."
