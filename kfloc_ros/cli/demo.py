# SPDX-License-Identifier: Apache-2.0
"""``kfloc demo``: the whole pipeline on a rendered room, with the commands that a user would type."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = """\
Render a furnished room along two hand-held walks into two rosbags, build a map from the first walk, and localize the
second one with the live ROS 2 nodes, played over DDS in real time. Prints accuracy and rate, and lists the pictures.
Nothing is downloaded.

The second walk follows another path at another height, at dusk, and one lamp is switched off on the way.
"""

EPILOG = """\
examples:
  kfloc demo                       # the whole room, about five minutes on two cores
  kfloc demo --quick               # a part of it, less than two minutes
  kfloc demo --separate --out D    # camera, filter and refiner in separate processes; results in D
"""

PICTURES = {
    "room.png": "images of both walks",
    "live/trajectory.png": "true and estimated trajectory, from above",
    "live/error.png": "error over time, with the error predicted by the covariance",
    "live/recall.png": "share of frames within x cm and x degrees",
    "live/latency.png": "time per stage",
}
MIN_RECALL = 0.5
"""Share of processed frames within 5 cm and 5 degrees below which the demo fails."""


@dataclass(frozen=True)
class Plan:
    """Settings that differ between the whole demo and the quick one."""

    mapping: str
    localizing: str
    train_seconds: int
    takes: str


FULL = Plan("sim:map", "sim:localize", 120, "about five minutes on two cores")
QUICK = Plan("sim:map-quick", "sim:localize-quick", 20, "less than two minutes on two cores")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``demo`` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole pipeline on a rendered room",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="only a part of the room, and a short training")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="folder (default: demo_out)")
    parser.add_argument("--separate", action="store_true", help="run camera, filter and refiner in separate processes")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc demo``; return 0 if the camera was localized, 1 if a step failed or recall is below
    ``MIN_RECALL``.
    """
    plan = QUICK if args.quick else FULL
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    print(f"The whole pipeline on a rendered room, {plan.takes}. All files are written to '{out}'.")
    bags = out / "map_bag", out / "localize_bag"
    make = [["bag", "make", plan.mapping, "--out", str(bags[0]), "--force"]]
    make.append(["bag", "make", plan.localizing, "--out", str(bags[1]), "--force", "--no-depth"])
    build = ["map", "build", f"bag:{bags[0]}", "--out", str(out / "map"), "--name", "demo room", "--force"]
    build += ["--train-seconds", str(plan.train_seconds)]
    replay = ["replay", str(bags[1]), "--map", str(out / "map"), "--out", str(out / "live"), "--force"]
    replay += ["--separate"] if args.separate else []

    with _step(1, "Render two walks through the room into two rosbags"):
        code = _together(make)
        if code == 0:
            _contact_sheet(bags, out / "room.png")
    if code == 0:
        with _step(2, "Build a map from the first walk"):
            code = _kfloc(build)
    if code == 0:
        with _step(3, "Localize the second walk with the live nodes"):
            code = _kfloc(replay)
    if code != 0:
        return code
    print(f"\nPictures in '{out}':")
    for name, meaning in PICTURES.items():
        if (out / name).exists():
            print(f"  {name:<20} {meaning}")
    print(f"Done in {_minutes(time.perf_counter() - start)}.")
    return _verdict(out / "live" / "summary.json")


def _kfloc(arguments: Sequence[str]) -> int:
    """Print a command, run it in this process, and return its exit code."""
    from kfloc_ros.cli.main import main

    print(f"$ kfloc {' '.join(arguments)}", flush=True)
    return main(arguments)


def _together(commands: Sequence[Sequence[str]]) -> int:
    """Run the first command in this process and the others in one process each; return the first non-zero exit code.

    Each command renders on one core; in one process they would share that core.
    """
    launcher = "import sys; from kfloc_ros.cli.main import main; sys.exit(main(sys.argv[1:]))"
    beside = []
    try:
        for command in commands[1:]:
            print(f"$ kfloc {' '.join(command)} &", flush=True)
            beside.append(subprocess.Popen([sys.executable, "-c", launcher, *command, "--quiet"]))
        codes = [_kfloc(commands[0])]
        codes += [process.wait() for process in beside] if codes[0] == 0 else []
    finally:
        for process in beside:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    return next((abs(code) for code in codes if code), 0)


def _contact_sheet(bags: Sequence[Path], path: Path) -> None:
    """Write a picture of four images per bag, one row per bag."""
    import cv2
    import numpy as np

    from kfloc_ros.datasets.ros_bag import RosBag
    from kfloc_ros.files import replacing

    rows = []
    for bag in bags:
        source = RosBag(bag, {}, depth=False)
        places = np.linspace(0, len(source) - 1, 5).astype(int)[:4]
        rows.append(np.concatenate([cv2.resize(source[int(i)].image, (480, 360)) for i in places], axis=1))
    done, data = cv2.imencode(".png", np.concatenate(rows)[..., ::-1])
    if done:
        with replacing(path) as partial:
            partial.write_bytes(data.tobytes())


def _verdict(summary_path: Path) -> int:
    """Return 0 if the recall is sufficient, else 1 with a message."""
    summary = json.loads(summary_path.read_text())
    share = float(summary["recall"]["5cm_5deg"] or 0.0)
    if share < MIN_RECALL:
        print(
            f"Only {share:.0%} of the processed frames are within 5 cm and 5 degrees, which is too few: see "
            f"'{summary_path.with_name('report.md')}' and the nodes' logs beside it.",
            file=sys.stderr,
        )
        return 1
    return 0


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    """Print the title of a step, and its duration at the end."""
    print(f"\n[{number}/3] {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"[{number}/3] took {_minutes(time.perf_counter() - start)}", flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
