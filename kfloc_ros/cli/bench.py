# SPDX-License-Identifier: Apache-2.0
"""``kfloc bench``: how fast this machine localizes, as a text to post."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.types import Frame

DESCRIPTION = """\
Localize frames of SOURCE (default: the demo's second walk, rendered) in a map (default: the shipped one), with one
thread and with two, with and without tracking, and print times, accuracy, processor and versions. Times are also told
in passes of the float32 backbone, which compares processors. The choice of the run-time is measured anew.

Nothing else should run meanwhile.
"""

EPILOG = """\
examples:
  kfloc bench                                # about a minute
  kfloc bench --json bench.json --threads 1
  kfloc bench 7scenes:DIR --split blocks50:test --map maps/kitchen
"""

FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
)
"""Instructions that decide how fast networks are, as /proc/cpuinfo names them."""
WITHIN = ((1.0, 1.0), (2.0, 2.0), (5.0, 5.0))
"""Errors, cm and degrees, within which frames are counted."""
BACKBONE_PERIOD = 4
"""Frames between two passes of the float32 backbone, which are measured among the frames, under the same load."""


@dataclass(frozen=True)
class Measured:
    """Times and errors of frames localized one after another."""

    frames: int
    backbone_float32_ms: float
    """Median time of one float32 pass of the backbone in torch, on the same threads."""
    frame_ms: float
    """Median time from the image of the map's camera to the pose."""
    frame_p95_ms: float
    ratio: float
    """Median frame over one float32 pass."""
    ratio_p95: float
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Mean time of each stage."""
    within_percent: dict[str, float] = field(default_factory=dict)
    median_cm: float | None = None
    median_deg: float | None = None
    memory_mib: float = 0.0
    """Largest resident memory of the process so far."""
    processor_ms: float = 0.0
    """Mean processor time of a frame, all threads."""
    processor_ratio: float = 0.0
    """The same over that of a float32 pass; other work on the machine changes it less."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bench`` subcommand."""
    from kfloc_ros.cli.arguments import add_source_arguments

    parser = subparsers.add_parser(
        "bench",
        help="measure how fast this machine localizes",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser, required=False)
    parser.add_argument("--map", default="demo_room", metavar="MAP", help="map folder or name (default: demo_room)")
    parser.add_argument("--count", type=int, default=60, metavar="N", help="number of frames (default: 60)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc bench``; return 0."""
    from kfloc_ros.cli.arguments import need_camera, open_source_from
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap

    if args.count < 2 or min(args.threads) < 1:
        raise ConfigError("--count must be at least 2, and --threads at least 1.")
    args.source = args.source or "sim:localize"
    source = open_source_from(args, depth=False)
    need_camera(source)
    scene_map = SceneMap.load(resolve_map(args.map))
    print(f"Reading {min(args.count, len(source))} frames of {args.source} ...", file=sys.stderr)
    frames = adapted_frames(source, scene_map, args.count)
    report = bench(scene_map, frames, args.threads, args.device)
    report |= {"source": args.source, "map": scene_map.name}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(as_text(report))
    return 0


def adapted_frames(source: Iterable[Frame], scene_map: SceneMap, count: int) -> list[Frame]:
    """Return at most ``count`` frames with images of the map's camera."""
    from dataclasses import replace

    from kfloc_ros.geometry.camera import ImageAdapter

    frames: list[Frame] = []
    for frame in source:
        adapter = ImageAdapter(frame.camera, scene_map.camera)
        frames.append(replace(frame, image=adapter(frame.image), camera=adapter.target, source_camera=frame.camera))
        if len(frames) >= count:
            break
    return frames


def bench(scene_map: SceneMap, frames: Sequence[Frame], threads: Sequence[int], device: str) -> dict[str, Any]:
    """Return versions, processor, and :class:`Measured` of every number of threads, with and without tracking."""
    import torch

    from kfloc_ros import __version__
    from kfloc_ros.device import choose_device, describe_hardware
    from kfloc_ros.features import runtime
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.localizer import Localizer

    target = str(choose_device(device))
    runtime.forget()
    rows: dict[str, Any] = {}
    for count in threads:
        torch.set_num_threads(count)
        for name, tracking in (("default", False), ("tracking", True)):
            localizer = Localizer(scene_map, LocalizerConfig(device=target, tracking=tracking))
            print(f"{count} threads, {name} ...", file=sys.stderr)
            measured = asdict(measure_frames(localizer, frames, target))
            rows[f"{count} threads, {name}"] = measured | {"runtime": localizer.runtime_note}
    return {
        "version": __version__,
        "hardware": {**describe_hardware(target), "flags": processor_flags()},
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }


def measure_frames(localizer: Any, frames: Sequence[Frame], device: str) -> Measured:
    """Localize frames one after another, with passes of the float32 backbone in between; the first frame warms up.

    ``benchmarks/speed.py`` also calls this with the localizers of earlier versions.
    """
    import numpy as np
    import torch

    from kfloc_ros.features.backbone import Backbone
    from kfloc_ros.geometry.lie import rotation_angle_deg

    backbone = Backbone(device=device)

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    for frame in frames[:2]:
        backbone.extract(frame.image)
        localizer.process(frame)
    localizer.reset("the measurement starts")
    passes, totals, processor, pass_processor = [], [], [], []
    stages: dict[str, float] = {}
    errors: list[tuple[float, float]] = []
    for number, frame in enumerate(frames):
        if number % BACKBONE_PERIOD == 0:
            synchronize()
            start, busy = time.perf_counter(), time.process_time()
            backbone.extract(frame.image)
            synchronize()
            passes.append(1e3 * (time.perf_counter() - start))
            pass_processor.append(1e3 * (time.process_time() - busy))
        start, busy = time.perf_counter(), time.process_time()
        estimate = localizer.process(frame).estimate
        synchronize()
        totals.append(1e3 * (time.perf_counter() - start))
        processor.append(1e3 * (time.process_time() - busy))
        for stage, ms in estimate.timings_ms.items():
            stages[stage] = stages.get(stage, 0.0) + ms
        if frame.T_map_camera is not None:
            T = estimate.T_map_camera
            difference = None if T is None else np.linalg.inv(frame.T_map_camera) @ T
            if difference is None:
                errors.append((float("inf"), float("inf")))
            else:
                errors.append((100 * float(np.linalg.norm(difference[:3, 3])), rotation_angle_deg(difference[:3, :3])))
    one, frame_ms, p95 = statistics.median(passes), statistics.median(totals), float(np.percentile(totals, 95))
    medians = [statistics.median(values) for values in zip(*errors, strict=True)] if errors else [None, None]
    return Measured(
        frames=len(frames),
        backbone_float32_ms=one,
        frame_ms=frame_ms,
        frame_p95_ms=p95,
        ratio=frame_ms / one,
        ratio_p95=p95 / one,
        stages_ms={stage: ms / len(frames) for stage, ms in stages.items()},
        within_percent={
            f"{cm:g} cm, {deg:g} deg": 100 * sum(a < cm and b < deg for a, b in errors) / len(errors)
            for cm, deg in WITHIN
            if errors
        },
        median_cm=medians[0],
        median_deg=medians[1],
        memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        processor_ms=statistics.mean(processor),
        processor_ratio=statistics.mean(processor) / statistics.mean(pass_processor),
    )


def processor_flags() -> str:
    """Return the instructions among ``FLAGS`` that the processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    words = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    return " ".join(flag for flag in FLAGS if flag in words)


def as_text(report: dict[str, Any]) -> str:
    """Return the figures as a Markdown text to post."""
    hardware, rows = report["hardware"], report["rows"]
    lines = [
        f"kfloc bench, version {report['version']}, {report['date']}: {report['source']} in map '{report['map']}'",
        "",
        f"- processor: {hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB; {hardware['flags']}",
        *([f"- GPU: {hardware['gpu']}"] if hardware["gpu"] else []),
        f"- {hardware['system']}, Python {hardware['python']}, torch {hardware['torch']}",
        *(
            f"- backbone, {name}: {row['runtime']}"
            for name, row in rows.items()
            if "default" in name and row["runtime"]
        ),
        "",
        table(rows),
    ]
    return "\n".join(lines)


def table(rows: dict[str, Any]) -> str:
    """Return the figures of several runs as a Markdown table."""
    head = ["run", "float32 pass, ms", "frame, ms", "p95, ms", "processor, ms"]
    head += ["frame / pass", "p95 / pass", "processor / pass"]
    first = next(iter(rows.values()))
    head += ["median, cm", "median, deg", *(f"{name}, %" for name in first["within_percent"])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        times = [row[key] for key in ("backbone_float32_ms", "frame_ms", "frame_p95_ms", "processor_ms")]
        ratios = [row[key] for key in ("ratio", "ratio_p95", "processor_ratio")]
        cells = [name, *(f"{v:.1f}" for v in times), *(f"{v:.2f}" for v in ratios)]
        cells += ["-" if v is None else f"{v:.3f}" for v in (row["median_cm"], row["median_deg"])]
        lines.append(f"| {' | '.join([*cells, *(format(v, '.1f') for v in row['within_percent'].values())])} |")
    stages = sorted({stage for row in rows.values() for stage in row["stages_ms"]} - {"total"})
    lines += ["", f"| mean ms a frame | {' | '.join(stages)} |", "|" + "---|" * (len(stages) + 1)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(format(row['stages_ms'].get(s, 0.0), '.1f') for s in stages)} |")
    return "\n".join(lines)
