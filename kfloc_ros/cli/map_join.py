# SPDX-License-Identifier: Apache-2.0
"""``kfloc map update|merge|migrate``: more of a place in one map, and the format version of a map."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import BuildBars, add_build_options, build_config_from, need_poses, provenance_of
from kfloc_ros.cli.check import add_no_check, check_first
from kfloc_ros.errors import MapError

if TYPE_CHECKING:
    from kfloc_ros.geometry.lie import Matrix
    from kfloc_ros.maps.place import Place

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
PLACE = """\
Makes a place of several maps, its submaps, each called as its folder. They are copied; the result is used like a map
(`kfloc localize SOURCE --map PLACE`, map:=PLACE), and poses are in its frame. The maps' poses are to be in one frame,
such as a building's, or --at says where a submap's frame lies. All must be for one camera. Of a MAP that is a place
itself all submaps are taken, where they lie in it: so a map is added to a place, or two places are joined.
"""
PLACE_EXAMPLE = """\
examples:
  kfloc map place maps/hall maps/kitchen maps/attic --at attic 0 0 3.1 0 0 0 1 --out maps/house
  kfloc map place maps/house maps/cellar --out maps/house --force
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
    add_no_check(update)
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

    place = actions.add_parser(
        "place",
        help="make a place of several maps, loaded as they are needed",
        description=PLACE,
        epilog=PLACE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place.add_argument("maps", nargs="+", metavar="MAP", help="folder of a map or a place, or an installed one's name")
    place.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the place to write")
    place.add_argument("--name", default="", help="name of the place (default: that of the folder)")
    place.add_argument(
        "--at",
        nargs=8,
        action="append",
        default=[],
        metavar=("SUBMAP", "X", "Y", "Z", "QX", "QY", "QZ", "QW"),
        help="pose of a submap's frame in the place's: metres, and a quaternion; may be given for each",
    )
    place.add_argument("--force", action="store_true", help="replace an existing place")
    place.set_defaults(run_action=run_place)


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
    check_first(frames, skip=args.no_check)
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


def run_place(args: argparse.Namespace) -> int:
    """``kfloc map place``."""
    from kfloc_ros.mapping.place_making import make_place
    from kfloc_ros.maps.format import resolve_map

    motions: dict[str, Matrix] = {}
    for name, *numbers in args.at:
        if name in motions:
            raise MapError(f"--at places the submap '{name}' twice.")
        motions[name] = read_motion(name, numbers)
    folders = [resolve_map(name) for name in args.maps]
    place = make_place(folders, args.out, name=args.name, T_place_submaps=motions, overwrite=args.force)
    print(describe_place(place))
    return 0


def read_motion(name: str, numbers: list[str]) -> Matrix:
    """(4, 4) from x, y, z and a quaternion x, y, z, w.

    Raises:
        MapError: they are no numbers, or the quaternion is of no length.
    """
    import numpy as np

    from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix

    try:
        values = np.array([float(text) for text in numbers])
    except ValueError as error:
        raise MapError(f"--at {name} takes seven numbers, X Y Z QX QY QZ QW, got: {' '.join(numbers)}.") from error
    length = float(np.linalg.norm(values[3:]))
    if not np.isfinite(values).all() or abs(length - 1) > 1e-2:
        raise MapError(f"--at {name}: the quaternion QX QY QZ QW must be of length 1, got {length:g}.")
    return make_pose(quaternion_to_matrix(values[3:] / length), values[:3])


def describe_place(place: Place) -> str:
    """A place in a few aligned lines, one for each submap."""
    camera, (low, high) = place.camera, place.bounds_m
    rows = {
        "place": f"{place.name} ({place.path}, {place.size_bytes() / 1e6:.1f} MB)",
        "frame": place.frame_id,
        "camera": (
            f"{camera.width}x{camera.height}, f {camera.fx:.1f} {camera.fy:.1f}, c {camera.cx:.1f} {camera.cy:.1f} px"
        ),
        "extent": f"{_size(low, high)} m",
        "submaps": str(len(place.submaps)),
    }
    for number, submap in enumerate(place.submaps):
        x, y, z = (sum(pair) / 2 for pair in zip(*submap.bounds_m, strict=True))
        rows[f"  {submap.name}"] = (
            f"{_size(*submap.bounds_m)} m around ({x:.1f}, {y:.1f}, {z:.1f}), {place.index.view_count(number)} views"
        )
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def _size(low: tuple[float, ...], high: tuple[float, ...]) -> str:
    return " x ".join(f"{b - a:.1f}" for a, b in zip(low, high, strict=True))
