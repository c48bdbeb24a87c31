# SPDX-License-Identifier: Apache-2.0
"""Benchmark of maps built within several time budgets: RedKitchen, split blocks50.

Runs `kfloc map build --budget` and `kfloc localize` as a user would, and prints for each budget the time of the build,
its peak memory, the size of the map, and the accuracy of test frames in it. Exits with 1
if a build exceeded its budget, or a map is too large. The machine must be otherwise idle.

    python benchmarks/mapping.py --budgets 1min 2min 5min 10min --poses sfm --json out/mapping.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kfloc_ros.cli.arguments import duration_s
from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import describe_hardware

REPOSITORY = Path(__file__).resolve().parents[1]
BUDGETS = ("1min", "2min", "5min", "10min")
MAX_MAP_MB = 12.0
START_UP_S = 15.0
"""Time to load Python and PyTorch, added to every budget."""


@dataclass(frozen=True)
class Row:
    """Result of one budget."""

    budget_s: float
    build_s: float
    memory_gb: float
    map_mb: float
    recall_2cm_2deg: float
    recall_5cm_5deg: float
    coarse_5cm_5deg: float
    median_cm: float | None
    median_deg: float | None

    @property
    def passed(self) -> bool:
        """True if the build kept within its time and the map within its size."""
        return self.build_s <= self.budget_s + START_UP_S and self.map_mb <= MAX_MAP_MB


def main() -> int:
    """Build, localize, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=duration_s, default=[duration_s(b) for b in BUDGETS])
    parser.add_argument("--poses", choices=("sfm", "file"), default="sfm", help="ground truth")
    parser.add_argument("--no-depth", action="store_true", help="hide the depth images")
    parser.add_argument("--out", type=Path, default=Path("out/mapping"), metavar="DIR", help="folder for results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    data = Path(os.environ.get("KFLOC_DATA", REPOSITORY.parent / "shared" / "data")) / "7scenes" / "redkitchen"
    if not data.is_dir():
        print(f"There is no '{data}'; set KFLOC_DATA to the folder that holds 7scenes/redkitchen.", file=sys.stderr)
        return 2
    source = [f"7scenes:{data}", "--poses", args.poses]
    options = ["--no-depth"] if args.no_depth else []
    rows = [measure(source, budget, options, args.out / f"{budget:.0f}s_{args.poses}") for budget in args.budgets]
    header = ["budget", "build", "memory", "map", "2 cm/2 deg", "5 cm/5 deg", "median", "", "coarse 5/5", ""]
    print(format_table([cells(row) for row in rows], header=header))
    hardware = describe_hardware()
    print(f"\nHardware: {', '.join(f'{key} {value}' for key, value in hardware.items() if value is not None)}")
    if args.json is not None:
        content = {"split": "blocks50", "poses": args.poses, "depth": not args.no_depth, "hardware": hardware}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return 0 if all(row.passed for row in rows) else 1


def measure(source: list[str], budget_s: float, options: list[str], out: Path) -> Row:
    """Build within a time and localize."""
    scene_map = out / "map"
    start = time.monotonic()
    budget = ["--budget", f"{budget_s:g}s", "--out", str(scene_map), "--force"]
    memory_gb = kfloc("map", "build", *source, "--split", "blocks50:train", *options, *budget)
    build_s = time.monotonic() - start
    kfloc("localize", *source, "--force", "--split", "blocks50:test", "--map", str(scene_map), "--out", str(out))
    summary = json.loads((out / "summary.json").read_text())
    metres = summary["median_translation_m"]
    return Row(
        budget_s,
        build_s,
        memory_gb,
        sum(file.stat().st_size for file in scene_map.iterdir()) / 1e6,
        summary["recall"]["2cm_2deg"],
        summary["recall"]["5cm_5deg"],
        summary["coarse"]["recall"]["5cm_5deg"],
        None if metres is None else 100 * metres,
        summary["median_rotation_deg"],
    )


def kfloc(*arguments: str) -> float:
    """Run a command as a user would; return the peak memory of all commands so far, in GB."""
    print(f"$ kfloc {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kfloc_ros.cli", *arguments], check=True, stdout=sys.stderr)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    return [
        f"{row.budget_s:.0f} s",
        f"{row.build_s:.0f} s",
        f"{row.memory_gb:.1f} GB",
        f"{row.map_mb:.1f} MB",
        f"{100 * row.recall_2cm_2deg:.1f} %",
        f"{100 * row.recall_5cm_5deg:.1f} %",
        "-" if row.median_cm is None else f"{row.median_cm:.2f} cm",
        "-" if row.median_deg is None else f"{row.median_deg:.2f} deg",
        f"{100 * row.coarse_5cm_5deg:.1f} %",
        "pass" if row.passed else "FAIL",
    ]


if __name__ == "__main__":
    sys.exit(main())
