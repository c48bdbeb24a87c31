# SPDX-License-Identifier: Apache-2.0
"""Benchmark of a frame: passes of the float32 backbone, stages, ratios, memory and accuracy, in one run.

Frames are localized by this version and by an earlier commit (from a git worktree) one after the other,
each with and without tracking, on each number of threads, in processes of their own. Where the load of the machine
varies, ratios do not: a ratio is the median frame over the median float32 pass of the backbone among the same frames.

    python benchmarks/speed.py 7scenes:DIR --poses sfm --split blocks50:test --map MAP --against COMMIT \
        --json out/speed.json
    python benchmarks/speed.py sim:localize --map demo_room --device cuda --threads 1
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BENCH = REPOSITORY / "kfloc_ros" / "cli" / "bench.py"


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="as in `kfloc localize`")
    parser.add_argument("--poses", choices=("file", "sfm"), default="file")
    parser.add_argument("--split", metavar="NAME")
    parser.add_argument("--frames", metavar="RANGES")
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="largest number of frames")
    parser.add_argument("--against", metavar="COMMIT", help="an earlier commit to compare with")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--runtime", default="auto", help="run-time of this version's backbone (default: auto)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--worker", metavar="MODE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    bench = load_bench()
    from kfloc_ros.device import describe_hardware

    rows: dict[str, Any] = {}
    with worktree(args.against) as earlier:
        versions = {"now": REPOSITORY} | ({} if earlier is None else {args.against: earlier})
        for threads in args.threads:
            for mode in ("default", "tracking"):
                for name, root in versions.items():
                    rows[f"{name}, {threads} threads, {mode}"] = measured_by(args, root, threads, mode)
    hardware = {**describe_hardware(args.device), "flags": bench.processor_flags()}
    print(f"{hardware['cpu']}, {hardware['cores']} cores; {hardware['flags']}; torch {hardware['torch']}\n")
    print(bench.table(rows))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": sys.argv, "hardware": hardware, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def load_bench() -> Any:
    """Return this version's ``kfloc_ros/cli/bench.py``, which measures every version alike."""
    spec = importlib.util.spec_from_file_location("speed_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed_bench"] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def worktree(commit: str | None) -> Iterator[Path | None]:
    """Yield the repository at a commit, in a temporary folder."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="kfloc_speed_") as folder:
        path = Path(folder) / "earlier"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def measured_by(args: argparse.Namespace, root: Path, threads: int, mode: str) -> dict[str, Any]:
    """Return the figures of one version, measured in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), args.source, "--map", args.map, "--poses", args.poses]
    command += ["--count", str(args.count), "--threads", str(threads), "--device", args.device]
    command += ["--runtime", args.runtime, "--worker", mode]
    for option in ("split", "frames"):
        if getattr(args, option):
            command += [f"--{option}", getattr(args, option)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(args: argparse.Namespace) -> int:
    """Localize all frames with the version in PYTHONPATH; print the figures as a line of JSON."""
    from dataclasses import asdict, fields

    import torch

    import kfloc_ros
    from kfloc_ros.datasets import open_source
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.localizer import Localizer
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap

    found, wanted = Path(kfloc_ros.__file__).resolve().parents[1], Path(os.environ["PYTHONPATH"]).resolve()
    if found != wanted:
        raise SystemExit(f"The version in '{wanted}' was to be measured, but the one in '{found}' was imported.")
    torch.set_num_threads(args.threads[0])
    bench = load_bench()
    source = open_source(args.source, poses=args.poses, frames=args.frames, split=args.split, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    options: dict[str, Any] = {"device": args.device, "tracking": args.worker == "tracking"}
    if "runtime" in {item.name for item in fields(LocalizerConfig)}:
        options["runtime"] = args.runtime
    localizer = Localizer(scene_map, LocalizerConfig(**options))
    frames = bench.adapted_frames(source, scene_map, args.count)
    measured = asdict(bench.measure_frames(localizer, frames, args.device))
    print(json.dumps(measured | {"runtime": getattr(localizer, "runtime_note", "")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
