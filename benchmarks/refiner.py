# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the refiner's time, and of the time that tracking saves, against an earlier commit in the same run.

Stretches of a SOURCE are localized in turns by both versions: by this one, and by the other one (from a git
worktree, in a separate process), so that both see the same load of the machine. Times are wall time and, in
brackets, processor time, which a busy machine changes less. `refine` is the stage from features and a starting pose
to a pose with its covariance, for three references.

    python benchmarks/refiner.py 7scenes:DATA/7scenes/redkitchen --poses sfm --split blocks50:test --map MAP \
        --against HEAD~20 --json out/refiner.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import worktree

REPOSITORY = Path(__file__).resolve().parents[1]
STRETCHES = 4


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="as in `kfloc localize`")
    parser.add_argument("--poses", choices=("file", "sfm"), default="file")
    parser.add_argument("--split", metavar="NAME")
    parser.add_argument("--frames", metavar="RANGES")
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit to compare with")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--worker", metavar="MODE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    with worktree(args.against) as earlier:
        versions = {"now": (REPOSITORY, "plain"), "now, tracking": (REPOSITORY, "tracking")}
        if earlier is not None:
            versions["earlier"] = (earlier, "plain")
        workers = {name: start(args, root, mode) for name, (root, mode) in versions.items()}
        try:
            turns = run_in_turns(workers)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()
    rows = {name: summary(frames) for name, frames in turns.items()}
    for name, row in rows.items():
        print(line(name, row))
    content: dict[str, Any] = {"against": args.against, "map": str(args.map), "source": args.source, "rows": rows}
    if "earlier" in rows:
        content["refine_ratio"] = rows["now"]["refine_ms"] / rows["earlier"]["refine_ms"]
        print(f"refine: {content['refine_ratio']:.2f} of the time at {args.against}")
    content["tracking_ratio"] = rows["now, tracking"]["latency_ms"] / rows["now"]["latency_ms"]
    print(f"a frame with tracking: {content['tracking_ratio']:.2f} of the time without")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def start(args: argparse.Namespace, root: Path, mode: str) -> subprocess.Popen[str]:
    """Start a process that localizes one stretch for every line that it receives."""
    command = [sys.executable, str(Path(__file__).resolve()), args.source, "--map", str(Path(args.map).absolute())]
    command += ["--poses", args.poses, "--threads", str(args.threads), "--worker", mode]
    for option in ("split", "frames"):
        if getattr(args, option):
            command += [f"--{option}", getattr(args, option)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(args.threads)}
    return subprocess.Popen(
        command, cwd=Path.cwd(), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_in_turns(workers: dict[str, subprocess.Popen[str]]) -> dict[str, list[dict[str, float]]]:
    """Return the frames of every version, stretch after stretch."""
    frames: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for stretch in range(STRETCHES):
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(f"{stretch}\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise SystemExit(f"The version '{name}' ended without an answer; see above.")
            frames[name] += json.loads(answer)
    return frames


def work(args: argparse.Namespace) -> int:
    """Localize stretches on request; write one line of JSON each."""
    import torch

    import kfloc_ros
    from kfloc_ros.datasets import open_source
    from kfloc_ros.geometry.camera import ImageAdapter
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.localizer import Localizer
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.types import Frame

    found, wanted = Path(kfloc_ros.__file__).resolve().parents[1], Path(os.environ["PYTHONPATH"]).resolve()
    if found != wanted:
        raise SystemExit(f"The version in '{wanted}' was to be measured, but the one in '{found}' was imported.")
    torch.set_num_threads(args.threads)
    source = open_source(args.source, poses=args.poses, frames=args.frames, split=args.split, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    options = {"tracking": True} if args.worker == "tracking" else {}
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **options))
    adapter = ImageAdapter(source.camera, localizer.camera)
    refiner = localizer.refiner
    plain_align = refiner.align
    spent: list[float] = []

    def timed_align(*arguments: Any, **named: Any) -> Any:
        begin = time.process_time()
        result = plain_align(*arguments, **named)
        spent.append(1e3 * (time.process_time() - begin))
        return result

    refiner.align = timed_align  # type: ignore[method-assign]
    size = -(-len(source) // STRETCHES)
    for asked in sys.stdin:
        stretch = int(asked)
        rows = []
        for position in range(stretch * size, min((stretch + 1) * size, len(source))):
            frame = source[position]
            spent.clear()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            estimate = localizer.process(
                Frame(adapter(frame.image), adapter.target, frame.stamp_ns, frame.index, frame.name)
            ).estimate
            latency_ms = 1e3 * (time.perf_counter() - begin)
            row = {
                "latency_ms": latency_ms,
                "latency_cpu_ms": 1e3 * (time.process_time() - begin_cpu),
                "refine_ms": estimate.timings_ms.get("refine", float("nan")),
                "refine_cpu_ms": sum(spent),
                "tracked": float(getattr(estimate, "tracked", False)),
                "good": float("nan"),
            }
            if frame.T_map_camera is not None:
                row["good"] = float(good(estimate.T_map_camera, frame.T_map_camera))
            rows.append(row)
        print(json.dumps(rows), flush=True)
    return 0


def good(T: Any, truth: Any) -> bool:
    """Return true if a pose is within 5 cm and 5 degrees."""
    import numpy as np

    from kfloc_ros.geometry.lie import rotation_angle_deg

    if T is None:
        return False
    away_m = float(np.linalg.norm(T[:3, 3] - truth[:3, 3]))
    return away_m < 0.05 and rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]) < 5.0


def summary(frames: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return medians, and the shares of tracked and of good frames."""
    import numpy as np

    def median(key: str) -> float:
        return float(np.nanmedian([frame[key] for frame in frames]))

    names = ("latency_ms", "latency_cpu_ms", "refine_ms", "refine_cpu_ms")
    row = {name: median(name) for name in names}
    row["rate_hz"] = 1e3 / float(np.mean([frame["latency_ms"] for frame in frames]))
    row["rate_cpu_hz"] = 1e3 / float(np.mean([frame["latency_cpu_ms"] for frame in frames]))
    row["tracked"] = float(np.mean([frame["tracked"] for frame in frames]))
    row["recall_5cm_5deg"] = float(np.nanmean([frame["good"] for frame in frames]))
    row["frames"] = len(frames)
    return row


def line(name: str, row: dict[str, float]) -> str:
    return (
        f"{name:14s} {row['frames']:4.0f} frames  refine {row['refine_ms']:6.1f} ms [{row['refine_cpu_ms']:5.1f}]  "
        f"frame {row['latency_ms']:6.1f} ms [{row['latency_cpu_ms']:5.1f}]  "
        f"{row['rate_hz']:5.1f} Hz [{row['rate_cpu_hz']:5.1f}]  tracked {100 * row['tracked']:3.0f} %  "
        f"5 cm/5 deg {100 * row['recall_5cm_5deg']:5.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
