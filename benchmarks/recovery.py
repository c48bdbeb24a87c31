# SPDX-License-Identifier: Apache-2.0
"""Benchmark of recovery from disturbances: camera covered, no images for 2 s, moved elsewhere, or another room.

It reports the time to recover, the states meanwhile, and the share of wrong poses with state TRACKING. A bag is made of
pieces of a SOURCE with the disturbances between them. It is played offline (every frame, repeatable) or, with --live,
over DDS to the live nodes at its recorded rate.

    python benchmarks/recovery.py 7scenes:DATA/7scenes/redkitchen --poses sfm --split blocks50:test --map MAP
    python benchmarks/recovery.py sim:localize --map demo_room --live --events 3 --json out/recovery.json

Exit code 1 if a disturbance was not recovered from, or more than --max-false-ok of the frames were false OK.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from kfloc_ros.bags.writer import write_bag
from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import describe_hardware
from kfloc_ros.errors import KflocError
from kfloc_ros.evaluation.summary import finite
from kfloc_ros.replay import ReplayConfig, run_offline, run_replay
from studies.disturbed import DisturbancePlan, DisturbedSource
from studies.recovery import OUTCOMES, DisturbedRun, evaluate_disturbed, read_answers


def main() -> int:
    """Run the benchmark and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--live", action="store_true", help="over DDS to the live nodes, instead of offline")
    parser.add_argument("--events", type=int, default=5, help="disturbances of each kind (default: 5)")
    parser.add_argument("--rate-hz", type=float, default=10.0, help="frames a second of the bag (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/recovery"), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--max-false-ok", type=float, default=0.01, help="share allowed (default: 0.01)")
    args = parser.parse_args()
    try:
        source = open_source_from(args, depth=False)
        plan = DisturbancePlan(events_per_kind=args.events, rate_hz=args.rate_hz, seed=args.seed)
        disturbed = DisturbedSource(source, plan)
        bag = args.out / "bag"
        print(f"{len(disturbed)} frames, {len(disturbed.events)} disturbances.", file=sys.stderr)
        write_bag(disturbed, bag, depth=False, force=bag.exists())
        config = ReplayConfig(bag=bag, map=args.map, out=args.out / ("live" if args.live else "offline"))
        run = run_replay if args.live else run_offline
        run(config, command=" ".join(sys.argv))
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    result = evaluate_disturbed(disturbed.slots, disturbed.events, read_answers(config.out / "frames.csv"))
    print(table(result))
    if args.json is not None:
        content = {
            "source": args.source, "split": args.split, "poses": args.poses, "map": args.map, "live": args.live,
            "plan": {"events": args.events, "rate_hz": args.rate_hz, "seed": args.seed},
            "hardware": describe_hardware(), **asdict(result),
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")
    recovered = all(kind.recovered == kind.events for kind in result.kinds.values())
    return int(not recovered or not result.false_ok <= args.max_false_ok)


def table(result: DisturbedRun) -> str:
    """Return the figures as tables for a terminal."""
    rows = [
        (
            name,
            f"{kind.recovered} of {kind.events}",
            *(f"{kind.seconds[key]:.2f}" for key in ("p50", "p95")),
            *(f"{kind.images[key]:.0f}" for key in ("p50", "p95")),
            str(kind.false_ok),
        )
        for name, kind in result.kinds.items()
    ]
    header = ("disturbance", "recovered", "p50 [s]", "p95 [s]", "images p50", "p95", "false OK")
    parts = [format_table(rows, header=header)]
    for title, states in (("images of the map", result.good_images), ("other images", result.replaced_images)):
        counts = [(state, *(str(row.get(name, 0)) for name in OUTCOMES)) for state, row in states.items()]
        parts += ["", format_table(counts or [("none", "", "", "", "")], header=(title, *OUTCOMES))]
    share = f"{100 * result.false_ok:.2f} %"
    return "\n".join([*parts, "", f"False OK: {result.false_ok_frames} of {result.processed} processed, {share}."])


if __name__ == "__main__":
    raise SystemExit(main())
