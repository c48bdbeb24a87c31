# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the project's figures on 7-Scenes RedKitchen, split blocks50, with both ground truths.

Runs the commands a user would run, from the map to live nodes, prints one table for each set of poses with its limits,
and exits with 1 if a limit is missed. Nothing is downloaded; the data is in the folder KFLOC_DATA
(default ../shared/data). About 40 minutes on two cores with everything.

    python benchmarks/redkitchen.py --json out/redkitchen.json
    python benchmarks/redkitchen.py --poses sfm --maps out/redkitchen/maps --steps localize replay
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import describe_hardware

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = ("build", "localize", "no-filter", "no-refine", "replay", "separate")
TRUTHS = {"sfm": "SfM poses", "file": "pose files (D-SLAM)"}

LIMITS: dict[str, dict[str, float]] = {
    "sfm": {"2cm_2deg": 0.94, "5cm_5deg": 0.99, "median_cm": 0.8, "median_deg": 0.25, "coarse_5cm_5deg": 0.88},
    "file": {"5cm_5deg": 0.96, "median_cm": 1.6, "median_deg": 1.35, "coarse_5cm_5deg": 0.70},
}
MAX_BUILD_MIN, MAX_MAP_MB, MIN_RATE_HZ, MAX_LATENCY_P95_MS = 5.0, 40.0, 6.0, 400.0
MIN_PROCESSED = 0.9
"""Smallest share of the images at 30 Hz that one process localizes on two idle cores."""
SAME_RECALL, SAME_MEDIAN = 0.02, 1.1
"""Limits of a replay's accuracy: on the same frames as offline, its 5 cm/5 deg recall may be lower by at most this
much, or by one frame, and its median error larger by at most this factor. DDS changes which frames are dropped, and
with them the filter's history."""


@dataclass(frozen=True)
class Row:
    """Figure with its limit; ``limit`` is empty without one."""

    name: str
    value: float | None
    text: str
    limit: str = ""
    passed: bool | None = None


def main() -> int:
    """Run the steps asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poses", nargs="+", choices=tuple(TRUTHS), default=list(TRUTHS), help="ground truths")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what to run")
    parser.add_argument("--maps", type=Path, metavar="DIR", help="use (or put) the maps here: DIR/sfm, DIR/file")
    parser.add_argument("--out", type=Path, default=Path("out/redkitchen"), metavar="DIR", help="folder for results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows as JSON")
    args = parser.parse_args()
    data = Path(os.environ.get("KFLOC_DATA", REPOSITORY.parent / "shared" / "data")) / "7scenes" / "redkitchen"
    if not data.is_dir():
        print(f"There is no '{data}'; set KFLOC_DATA to the folder that holds 7scenes/redkitchen.", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    hardware = describe_hardware()
    tables = {}
    for poses in args.poses:
        bench = Benchmark(data, poses, (args.maps or args.out / "maps") / poses, args.out / poses)
        tables[poses] = bench.run(args.steps)
        print(f"\nRedKitchen seq-01, split blocks50, truth: {TRUTHS[poses]}\n{format_rows(tables[poses])}", flush=True)
    print(f"\nHardware: {', '.join(f'{key} {value}' for key, value in hardware.items() if value is not None)}")
    if args.json is not None:
        rows = {poses: [asdict(row) for row in table] for poses, table in tables.items()}
        content = {"split": "blocks50", "commit": commit(), "hardware": hardware, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    failed = [row for table in tables.values() for row in table if row.passed is False]
    return 1 if failed else 0


class Benchmark:
    """All steps with one ground truth."""

    def __init__(self, data: Path, poses: str, map_folder: Path, out: Path) -> None:
        self._poses, self._map, self._out = poses, map_folder, out
        self._source = [f"7scenes:{data}", "--poses", poses]
        self._test = [*self._source, "--split", "blocks50:test"]
        self._limits = LIMITS[poses]

    def run(self, steps: Sequence[str]) -> list[Row]:
        """Run the steps in order; a map is built on request, or if there is none."""
        rows: list[Row] = []
        if "build" in steps or not (self._map / "map.yaml").is_file():
            rows += self._build()
        runs: dict[str, Callable[[], list[Row]]] = {
            "localize": self._localize,
            "no-filter": lambda: self._variant("no-filter", "filter off"),
            "no-refine": lambda: self._variant("no-refine", "refinement off"),
            "replay": lambda: self._replay("replay", []),
            "separate": lambda: self._replay("separate", ["--separate"]),
        }
        for step, run in runs.items():
            if step in steps:
                rows += run()
        return rows

    def _build(self) -> list[Row]:
        start = time.monotonic()
        kfloc("map", "build", *self._source, "--split", "blocks50:train", "--out", str(self._map), "--force")
        minutes = (time.monotonic() - start) / 60
        megabytes = sum(file.stat().st_size for file in self._map.rglob("*") if file.is_file()) / 1e6
        return [
            at_most("map build", minutes, MAX_BUILD_MIN, "min"),
            at_most("map size", megabytes, MAX_MAP_MB, "MB"),
        ]

    def _localize(self) -> list[Row]:
        summary = self._offline("localize")
        limits = self._limits
        position_cm = 100 * number(summary, "median_translation_m")
        rotation_deg = number(summary, "median_rotation_deg")
        rows = [
            share(f"full pipeline, {label(name)}", summary["recall"][name], limits.get(name))
            for name in ("1cm_1deg", "2cm_2deg", "5cm_5deg", "25cm_2deg")
        ]
        stages = ", ".join(f"{stage} {value:.0f}" for stage, value in summary["stage_ms"].items())
        return [
            *rows,
            at_most("full pipeline, median position", position_cm, limits["median_cm"], "cm"),
            at_most("full pipeline, median rotation", rotation_deg, limits["median_deg"], "deg"),
            share("coarse pose, 5 cm/5 deg", summary["coarse"]["recall"]["5cm_5deg"], limits["coarse_5cm_5deg"]),
            *coarse_medians("coarse pose", summary),
            at_least("rate offline", number(summary, "throughput_hz"), MIN_RATE_HZ, "Hz"),
            Row("stages, median ms", None, stages),
        ]

    def _variant(self, option: str, name: str) -> list[Row]:
        summary = self._offline(option, f"--{option}")
        rows = [
            share(f"{name}, 5 cm/5 deg", summary["recall"]["5cm_5deg"], None),
            share(f"{name}, 2 cm/2 deg", summary["recall"]["2cm_2deg"], None),
            plain(f"{name}, median position", 100 * number(summary, "median_translation_m"), "cm"),
            plain(f"{name}, median rotation", number(summary, "median_rotation_deg"), "deg"),
        ]
        if option == "no-filter":
            rows.append(share(f"{name}, coarse pose, 5 cm/5 deg", summary["coarse"]["recall"]["5cm_5deg"], None))
            rows += coarse_medians(f"{name}, coarse pose", summary)
        return [*rows, plain(f"{name}, rate", number(summary, "throughput_hz"), "Hz")]

    def _offline(self, name: str, *options: str) -> dict[str, Any]:
        out = self._out / name
        kfloc("localize", *self._test, "--force", "--map", str(self._map), "--out", str(out), *options)
        return read_summary(out)

    def _replay(self, name: str, options: list[str]) -> list[Row]:
        bag, out = self._out / "test_bag", self._out / name
        if not (bag / "metadata.yaml").is_file():
            kfloc("bag", "make", *self._test, "--no-depth", "--out", str(bag))
        kfloc("replay", str(bag), "--force", "--map", str(self._map), "--out", str(out), *options)
        if not (self._out / "localize" / "frames.csv").is_file():
            self._offline("localize")
        summary = read_summary(out)
        extra = summary["options"]
        left, exits = extra["processes_left"], extra["node_exits"].values()
        clean = left == 0 and all(ending == {"code": 0, "forced": ""} for ending in exits)
        limit = MIN_PROCESSED if name == "replay" else None
        counts = ", ".join(f"{key} {summary[key]}" for key in ("received", "processed", "dropped"))
        return [
            *same_frames(name, self._out / "localize" / "frames.csv", out / "frames.csv"),
            share(f"{name}, 5 cm/5 deg of processed", summary["recall"]["5cm_5deg"], None),
            at_most(f"{name}, latency p95", number(summary["latency_ms"], "p95"), MAX_LATENCY_P95_MS, "ms"),
            share(f"{name}, processed", summary["processed"] / max(extra["played"], 1), limit),
            plain(f"{name}, latency p50", number(summary["latency_ms"], "p50"), "ms"),
            Row(f"{name}, frames", None, f"played {extra['played']}, {counts}, lost {extra['lost_in_transport']}"),
            Row(f"{name}, processes left", left, f"{left}" + (", all ended by SIGINT" if clean else ""), "none", clean),
        ]


def same_frames(name: str, offline_csv: Path, replay_csv: Path) -> list[Row]:
    """Compare the frames that the nodes processed with the same frames offline."""
    offline = read_errors(offline_csv)
    pairs = [(offline[stamp], error) for stamp, error in read_errors(replay_csv).items() if stamp in offline]
    if not pairs:
        return [Row(f"{name}, accuracy as offline", None, "no frame in common", "same", False)]
    recalls = [sum(t < 0.05 and r < 5.0 for t, r in errors) / len(pairs) for errors in zip(*pairs, strict=True)]
    medians = [sorted(t for t, _ in errors)[len(pairs) // 2] for errors in zip(*pairs, strict=True)]
    text = (
        f"{100 * recalls[1]:.1f} % and {100 * medians[1]:.2f} cm, offline {100 * recalls[0]:.1f} % and "
        f"{100 * medians[0]:.2f} cm ({len(pairs)} frames)"
    )
    allowed = max(SAME_RECALL, 1.001 / len(pairs))
    passed = recalls[1] >= recalls[0] - allowed and medians[1] <= medians[0] * SAME_MEDIAN
    return [Row(f"{name}, accuracy as offline", recalls[1], text, "same", passed)]


def read_errors(path: Path) -> dict[str, tuple[float, float]]:
    """Return position (m) and rotation (deg) errors of the processed frames by stamp; no pose is a failure."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["processed"] == "1"]
    return {
        row["stamp_ns"]: (float(row["translation_error_m"] or math.inf), float(row["rotation_error_deg"] or 180.0))
        for row in rows
    }


def kfloc(*arguments: str) -> None:
    """Run a kfloc command as a user would; its output goes to standard error, the table to standard output."""
    print(f"$ kfloc {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kfloc_ros.cli", *arguments], check=True, stdout=sys.stderr, cwd=Path.cwd())


def read_summary(out: Path) -> dict[str, Any]:
    content = json.loads((out / "summary.json").read_text())
    assert isinstance(content, dict)
    return content


def commit() -> str:
    """Return the version measured, with ``-dirty`` for changed files."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def number(summary: dict[str, Any], key: str) -> float:
    """Return a figure, infinite for null (half of the frames failed)."""
    return math.inf if summary[key] is None else float(summary[key])


def label(name: str) -> str:
    return name.replace("cm_", " cm/").replace("deg", " deg")


def coarse_medians(name: str, summary: dict[str, Any]) -> list[Row]:
    coarse = summary["coarse"]
    return [
        plain(f"{name}, median position", 100 * number(coarse, "median_translation_m"), "cm"),
        plain(f"{name}, median rotation", number(coarse, "median_rotation_deg"), "deg"),
    ]


def plain(name: str, value: float, unit: str) -> Row:
    return Row(name, value if math.isfinite(value) else None, f"{value:.2f} {unit}")


def at_most(name: str, value: float, limit: float, unit: str) -> Row:
    return _limited(name, value, limit, unit, "<=", operator.le)


def at_least(name: str, value: float, limit: float, unit: str) -> Row:
    return _limited(name, value, limit, unit, ">=", operator.ge)


def share(name: str, value: float | None, limit: float | None) -> Row:
    percent = math.nan if value is None else 100 * value
    text = "-" if value is None else f"{percent:.1f} %"
    if limit is None:
        return Row(name, value, text)
    return Row(name, value, text, f">= {100 * limit:g} %", value is not None and value >= limit)


def _limited(name: str, value: float, limit: float, unit: str, sign: str, holds: Callable[[float, float], bool]) -> Row:
    passed = math.isfinite(value) and holds(value, limit)
    return Row(name, value if math.isfinite(value) else None, f"{value:.2f} {unit}", f"{sign} {limit:g} {unit}", passed)


def format_rows(rows: Sequence[Row]) -> str:
    """Return the table for the terminal."""
    verdict = {True: "pass", False: "FAIL", None: ""}
    lines = [(row.name, row.text, row.limit, verdict[row.passed]) for row in rows]
    return format_table(lines, header=("", "measured", "must reach", ""))


if __name__ == "__main__":
    sys.exit(main())
