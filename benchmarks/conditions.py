# SPDX-License-Identifier: Apache-2.0
"""Benchmark of light and change: the demo's walk in a map of the same room, under growing amounts of each.

Every row is a run of the localizer over every --every-th frame of ``sim:localize`` with other conditions, in order.
"wrong" is the share of frames whose pose is claimed (TRACKING) and is more than 10 cm or 10 degrees off.

    python benchmarks/conditions.py --map demo_room --every 4
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from second_visit import RECALLS, Row, cells, localizer_answers, row

from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap

SWEEPS = (
    "light=day", "light=evening", "light=night", "",
    "light=day&moved=0.3", "light=day&moved=0.6", "light=day&moved=1",
    "light=day&exchanged=0.3", "light=day&exchanged=0.6", "light=day&exchanged=1",
    "light=day&people=2", "light=day&people=6", "light=day&dirt=0.3", "light=day&dirt=1",
    "light=day&exposure=1", "light=day&exposure=2",
    "light=evening&moved=0.3", "light=evening&moved=0.3&exchanged=0.3&people=2",
)  # fmt: skip
"""Conditions of the rows; the empty one is the recording as it is: dusk, in which a lamp goes out."""


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", default="demo_room", metavar="MAP", help="map of the room (default: demo_room)")
    parser.add_argument("--every", type=int, default=4, help="frames between two that are localized (default: 4)")
    parser.add_argument("--change", type=int, default=1, help="seed of the changes (default: 1)")
    parser.add_argument("--conditions", nargs="*", default=SWEEPS, metavar="WORDS", help="conditions of the rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    rows: list[Row] = []
    names = [f"{100 * m:.0f} cm/{deg:.0f} deg" for m, deg in RECALLS]
    header = ["conditions", "frames", "pose", *names, "median", "wrong", "searched", "NEES", "ms a frame"]
    try:
        scene_map = SceneMap.load(resolve_map(args.map))
        for words in args.conditions:
            spec = "sim:localize?" + "&".join(filter(None, (words, f"change={args.change}")))
            source = open_source(spec, frames=f"0:1000000:{args.every}")
            rows.append(row(words or "as recorded", list(localizer_answers(source, scene_map, 0.0, 0.0).values())))
            print(format_table([cells(rows[-1])], header=header), flush=True)
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    print(format_table([cells(r) for r in rows], header=header))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
