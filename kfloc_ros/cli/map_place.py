# SPDX-License-Identifier: Apache-2.0
"""``kfloc map place``: a place of several maps, of which only those near the camera are in memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.errors import MapError

if TYPE_CHECKING:
    from kfloc_ros.geometry.lie import Matrix
    from kfloc_ros.maps.place import Place

TEXT = """\
Makes a place of several maps, its submaps, each called as its folder. They are copied; the result is used like a map
(`kfloc localize SOURCE --map PLACE`, map:=PLACE), and poses are in its frame. The maps' poses are to be in one frame,
such as a building's, or --at says where a submap's frame lies. All must be for one camera. Of a MAP that is a place
itself all submaps are taken, where they lie in it: so a map is added to a place, or two places are joined.
"""
EXAMPLE = """\
examples:
  kfloc map place maps/hall maps/kitchen maps/attic --at attic 0 0 3.1 0 0 0 1 --out maps/house
  kfloc map place maps/house maps/cellar --out maps/house --force
"""


def add_place(actions: Any) -> None:
    """Register the action below ``kfloc map``."""
    parser = actions.add_parser(
        "place",
        help="make a place of several maps, loaded as they are needed",
        description=TEXT,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("maps", nargs="+", metavar="MAP", help="folder of a map or a place, or an installed one's name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the place to write")
    parser.add_argument("--name", default="", help="name of the place (default: that of the folder)")
    parser.add_argument(
        "--at",
        nargs=8,
        action="append",
        default=[],
        metavar=("SUBMAP", "X", "Y", "Z", "QX", "QY", "QZ", "QW"),
        help="pose of a submap's frame in the place's: metres, and a quaternion; may be given for each",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing place")
    parser.set_defaults(run_action=run_place)


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
