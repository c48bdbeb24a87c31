# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the Kalman filter: measurement alone against variants of the filter, on clean and degraded sources.

Every case is a map and a SOURCE with its options. Each frame is measured once; all variants use the same measurement. A
frame is a failure if its coarse pose is missing or not within 10 cm and 10 degrees. The default is the localizer's
filter: refined poses correct the belief, so its frames are also refined; the other variants have no such feedback.

    python benchmarks/filter.py --json out/filter.json \
        --case maps/kitchen "7scenes:DIR --poses sfm --split blocks50:test"

In the JSON, `degraded_failure_reduction` is the share of measurement-only failures, over all degraded runs, that the
default filter avoids. `cell_coverage_1sigma` is the share of measured cells' axis errors inside one sigma on the clean
runs, and `cell_coverage_1sigma_posterior` the same after the default filter. `clean_runs_worse` counts the clean runs
whose median coarse pose the default filter makes significantly worse: `change_m` of every row has the change of the
median against the measurement alone, on the same frames, and its 95 % interval. `cases` has the same for each case.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import choose_device, describe_hardware
from kfloc_ros.evaluation.metrics import PoseError, accuracy, pose_error, recall
from kfloc_ros.evaluation.summary import finite
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.filter import FlowFunction, SceneCoordinateFilter
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.flow_network import cost_volume_flow, flow_of
from kfloc_ros.kfnet.fusion import NO_PRIOR, Filtered, FilterSettings, NisMode
from kfloc_ros.kfnet.pnp import PnpSettings, solve_pnp
from kfloc_ros.kfnet.scoordnet import measure
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.mapping.views import View, true_coordinates
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import FilterReport, Frame, SceneCoordinates
from studies.cells import CellStatistics
from studies.degraded import DEGRADATIONS, Degraded
from studies.paired import median_change

FLOOR_M2 = 0.02**2
FAILURE_M, FAILURE_DEG = 0.10, 10.0
MEASUREMENT, DEFAULT = "measurement", "default"
DEFAULT_FLOW, OTHER_FLOW = "network", "cost volume"
ALONE = "no feedback"
OTHER = f"no feedback, {OTHER_FLOW} flow"
PUBLISHED: dict[str, Any] = {"error_correlation": 0.0, "blend_sigma": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "off": {**PUBLISHED, "nis_mode": NisMode.OFF},
    "off, floor": {**PUBLISHED, "nis_mode": NisMode.OFF, "posterior_floor_m2": FLOOR_M2},
    "output_only": {**PUBLISHED, "nis_mode": NisMode.OUTPUT_ONLY},
    "output_only, floor": {**PUBLISHED, "nis_mode": NisMode.OUTPUT_ONLY, "posterior_floor_m2": FLOOR_M2},
    ALONE: {},
    OTHER: {},
    DEFAULT: {},
}
"""Changes to the default settings, which fuse correlated errors and keep the value of lower variance. All but the
default are the filter without feedback. ``OTHER`` has the fast family's other flow: see ``kfnet/flow_network.py``. A
map not calibrated for the learned flow has only one, and the two agree."""


@dataclass
class Track:
    """State of one variant during a run."""

    filter: SceneCoordinateFilter | None
    refine: Localizer | None = None
    """Localizer whose refined poses correct the filter; None for a filter without feedback."""
    cells: CellStatistics = field(default_factory=CellStatistics)
    errors: list[PoseError] = field(default_factory=list)


class OnceAPair:
    """Flow function that computes the flow of a pair once for all variants."""

    def __init__(self, flow: FlowFunction) -> None:
        self._flow = flow
        self._last: tuple[torch.Tensor, torch.Tensor, Flow] | None = None

    def __call__(self, now: torch.Tensor, before: torch.Tensor) -> Flow:
        if self._last is None or self._last[0] is not now or self._last[1] is not before:
            self._last = (now, before, self._flow(now, before))
        return self._last[2]


class Bench:
    """Runs of all variants with one map."""

    def __init__(self, scene_map: SceneMap, device: torch.device, variants: Sequence[str] = tuple(VARIANTS)) -> None:
        self._map, self._device, self._variants = scene_map, device, variants
        self._backbone = Backbone(device=device)
        self._head = scene_map.head.to(device)
        c = scene_map.calibration
        chosen = {DEFAULT_FLOW: flow_of(c, device), OTHER_FLOW: cost_volume_flow(c)}
        self._flows = {kind: replace(flow, flow=OnceAPair(flow.flow)) for kind, flow in chosen.items()}
        self._settings = FilterSettings(c.flow_temperature, c.process_scale, c.process_floor_m2)
        self._pnp = PnpSettings(covariance_scale=c.coarse_covariance_scale)

    def run(self, source: FrameSource) -> list[dict[str, Any]]:
        """Return one row for each variant."""
        tracks = {MEASUREMENT: Track(None)}
        for name in self._variants:
            change = VARIANTS[name]
            chosen = self._flows[OTHER_FLOW if name == OTHER else DEFAULT_FLOW]
            noise = {"process_scale": chosen.process_scale, "process_floor_m2": chosen.process_floor_m2}
            settings = replace(self._settings, **{**noise, **change})
            refine = Localizer(self._map, LocalizerConfig(device=self._device.type)) if name == DEFAULT else None
            tracks[name] = Track(SceneCoordinateFilter(settings, chosen.flow), refine)
        adapter = ImageAdapter(source.camera, self._map.camera)
        for frame in source:
            self._frame(frame, adapter, tracks)
        return [row(name, track, tracks[MEASUREMENT]) for name, track in tracks.items()]

    @torch.inference_mode()
    def _frame(self, frame: Frame, adapter: ImageAdapter, tracks: dict[str, Track]) -> None:
        seen = replace(frame, image=adapter(frame.image), camera=self._map.camera)
        features = self._backbone.extract(seen.image)
        measured = measure(self._head, features, self._map.calibration)
        truth, coarse = self._truth(frame, adapter), features.coarse[0]
        for track in tracks.values():
            filtered = Filtered(measured, FilterReport("no filter", 0.0, NO_PRIOR, 0.0))
            if track.filter is not None:
                filtered = track.filter.step(frame.stamp_ns, coarse, measured)
            posterior = filtered.posterior
            pose = solve_pnp(posterior, self._map.camera, self._pnp)
            if track.filter is not None:
                track.filter.accept_pose(pose)
                if track.refine is not None:
                    result = CoarseResult(frame.stamp_ns, pose, filtered.report, {}, features, posterior, measured)
                    refined = track.refine.refine_half(seen, result).estimate.refined_pose
                    if refined is not None:
                        track.filter.correct_belief(frame.stamp_ns, self._map.camera, refined)
            if frame.T_map_camera is not None:
                track.errors.append(pose_error(pose.T_map_camera, frame.T_map_camera))
            if truth is not None:
                track.cells.add(posterior, truth.mean, truth.valid)

    def _truth(self, frame: Frame, adapter: ImageAdapter) -> SceneCoordinates | None:
        if frame.depth_m is None or frame.T_map_camera is None:
            return None
        view = View(frame.image, adapter.nearest(frame.depth_m), self._map.camera, frame.T_map_camera, frame.index)
        truth = true_coordinates(view, (view.camera.height // COARSE_STRIDE, view.camera.width // COARSE_STRIDE))
        return replace(truth, mean=truth.mean.to(self._device), valid=truth.valid.to(self._device))


def row(name: str, track: Track, measured: Track) -> dict[str, Any]:
    """Return the figures of one variant."""
    poses = accuracy(track.errors)
    change = median_change(*([error.translation_m for error in run.errors] for run in (measured, track)))
    good = recall(track.errors, FAILURE_M, FAILURE_DEG)
    return {
        "variant": name,
        "frames": poses.frames,
        "failures": round(poses.frames * (1 - good)) if poses.frames else 0,
        "median_translation_m": poses.median_translation_m,
        "median_rotation_deg": poses.median_rotation_deg,
        "change_m": {**asdict(change), "is_worse": change.is_worse},
        "recall": {**poses.recall, "10cm_10deg": good},
        "cells": asdict(track.cells.result()),
    }


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures at the top level of the JSON."""

    def total(variant: str, degraded: bool) -> tuple[int, int]:
        chosen = [r for run in runs if (run["degradation"] != "clean") == degraded for r in run["rows"]]
        rows = [r for r in chosen if r["variant"] == variant]
        return sum(r["failures"] for r in rows), sum(r["frames"] for r in rows)

    def coverage(variant: str) -> float:
        rows = [r for run in runs if run["degradation"] == "clean" for r in run["rows"] if r["variant"] == variant]
        weights = [r["cells"]["frames"] for r in rows]
        values = [r["cells"]["coverage"][0] for r in rows]
        return float(np.average(values, weights=weights)) if sum(weights) else math.nan

    clean = [r for run in runs if run["degradation"] == "clean" for r in run["rows"] if r["variant"] == DEFAULT]
    before, frames = total(MEASUREMENT, True)
    after, _ = total(DEFAULT, True)
    return {
        "degraded_failure_reduction": 1 - after / before if before else math.nan,
        "degraded_failures_measurement": before,
        "degraded_failures_filter": after,
        "degraded_frames": frames,
        "clean_failures_measurement": total(MEASUREMENT, False)[0],
        "clean_failures_filter": total(DEFAULT, False)[0],
        "clean_runs_worse": sum(r["change_m"]["is_worse"] for r in clean),
        "cell_coverage_1sigma": coverage(MEASUREMENT),
        "cell_coverage_1sigma_posterior": coverage(DEFAULT),
    }


def by_case(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the summary of every map and source separately."""
    names = dict.fromkeys((run["map"], run["source"]) for run in runs)
    return [
        {"map": name, "source": source, **summarize([r for r in runs if (r["map"], r["source"]) == (name, source)])}
        for name, source in names
    ]


def table(run: dict[str, Any]) -> str:
    """Return the table of one run."""
    header = ("", "failed", "5cm/5deg", "median", "change, 95 %", "cells: median/mean/std", "mean sq", "1/2/3 sigma")
    lines = []
    for r in run["rows"]:
        cells = r["cells"]
        change = "{change:+.2f} ({low:+.2f} to {high:+.2f}) cm".format(
            **{key: 100 * r["change_m"][key] for key in ("change", "low", "high")}
        )
        errors = "/".join(f"{100 * cells[k]:.1f}" for k in ("median_error_m", "mean_error_m", "std_error_m"))
        lines.append(
            (
                r["variant"],
                f"{r['failures']} of {r['frames']}",
                f"{100 * r['recall']['5cm_5deg']:.1f} %",
                f"{100 * r['median_translation_m']:.2f} cm {r['median_rotation_deg']:.2f} deg",
                change,
                f"{errors} cm",
                f"{cells['normalized_mean_square']:.1f}",
                "/".join(f"{100 * share:.0f}" for share in cells["coverage"]) + " %",
            )
        )
    return f"{run['source']}, {run['degradation']}\n{format_table(lines, header=header)}\n"


def main() -> int:
    """Run all cases and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, action="append", required=True, metavar=("MAP", "SOURCE_AND_OPTIONS"))
    parser.add_argument("--degradations", nargs="+", choices=tuple(DEGRADATIONS), default=list(DEGRADATIONS))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON")
    args = parser.parse_args()
    source_parser = argparse.ArgumentParser(prog="--case")
    add_source_arguments(source_parser)
    device = choose_device(args.device)
    runs: list[dict[str, Any]] = []
    for map_name, text in args.case:
        bench = Bench(SceneMap.load(resolve_map(map_name)), device, args.variants)
        source = open_source_from(source_parser.parse_args(shlex.split(text)))
        for name in args.degradations:
            rows = bench.run(Degraded(source, DEGRADATIONS[name]))
            runs.append({"map": map_name, "source": text, "degradation": name, "rows": rows})
            print(table(runs[-1]), flush=True)
    summary = summarize(runs)
    print("\n".join(f"{key}: {value:.3f}" for key, value in summary.items()))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = finite({**summary, "cases": by_case(runs), "runs": runs, "hardware": describe_hardware(device.type)})
        args.json.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
