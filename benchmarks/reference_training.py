# SPDX-License-Identifier: Apache-2.0
"""The learning curve of the reference SCoordNet: trained piece by piece, looked at on frames it never saw in between.

Options after the two sources are those of `kfloc train scoordnet`. Every piece continues the training exactly, as that
command does, so this measures what it makes.

    python benchmarks/reference_training.py --train "7scenes:DIR --split blocks50:train" \
        --test "7scenes:DIR --split blocks50:test" --out out/reference --minutes 25 --piece 5 \
        width=0.125 image_width=320 halving_steps=700 learning_rate=1e-3
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.config import build_config, parse_overrides
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.device import choose_device
from kfloc_ros.evaluation.cells import CellStatistics
from kfloc_ros.evaluation.hardware import describe_hardware
from kfloc_ros.evaluation.metrics import PoseError, accuracy, pose_error
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import load_scoordnet
from kfloc_ros.solvers.pnp import PnpSettings, solve_pnp
from kfloc_ros.training.kfnet_samples import Samples, cell_points, identity
from kfloc_ros.training.kfnet_stages import MeasurementStage
from kfloc_ros.training.kfnet_trainer import TrainConfig, train


def source_of(text: str) -> FrameSource:
    """A SOURCE with its options, in one string."""
    parser = argparse.ArgumentParser(prog="source")
    add_source_arguments(parser)
    return open_source_from(parser.parse_args(shlex.split(text)))


def samples_of(source: FrameSource, config: TrainConfig, augment: str) -> Samples:
    """Single images of a source as training takes them."""
    return Samples(source, 1, image_width=config.image_width, augment=augment, seed=config.seed)


def examine(network: ReferenceSCoordNet, source: FrameSource, config: TrainConfig, step: int) -> dict[str, Any]:
    """Errors of cells and of poses on every ``step``-th frame."""
    network.eval()
    device = network.T_network_map.device
    camera = samples_of(source, config, "none").camera
    adapter = ImageAdapter(source.camera, camera)
    cells, errors = CellStatistics(), list[PoseError]()
    for position in range(0, len(source), step):
        frame = source[position]
        if frame.depth_m is None or frame.T_map_camera is None:
            continue
        measured = network.measure(adapter(frame.image))
        points, known = cell_points(adapter.nearest(frame.depth_m), camera, frame.T_map_camera, identity())
        cells.add(measured, torch.from_numpy(points).to(device), torch.from_numpy(known).to(device))
        pose = solve_pnp(measured, camera, PnpSettings())
        errors.append(pose_error(pose.T_map_camera, frame.T_map_camera))
    poses, found = accuracy(errors), cells.result()
    return {
        "frames": poses.frames,
        "median_cell_error_m": found.median_error_m,
        "coverage_1sigma": found.coverage[0],
        "median_translation_m": poses.median_translation_m,
        "median_rotation_deg": poses.median_rotation_deg,
        "recall": dict(poses.recall),
    }


def finite(look: dict[str, Any]) -> dict[str, Any]:
    """The same with None for what JSON has no number for."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in look.items()
    }


def main() -> int:
    """Train and examine in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="SOURCE", help="with its options, in quotes")
    parser.add_argument("--test", required=True, metavar="SOURCE", help="with its options, in quotes")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the training")
    parser.add_argument("--minutes", type=float, default=25.0, help="time for training in all")
    parser.add_argument("--piece", type=float, default=5.0, help="minutes between two looks")
    parser.add_argument("--every", type=int, default=10, help="of the test frames, look at every so many")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = build_config(TrainConfig, parse_overrides(TrainConfig, args.overrides))
    device = choose_device(args.device)
    training, test = source_of(args.train), source_of(args.test)
    samples = samples_of(training, config, MeasurementStage.augment if config.augment == "stage" else config.augment)
    torch.manual_seed(config.seed)
    network = ReferenceSCoordNet(Padding(config.padding), config.width, samples.network_frame(config.scale))
    curve: list[dict[str, Any]] = []
    spent = 0.0
    while spent < args.minutes:
        piece = min(args.piece, args.minutes - spent)
        result = train(MeasurementStage(network), samples, config, args.out, device, time_budget_s=60 * piece)
        spent += piece
        if result.stopped_by == "interrupted":
            break
        network = load_scoordnet(args.out / "scoordnet.safetensors").to(device)
        curve.append({"minutes": spent, "step": result.step, **examine(network, test, config, args.every)})
        (args.out / "curve.json").write_text(json.dumps([finite(look) for look in curve], indent=1) + "\n")
        print(json.dumps(finite(curve[-1])), flush=True)
        if result.stopped_by == "finished":
            break
    lines = [
        (
            f"{c['minutes']:.0f}",
            f"{c['step']}",
            f"{100 * c['median_cell_error_m']:.1f} cm",
            f"{100 * c['coverage_1sigma']:.0f} %",
            f"{100 * c['median_translation_m']:.1f} cm {c['median_rotation_deg']:.2f} deg",
            f"{100 * c['recall']['5cm_5deg']:.0f} %",
        )
        for c in curve
    ]
    header = ("minutes", "step", "cells: median", "in 1 sigma", "poses: median", "5cm/5deg")
    print(format_table(lines, header=header))
    print(describe_hardware(device.type))
    return 0


if __name__ == "__main__":
    sys.exit(main())
