# SPDX-License-Identifier: Apache-2.0
"""Benchmark of places of similar rooms: cold starts in the right room, and cost against the size of the place.

It maps the rooms of the simulated building (once; maps are kept in --work), makes places of the first 1, 3 and 10 of
them, and measures each in a separate process: cold starts from single images, equally spaced through the walks in the
rooms of --rooms, and a walk of --walk images whose first pose is given. A start is

    right      a pose within 0.5 m and 20 degrees of the truth
    alike      no pose, since several submaps look alike
    none       no pose for another reason
    wrong      another pose

"in 4 s" is the share of starts with a right start at most four seconds later in the same walk: an ambiguous start is
tried again with every image until something else comes into view.

With --begun, walks also begin without a pose in every room, at the start and in the middle of its recording, with an
image every 0.67 s until the first pose. "begun" is the number of right and wrong first poses, and the median time to
them. Two images from different views with the same tentative place then also decide between similar rooms.

With --doors, walks also lead through the doors of the first three rooms and back, in the place of these three, with
every second frame of 15 a second; the first pose is given. An estimate is wrong as above. It is in a wrong room if it
is in another room than the camera and further than 0.3 m from the door between them. "at doors" are frames within 1 m
of a door. The same walks follow with the lens covered for 1.5 s around each door; "back" is the time from then to the
first pose.

    python benchmarks/places.py --work out/building --doors --json out/places.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from building_walks import DOOR_ROOMS, door_table, judged, through_doors, timed

from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import describe_hardware, limit_threads
from kfloc_ros.errors import KflocError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import PlaceLocalizer
from kfloc_ros.mapping.build import MapBuildConfig, build_map
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.maps.place import Place
from kfloc_ros.simulation.building import RATE_HZ, ROOMS, BuildingSource
from kfloc_ros.types import Frame

OUTCOMES = ("right", "alike", "none", "wrong")
BEGUN_AT, BEGUN_EVERY = (0.0, 0.5), 10


@dataclass(frozen=True)
class Row:
    """Result for a place of a number of submaps."""

    submaps: int
    starts: int
    outcomes: dict[str, int]
    in_4_s: float
    """Share of starts with a right one at most four seconds later; starts too close to the end of a walk do not
    count."""
    median_error_cm: float
    """Median error of the right ones."""
    start_ms: float
    """Median processor time of a cold start, with loading the submaps that it needs."""
    frame_ms: float
    """Median processor time of a later frame."""
    loads: int
    waited_ms: float
    """Mean wait for a submap."""
    memory_mb: float
    """Resident memory at the end, minus that before the place is loaded."""
    place_mb: float
    """Size on disk."""
    begun: int = 0
    """Number of walks that begin without a pose."""
    begun_right: int = 0
    begun_wrong: int = 0
    begun_s: float = math.nan
    """Median time to the first pose, if right."""


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/building"), metavar="DIR", help="maps and places")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 10], help="of the places (default: 1 3 10)")
    parser.add_argument("--rooms", type=int, nargs="+", default=list(range(1, ROOMS + 1)), help="rooms started in")
    parser.add_argument("--starts", type=int, default=7, help="cold starts in each room (default: 7)")
    parser.add_argument("--walk", type=int, default=20, help="frames of the walk in the first room (default: 20)")
    parser.add_argument("--train-seconds", type=float, default=10.0, help="of each room's head (default: 10)")
    parser.add_argument("--loaded-submaps", type=int, default=4, help="submaps kept in memory (default: 4)")
    parser.add_argument("--begun", action="store_true", help="also begin walks without a pose")
    parser.add_argument("--doors", action="store_true", help="walk through the doors between three rooms, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        limit_threads()
        if args.one is not None:
            print(json.dumps(asdict(measure(args, args.one))))
            return 0
        prepare(args.work, max(*args.sizes, DOOR_ROOMS if args.doors else 1), args.train_seconds)
        rows = [in_own_process(size) for size in args.sizes]
        walks = through_doors(place_of(args.work, DOOR_ROOMS), args.loaded_submaps) if args.doors else []
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if walks:
        print(f"\n{door_table(walks)}")
    if args.json is not None:
        content: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "hardware": describe_hardware(),
            "rows": [asdict(r) for r in rows],
        }
        content["doors"] = [asdict(row) for row in walks]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def prepare(work: Path, rooms: int, train_seconds: float) -> None:
    """Map the rooms that are not mapped yet."""
    for room in range(1, rooms + 1):
        folder = work / f"room_{room}"
        if folder.is_dir():
            continue
        start = time.perf_counter()
        config = MapBuildConfig(train_seconds=train_seconds, augmentations=0, seed=room)
        build_map(BuildingSource(room), folder, config)
        print(f"room {room} mapped in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def place_of(work: Path, size: int) -> Path:
    """Return the place of a number of rooms, made if it does not exist yet."""
    folder = work / f"place_{size}"
    if not folder.is_dir():
        make_place([work / f"room_{room}" for room in range(1, size + 1)], folder)
    return folder


def in_own_process(size: int) -> Row:
    """Measure a place in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", str(size)], stdout=subprocess.PIPE, text=True, check=True
    )
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def measure(args: argparse.Namespace, size: int) -> Row:
    """Return one row; rooms that the place does not have are left out."""
    folder = place_of(args.work, size)
    starts = [frame for room in args.rooms if room <= size for frame in started(room, args.starts)]
    walk = [BuildingSource(1, "localize")[k] for k in range(30, 30 + args.walk)]
    before_mb = resident_mb()
    place = Place.load(folder)
    localizer = PlaceLocalizer(place, LocalizerConfig(loaded_submaps=args.loaded_submaps))
    adapter = ImageAdapter(BuildingSource(1).camera, localizer.camera)
    counts = dict.fromkeys(OUTCOMES, 0)
    errors, start_ms = [], []
    right: list[tuple[str, float, bool]] = []
    for frame in starts:
        localizer.reset("a cold start")
        estimate, spent_ms = timed(localizer, frame, adapter)
        start_ms.append(spent_ms)
        outcome, error_m = judged(estimate, frame)
        counts[outcome] += 1
        right.append((frame.name.partition("/")[0], 1e-9 * frame.stamp_ns, outcome == "right"))
        if outcome == "right":
            errors.append(error_m)
        print(f"{frame.name}: {outcome} {localizer.submap} {estimate.reason}", file=sys.stderr)
    rooms = [room for room in args.rooms if room <= size] if args.begun else []
    walks = [begun(localizer, room, share, adapter) for room in rooms for share in BEGUN_AT]
    right_s = [time_s for outcome, time_s in walks if outcome == "right"]
    localizer.reset("a walk")
    assert walk[0].T_map_camera is not None
    hints = {0: [walk[0].T_map_camera]}
    frame_ms = [timed(localizer, frame, adapter, hints.get(k, ()))[1] for k, frame in enumerate(walk)]
    cache = localizer.guide.cache.counts
    return Row(
        submaps=size,
        starts=len(starts),
        outcomes=counts,
        in_4_s=found_within(right, 4.0),
        median_error_cm=float(100 * np.median(errors)) if errors else float("nan"),
        start_ms=float(np.median(start_ms)),
        frame_ms=float(np.median(frame_ms[1:])),
        loads=cache.loads,
        waited_ms=cache.waited_ms / max(cache.waits, 1),
        memory_mb=resident_mb() - before_mb,
        place_mb=place.size_bytes() / 1e6,
        begun=len(walks),
        begun_right=len(right_s),
        begun_wrong=sum(outcome == "wrong" for outcome, _ in walks),
        begun_s=float(np.median(right_s)) if right_s else math.nan,
    )


def begun(localizer: PlaceLocalizer, room: int, share: float, adapter: ImageAdapter) -> tuple[str, float]:
    """Return outcome and time of the first pose of a walk that begins at a share of a recording."""
    source = BuildingSource(room, "localize")
    first = int(share * len(source))
    localizer.reset("a walk begins")
    for position in range(first, len(source), BEGUN_EVERY):
        frame = replace(source[position], depth_m=None)
        outcome, _ = judged(timed(localizer, frame, adapter)[0], frame)
        if outcome in ("right", "wrong"):
            print(f"{frame.name}: begun {(position - first) / RATE_HZ:.1f} s before, {outcome}", file=sys.stderr)
            return outcome, (position - first) / RATE_HZ
    print(f"{source.name}: begun at {share:.1f}, nothing", file=sys.stderr)
    return "none", math.inf


def started(room: int, count: int) -> Iterator[Frame]:
    """Yield frames equally spaced through the walk in a room."""
    source: FrameSource = BuildingSource(room, "localize")
    for position in np.linspace(0, len(source) - 1, count + 2)[1:-1].astype(int).tolist():
        yield replace(source[position], depth_m=None)


def found_within(starts: Sequence[tuple[str, float, bool]], seconds: float) -> float:
    """Return the share of starts (walk, time, right) with a right one in the same walk within some seconds."""
    found = []
    for walk, begin_s, _ in starts:
        later = [(s, right) for other, s, right in starts if other == walk and s >= begin_s]
        hit = any(right for s, right in later if s <= begin_s + seconds)
        if hit or later[-1][0] >= begin_s + 0.9 * seconds:
            found.append(hit)
    return sum(found) / max(len(found), 1)


def resident_mb() -> float:
    """Return the resident memory of this process."""
    with open("/proc/self/status", encoding="ascii") as stream:
        line = next(line for line in stream if line.startswith("VmRSS"))
    return float(line.split()[1]) / 1e3


def table(rows: Sequence[Row]) -> str:
    """Return the figures for a terminal."""
    header = [
        "submaps",
        "starts",
        *OUTCOMES,
        "in 4 s",
        "median",
        "start",
        "frame",
        "loads",
        "wait",
        "memory",
        "on disk",
        "begun",
    ]
    lines = [
        [str(row.submaps), str(row.starts)]
        + [f"{100 * row.outcomes[name] / max(row.starts, 1):.0f} %" for name in OUTCOMES]
        + [
            f"{100 * row.in_4_s:.0f} %",
            f"{row.median_error_cm:.1f} cm",
            f"{row.start_ms:.0f} ms",
            f"{row.frame_ms:.0f} ms",
            str(row.loads),
        ]
        + [f"{row.waited_ms:.0f} ms", f"{row.memory_mb:.0f} MB", f"{row.place_mb:.0f} MB"]
        + [
            f"{row.begun_right} right, {row.begun_wrong} wrong of {row.begun}, {row.begun_s:.1f} s"
            if row.begun
            else "-"
        ]
        for row in rows
    ]
    return format_table(lines, header=header)


if __name__ == "__main__":
    sys.exit(main())
