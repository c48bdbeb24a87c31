# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the fast family's optical flow: network against cost volume, on sources with depth and poses.

Per source and step of the frame index: the error of the flow in cells of 8 pixels, the share of cells with a valid
flow, the share of these more than a cell off, the coverage of its sigma, and its time. The process
noise is the filter's: propagated true coordinates against true ones, before and after scaling as in calibration.

    python benchmarks/flow.py --json out/flow.json --case "sim:localize --frames 0:200:4" \
        --case "7scenes:DIR --poses sfm --split blocks50:test"
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import describe_hardware
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow import backward_flow
from kfloc_ros.kfnet.flow_network import LEARNED_FLOOR_M2, load_flow_network
from kfloc_ros.mapping.calibration import TEMPERATURES
from kfloc_ros.mapping.views import View, map_camera, true_coordinates, true_flow
from kfloc_ros.maps.scene_map import Calibration
from kfloc_ros.training.flow import motion_blur
from studies.flow_accuracy import FlowStatistics

BLUR_PX = 20.0


class Tally:
    """Errors and times of one flow over many pairs."""

    def __init__(self) -> None:
        self.statistics, self.milliseconds = FlowStatistics(), list[float]()

    def add(self, flow_of: FlowFunction, features: Sequence[torch.Tensor], views: Sequence[View]) -> None:
        """Add one pair: features and views of this frame and of the previous one."""
        start = time.perf_counter()
        with torch.inference_mode():
            flow = flow_of(features[0], features[1])
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        offset, _, visible = (torch.from_numpy(part) for part in true_flow(views[0], views[1]))
        now, before = (true_coordinates(view, features[0].shape[-2:]) for view in views)
        self.statistics.add(flow, offset, visible, now, before)

    def row(self, floor_m2: float) -> dict[str, float]:
        """Return the figures."""
        return {**asdict(self.statistics.result(floor_m2)), "milliseconds": float(np.median(self.milliseconds))}


def run(source: FrameSource, step: int, blurred: bool, every: int, weights: Path | None) -> dict[str, dict[str, float]]:
    """Return a row for each flow over pairs that are ``step`` apart in the source."""
    backbone, adapter = Backbone(), ImageAdapter(source.camera, map_camera(source.camera))
    network = load_flow_network() if weights is None else load_flow_network(weights)
    flows: dict[str, FlowFunction] = {"learned": network.flow}
    flows |= {f"soft-argmax, {t:g}": partial(backward_flow, temperature=t) for t in TEMPERATURES}
    tallies = {name: Tally() for name in flows}
    indices = source.indices()
    for now in range(step, len(source), every):
        if indices[now] - indices[now - step] > 3 * step:
            continue
        views, features = [], []
        for position in (now, now - step):
            frame = source[position]
            assert frame.depth_m is not None and frame.T_map_camera is not None
            image, depth = adapter(frame.image), adapter.nearest(frame.depth_m)
            if blurred and position == now:
                image = motion_blur(image, BLUR_PX, float(now))
            views.append(View(image, depth, adapter.target, frame.T_map_camera, frame.index))
            features.append(backbone.extract(image).coarse[0])
        for name, flow in flows.items():
            tallies[name].add(flow, features, views)
    floors = {"learned": LEARNED_FLOOR_M2}
    return {name: tally.row(floors.get(name, Calibration().process_floor_m2)) for name, tally in tallies.items()}


def main() -> int:
    """Run all cases and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", required=True, metavar="SOURCE_AND_OPTIONS")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3], help="distances of the two frames")
    parser.add_argument("--every", type=int, default=5, help="take every so many frames")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the network (default: those shipped)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON")
    args = parser.parse_args()
    source_parser = argparse.ArgumentParser(prog="--case")
    add_source_arguments(source_parser)
    runs: list[dict[str, Any]] = []
    for text in args.case:
        source = open_source_from(source_parser.parse_args(shlex.split(text)))
        for step, blurred in [*((step, False) for step in args.steps), (args.steps[0], True)]:
            rows = run(source, step, blurred, args.every, args.weights)
            runs.append({"source": text, "step": step, "blurred": blurred, "rows": rows})
            print(f"{text}, {step} apart{', the later blurred' if blurred else ''}")
            columns = list(next(iter(rows.values())))
            lines = [(name, *(f"{row[c]:.3g}" for c in columns)) for name, row in rows.items()]
            print(format_table(lines, header=("", *columns)), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"runs": runs, "hardware": describe_hardware("cpu")}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
