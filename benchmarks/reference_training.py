# SPDX-License-Identifier: Apache-2.0
"""Learning curves of KFNet's reference networks: trained piece by piece, evaluated on frames not in the training.

One stage (`--stage scoordnet`, `oflownet` or `kfnet`) or all three in order, each in its folder below OUT. The joint
stage starts from the results of the two others, and is also evaluated before its first step. Options as key=value are
those of `kfloc train`; one for a single stage has its name in front (`kfnet.learning_rate=3e-4`). Every piece continues
the training exactly, as that command does; the same command again with more minutes continues the curve. The first line
of OFlowNet is without a network: zero flow.

    python benchmarks/reference_training.py --train "7scenes:DIR --split blocks50:train" \
        --test "7scenes:DIR --split blocks50:test" --out out/reference --minutes 25 15 20 --piece 5 \
        width=0.125 image_width=160 halving_steps=700 learning_rate=1e-3
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kfloc_ros.cli.arguments import OverridesParser, add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.config import build_config, parse_overrides
from kfloc_ros.device import choose_device, describe_hardware
from kfloc_ros.evaluation.summary import finite
from kfloc_ros.frames import FrameSource
from kfloc_ros.kfnet.fusion import FilterSettings
from kfloc_ros.kfnet.reference.weights import OFLOWNET, SCOORDNET, load_oflownet, load_scoordnet
from kfloc_ros.training.kfnet_config import TrainConfig
from kfloc_ros.training.kfnet_family import HeldOutFrames
from kfloc_ros.training.kfnet_stages import JOINT, KINDS, StartWeights, samples_of, stage_of
from kfloc_ros.training.loop import train
from kfloc_ros.training.state import STATE_FILE
from studies.reference_networks import (
    AS_PUBLISHED,
    evaluate_kfnet,
    evaluate_oflownet,
    evaluate_scoordnet,
    evaluate_zero_flow,
)

Figures = dict[str, Any]
CURVE_FILE = "curve.json"
OWN_FILTER = FilterSettings(flow_temperature=1.0, process_scale=1.0, process_floor_m2=0.0)
"""Settings of this project's filter, instead of the published ones."""


@dataclass(frozen=True)
class Schedule:
    """Minutes of one stage, in all and between two evaluations, and the choice of evaluated frames."""

    minutes: float
    piece: float
    every: int
    spacing: int
    run_length: int
    runs: int


def source_of(text: str) -> FrameSource:
    """Return a SOURCE with its options, given in one string."""
    parser = argparse.ArgumentParser(prog="source")
    add_source_arguments(parser)
    return open_source_from(parser.parse_args(shlex.split(text)))


def options_of(stage: str, words: Sequence[str]) -> list[str]:
    """Return the key=value words for a stage, without its name."""
    own = [word.removeprefix(f"{stage}.") for word in words if word.startswith(f"{stage}.")]
    return [word for word in words if "." not in word.split("=")[0]] + own


def evaluate(stage: str, weights: Mapping[str, Path], frames: HeldOutFrames, schedule: Schedule) -> Figures:
    """Return the accuracy of the weights in files."""
    scoordnet = load_scoordnet(weights[SCOORDNET]).to(frames.device) if stage != OFLOWNET else None
    oflownet = load_oflownet(weights[OFLOWNET]).to(frames.device) if stage != SCOORDNET else None
    if scoordnet is None:
        assert oflownet is not None
        pairs = max(1, len(frames) // schedule.every)
        apart, next_to = (evaluate_oflownet(oflownet, frames, pairs, spacing) for spacing in (schedule.spacing, 1))
        return {**asdict(apart), "neighbours": asdict(next_to)}
    if oflownet is None:
        return asdict(evaluate_scoordnet(scoordnet, frames, schedule.every))
    runs = frames.runs(schedule.run_length, schedule.runs, schedule.spacing)
    published, own = (evaluate_kfnet(scoordnet, oflownet, frames, runs, s) for s in (AS_PUBLISHED, OWN_FILTER))
    return {**asdict(published), "own_filter": {"posterior": asdict(own.posterior), "poses": asdict(own.poses)}}


def run_stage(
    stage: str,
    sources: tuple[FrameSource, FrameSource],
    config: TrainConfig,
    start: StartWeights,
    out: Path,
    schedule: Schedule,
    device: torch.device,
) -> list[Figures]:
    """Train and evaluate in turn; the curve is written after every piece, and continued if the folder has one."""
    samples = samples_of(stage, sources[0], config)
    frames = HeldOutFrames(sources[1], samples.camera, device)
    training = stage_of(stage, samples, config, start)
    weights = {name: out / f"{name}.safetensors" for name in (SCOORDNET, OFLOWNET)}
    curve: list[Figures] = []
    if (out / CURVE_FILE).is_file() and (out / STATE_FILE).is_file():
        curve = with_infinity(json.loads((out / CURVE_FILE).read_text()))

    def note(minutes: float, step: int, figures: Figures) -> None:
        curve.append({"minutes": minutes, "step": step, **figures})
        out.mkdir(parents=True, exist_ok=True)
        (out / CURVE_FILE).write_text(json.dumps(finite(curve), indent=1) + "\n")
        print(stage, json.dumps(finite(curve[-1])), flush=True)

    if stage == OFLOWNET and not curve:
        still = evaluate_zero_flow(frames, max(1, len(frames) // schedule.every), schedule.spacing)
        note(0.0, 0, asdict(still))
    if start.scoordnet is not None and start.oflownet is not None and not curve:
        before = {SCOORDNET: start.scoordnet, OFLOWNET: start.oflownet}
        note(0.0, config.schedule(training).first, evaluate(stage, before, frames, schedule))
    spent = float(curve[-1]["minutes"]) if curve else 0.0
    while spent < schedule.minutes:
        piece = min(schedule.piece, schedule.minutes - spent)
        result = train(training, samples, config, out, device, time_budget_s=60 * piece)
        spent += piece
        if result.stopped_by == "interrupted":
            raise KeyboardInterrupt
        note(spent, result.step, evaluate(stage, weights, frames, schedule))
        if result.stopped_by == "finished":
            break
    return curve


def with_infinity(value: Any) -> Any:
    """Return the input of :func:`finite`, with infinity for None."""
    if isinstance(value, dict):
        return {key: with_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_infinity(item) for item in value]
    return math.inf if value is None else value


def table_of(stage: str, curve: Sequence[Figures]) -> str:
    """Return the table of a stage's curve."""

    def cells(figures: Mapping[str, Any]) -> str:
        return f"{100 * figures['median_error_m']:.1f} cm, {100 * figures['coverage'][0]:.0f} %"

    def poses(figures: Mapping[str, Any]) -> str:
        recall = f"{100 * figures['recall']['5cm_5deg']:.0f} %"
        return f"{100 * figures['median_translation_m']:.1f} cm {figures['median_rotation_deg']:.2f} deg, {recall}"

    rows = []
    for figures in curve:
        row = [f"{figures['minutes']:.0f}", f"{figures['step']}"]
        if stage == SCOORDNET:
            row += [cells(figures["cells"]), poses(figures["poses"])]
        elif stage == OFLOWNET:
            row += [f"{figures['median_cells']:.2f}", f"{figures['p90_cells']:.2f}", f"{100 * figures['lost']:.1f} %"]
            row += [f"{1e3 * figures['prior_axis_median_m']:.0f} mm", f"{1e3 * figures['prior_axis_rms_m']:.0f} mm"]
            row += [f"{100 * figures['prior_inside_1sigma']:.0f} %"]
        else:
            row += [cells(figures[name]) for name in ("measurement", "measurement_there", "prior", "posterior")]
            row += [
                cells(figures["own_filter"]["posterior"]),
                poses(figures["measurement_poses"]),
                poses(figures["poses"]),
            ]
            row += [poses(figures["own_filter"]["poses"])]
        rows.append(row)
    columns = {
        SCOORDNET: ("cells: median, in 1 sigma", "poses: median, 5cm/5deg"),
        OFLOWNET: ("flow: cells, median", "90 %", "lost", "propagated, axis: median", "rms", "in 1 sigma"),
        JOINT: (
            "cells: measured",
            "where propagated",
            "prior",
            "filtered",
            "our filter",
            "poses: measured",
            "filtered",
            "our filter",
        ),
    }
    return format_table(rows, header=("minutes", "step", *columns[stage]))


def main() -> int:
    """Train and evaluate in turn."""
    parser = OverridesParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *KINDS), default="all", help="which to train (default: all)")
    parser.add_argument("--train", required=True, metavar="SOURCE", help="with its options, in quotes")
    parser.add_argument("--test", required=True, metavar="SOURCE", help="with its options, in quotes")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the trainings, each stage below it"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[25.0],
        metavar="M",
        help="to train, of all stages or each",
    )
    parser.add_argument("--piece", type=float, default=5.0, metavar="M", help="minutes between two evaluations")
    parser.add_argument("--every", type=int, default=10, help="stages 1, 2: every so many test frames")
    parser.add_argument("--run-length", type=int, default=10, help="stage 3: consecutive test frames in a run")
    parser.add_argument("--runs", type=int, default=8, help="stage 3: runs of test frames to evaluate")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    stages = list(KINDS) if args.stage == "all" else [args.stage]
    if len(args.minutes) not in (1, len(stages)):
        parser.error(f"--minutes takes one number, or one for each of {', '.join(stages)}")
    device = choose_device(args.device)
    sources = source_of(args.train), source_of(args.test)
    schedule = Schedule(0.0, args.piece, args.every, 1, args.run_length, args.runs)
    tables = []
    for stage, minutes in zip(stages, args.minutes * (len(stages) // len(args.minutes)), strict=True):
        config = build_config(TrainConfig, parse_overrides(TrainConfig, options_of(stage, args.overrides)))
        start = StartWeights()
        if stage == JOINT:
            start = StartWeights(*(args.out / name / f"{name}.safetensors" for name in (SCOORDNET, OFLOWNET)))
        timed = replace(schedule, minutes=minutes, spacing=config.spacing)
        curve = run_stage(stage, sources, config, start, args.out / stage, timed, device)
        tables.append(f"{stage}\n{table_of(stage, curve)}")
    print("\n" + "\n\n".join(tables))
    print(describe_hardware(device.type))
    return 0


if __name__ == "__main__":
    sys.exit(main())
