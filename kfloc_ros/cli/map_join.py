# SPDX-License-Identifier: Apache-2.0
"""``kfloc map update|merge|migrate|place``: adds recordings to a map, merges maps, and makes places of several."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import (
    Submap,
    add_build_options,
    add_no_check,
    add_source_arguments,
    build_config_from,
    build_submap,
    check_first,
    need_poses,
    open_source_from,
    provenance_of,
    words_of,
)
from kfloc_ros.cli.tables import BuildBars, progress_bar
from kfloc_ros.errors import MapError
from kfloc_ros.jobs import add_jobs_arguments, run_parts, workers_from

if TYPE_CHECKING:
    from kfloc_ros.geometry.lie import Matrix
    from kfloc_ros.maps.place import Place

UPDATE = """\
Add a recording to MAP. The recording is mapped by itself and registered by localizing some of its views in MAP. It adds
a scene-coordinate head of its own, which leaves the existing heads unchanged, and reference views that extend the
coverage or replace older ones. Points of older views that its images do not show any more are retired, and what has
changed is printed. Views in another light stay, and each image is aligned with the views that it looks like.

In a place, one submap is updated: that of --submap, or the one in which the recording's images localize (with
--same-frame: whose views are nearest to the recording's poses). The other submaps are copied.
"""
UPDATE_EXAMPLE = """\
examples:
  kfloc map update maps/kitchen bag:out/second_visit --out maps/kitchen --force --budget 3min
  kfloc map update maps/kitchen 7scenes:DIR --same-frame --out maps/kitchen_2 --changes out/changes
  kfloc map update maps/house bag:out/visit --submap attic --out maps/house --force
"""
MERGE = """\
Merge two maps into one. The second map is registered to the first by matching their reference points. --same-frame
skips the registration for maps that already have a common frame, such as neighbouring rooms of one building.

`kfloc map place` combines maps without merging them, and adds a map to a place.
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
        "--submap",
        metavar="NAME",
        help="for a place: the submap to add to (default: the one in which the recording localizes)",
    )
    update.add_argument(
        "--changes", type=Path, metavar="DIR", help="write changes.png (from above) and changes.csv (a line a view)"
    )
    add_build_options(update)
    add_no_check(update)
    update.set_defaults(run_action=run_update)

    merge = actions.add_parser("merge", help="merge two maps into one", description=MERGE)
    merge.add_argument("map", metavar="MAP", help="map that keeps its frame and camera: folder or name")
    merge.add_argument("other", metavar="OTHER", help="map to add")
    merge.add_argument("--name", default="", help="name of the result (default: name of MAP)")
    _add_common(merge, "OTHER's poses")
    merge.set_defaults(run_action=run_merge)

    migrate = actions.add_parser("migrate", help="convert a map or a place to the current format version")
    migrate.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    migrate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="map folder to write if a conversion is necessary; MAP itself with --force",
    )
    migrate.add_argument("--force", action="store_true", help="replace an existing map")
    migrate.set_defaults(run_action=run_migrate)
    add_place(actions)


def _add_common(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="map folder to write; MAP itself with --force"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing map")
    parser.add_argument(
        "--same-frame", action="store_true", help=f"{what} are already in the frame of MAP: skip the registration"
    )


def run_update(args: argparse.Namespace) -> int:
    """Run ``kfloc map update``; return 0."""
    started = time.monotonic()

    from kfloc_ros.mapping.build import check_free
    from kfloc_ros.mapping.changes import write_changes
    from kfloc_ros.mapping.motion_depth import with_depth
    from kfloc_ros.mapping.place_making import submap_of, update_place
    from kfloc_ros.mapping.update import update_map
    from kfloc_ros.maps.format import SUBMAPS, resolve_map
    from kfloc_ros.maps.place import Place, load_map

    check_free(args.out, overwrite=args.force)
    config = build_config_from(args)
    known = load_map(resolve_map(args.map))
    if args.submap and not isinstance(known, Place):
        raise MapError(f"'{args.map}' is a single map, which has no submap '{args.submap}'; omit --submap.")
    number = known.number_of(args.submap) if args.submap and isinstance(known, Place) else None
    frames = open_source_from(args, depth=not args.no_depth)
    need_poses(frames)
    check_first(frames, skip=args.no_check)
    source = with_depth(frames, hide=args.no_depth, device=config.device)
    command = words_of(args)
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
    print(updated.text)
    if args.changes is not None:
        write_changes(args.changes, before, updated.changes)
    print(_counts(before, updated.scene_map, out))
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Run ``kfloc map merge``; return 0."""
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
                f"'{folder}' is a place of several maps, and only single maps can be merged: give one of its submaps, "
                f"the folders in '{folder / SUBMAPS}'. To combine the submaps of both, make a place: kfloc map place "
                f"{args.map} {args.other} --out PLACE"
            )
    older, newer = SceneMap.load(resolve_map(args.map)), SceneMap.load(resolve_map(args.other))
    T = np.eye(4)
    if not args.same_frame:
        found = register(older.references, newer.references)
        T = found.T_fixed_moving
        print(
            f"Registered by {found.views} views and {found.pairs} pairs of points, half of them within "
            f"{100 * found.residual_m:.1f} cm."
        )
    config = MapBuildConfig()
    merged = merge_maps(
        older, newer, T, spacing_m=config.reference_spacing_m, max_points=config.max_points, name=args.name
    )
    merged.save(args.out, overwrite=args.force)
    print(_counts(older, merged, args.out))
    return 0


def run_migrate(args: argparse.Namespace) -> int:
    """Run ``kfloc map migrate``: only the current format version can be read, so there is nothing to convert."""
    from kfloc_ros.maps.format import read_description, resolve_map

    folder = resolve_map(args.map)
    version = read_description(folder)["version"]
    print(f"'{folder}' has the current format version {version}: there is nothing to migrate.")
    return 0


def _counts(before: Any, after: Any, out: Path) -> str:
    from kfloc_ros.kfnet.scoordnet import heads_of

    views = len(before.references.ids), len(after.references.ids)
    heads = len(heads_of(before.head)), len(heads_of(after.head))
    return f"'{out}' has {views[1]} reference views (before: {views[0]}) and {heads[1]} heads (before: {heads[0]})."


PLACE = """\
Combine several maps, the submaps, into a place. The maps are copied; each submap has the name of its folder. A place is
used like a map (`kfloc localize SOURCE --map PLACE`, map:=PLACE), and poses are in the place's frame. The maps must
have a common frame, such as a building's, or --at gives the pose of a submap's frame. All maps must have the same
camera. If a MAP is itself a place, all its submaps are added at their poses: a map is added to a place this way, and
two places are combined.

NAME=SOURCE in place of a MAP builds a submap from a recording. With --jobs or --scheduler, submaps are built at the
same time, one thread each; --train-steps makes each the same to the bit wherever it is built. --parts DIR keeps the
submaps, so that an interrupted command goes on from there.
"""
PLACE_EXAMPLE = """\
examples:
  kfloc map place maps/hall maps/kitchen maps/attic --at attic 0 0 3.1 0 0 0 1 --out maps/house
  kfloc map place maps/house maps/cellar --out maps/house --force
  kfloc map place hall=bag:hall_bag kitchen=bag:kitchen_bag --out maps/house --train-steps 4000 --jobs 2
"""


def add_place(actions: Any) -> None:
    """Register ``kfloc map place``."""
    place = actions.add_parser(
        "place",
        help="combine several maps into a place, whose submaps are loaded on demand",
        description=PLACE,
        epilog=PLACE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    place.add_argument(
        "maps", nargs="+", metavar="MAP",
        help="folder of a map or a place, name of an installed one, or NAME=SOURCE to build one",
    )  # fmt: skip
    place.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the place to write")
    place.add_argument("--name", default="", help="name of the place (default: name of the folder)")
    place.add_argument(
        "--at",
        nargs=8,
        action="append",
        default=[],
        metavar=("SUBMAP", "X", "Y", "Z", "QX", "QY", "QZ", "QW"),
        help="pose of a submap's frame in the place's frame: metres and a quaternion; can be repeated",
    )
    place.add_argument("--force", action="store_true", help="replace an existing place")
    group = place.add_argument_group("submaps that are built")
    group.add_argument("--parts", type=Path, metavar="DIR", help="folder that keeps them; existing ones are used again")
    add_jobs_arguments(group, "submaps")
    add_no_check(place)
    add_build_options(place)
    place.set_defaults(run_action=run_place)


def run_place(args: argparse.Namespace) -> int:
    """Run ``kfloc map place``; return 0."""
    from kfloc_ros.mapping.place_making import check_free_for_place, make_place

    motions: dict[str, Matrix] = {}
    for name, *numbers in args.at:
        if name in motions:
            raise MapError(f"--at is given twice for the submap '{name}'.")
        motions[name] = read_motion(name, numbers)
    check_free_for_place(args.out, overwrite=args.force)
    with contextlib.ExitStack() as stack:
        if args.parts is None and any(is_to_build(word) for word in args.maps):
            args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
            args.parts = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=".parts.", dir=args.out.absolute().parent))
            )
        folders = _built_or_named(args)
        place = make_place(folders, args.out, name=args.name, T_place_submaps=motions, overwrite=args.force)
    print(describe_place(place))
    return 0


def is_to_build(word: str) -> bool:
    """Return True for ``NAME=SOURCE``."""
    return bool(re.match(r"[A-Za-z0-9_-]+=.", word)) and not Path(word).exists()


def _built_or_named(args: argparse.Namespace) -> list[Path]:
    """Return the folders of all maps, in order; those to be built are built first."""
    from kfloc_ros.maps.format import resolve_map

    config = build_config_from(args)
    wanted: dict[str, Submap] = {}
    for word in filter(is_to_build, args.maps):
        name, _, source = word.partition("=")
        if name in wanted:
            raise MapError(f"Two submaps are named '{name}'.")
        out = args.parts.absolute() / name
        wanted[name] = Submap(source, out, config, args.no_depth, args.no_check, words_of(args))
    missing = [submap for submap in wanted.values() if not (submap.out / "map.yaml").is_file()]
    with progress_bar(total=len(missing), unit="submap", desc="building") as bar:
        run_parts(build_submap, missing, workers_from(args), on_done=lambda part: bar.update())
    return [wanted[word.partition("=")[0]].out if is_to_build(word) else resolve_map(word) for word in args.maps]


def read_motion(name: str, numbers: list[str]) -> Matrix:
    """Return a pose (4, 4) from x, y, z and a quaternion x, y, z, w.

    Raises:
        MapError: a value is not a number, or the quaternion is not of norm 1.
    """
    import numpy as np

    from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix

    try:
        values = np.array([float(text) for text in numbers])
    except ValueError as error:
        raise MapError(f"--at {name} takes seven numbers, X Y Z QX QY QZ QW, got: {' '.join(numbers)}.") from error
    length = float(np.linalg.norm(values[3:]))
    if not np.isfinite(values).all() or abs(length - 1) > 1e-2:
        raise MapError(f"--at {name}: the quaternion QX QY QZ QW must have norm 1, got {length:g}.")
    return make_pose(quaternion_to_matrix(values[3:] / length), values[:3])


def describe_place(place: Place) -> str:
    """Return a description of a place as aligned lines, one per submap."""
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
