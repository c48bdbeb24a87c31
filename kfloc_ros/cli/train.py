# SPDX-License-Identifier: Apache-2.0
"""``kfloc train``: the three training stages of KFNet's reference networks, and PixLoc's network."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli import train_flow, train_pixloc
from kfloc_ros.cli.arguments import OverridesParser, add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import need_poses
from kfloc_ros.errors import ConfigError

if TYPE_CHECKING:
    from kfloc_ros.kfnet.reference.frame import NetworkFrame
    from kfloc_ros.training.kfnet_trainer import TrainProgress

STAGES = {
    "scoordnet": "stage 1: scene coordinates and their sigma from single images",
    "oflownet": "stage 2: flow and process noise from pairs of frames",
    "kfnet": "stage 3: both, through the filter over four frames; needs --scoordnet and --oflownet",
}

DESCRIPTION = """\
Train on a SOURCE with depth and poses. OUT receives the network's weights (.safetensors), a checkpoint, and a log
(log.jsonl, and event files: `tensorboard --logdir OUT`); the same command again continues from the checkpoint. Options
are given as key=value; the defaults are the published schedule (500,000 steps, days on one GPU). `--family fast` trains
the small OFlowNet that this package ships, in a quarter of an hour without a GPU. PixLoc's network has options of its
own: `kfloc train pixloc --help`.
"""

EPILOG = """\
examples:
  kfloc train scoordnet 7scenes:DIR@train --out out/stage1 halving_steps=100000
  kfloc train oflownet 7scenes:DIR@train --out out/stage2 --time-budget 3600
  kfloc train oflownet --family fast --out out/flow --time-budget 1200
  kfloc train kfnet 7scenes:DIR@train --scoordnet out/stage1/scoordnet.safetensors \\
      --oflownet out/stage2/oflownet.safetensors --out out/stage3
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc train``."""
    from kfloc_ros.config import options_of
    from kfloc_ros.training.kfnet_trainer import TrainConfig

    parser = subparsers.add_parser(
        "train",
        help="train KFNet's networks and PixLoc's",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG
        + "\noptions as key=value:\n"
        + "\n".join(f"  {o.name}={o.default}  {o.text}" for o in options_of(TrainConfig)),
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE", parser_class=OverridesParser)
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text, epilog="Options: `kfloc train --help`.")
        stage.usage = f"kfloc train {name} SOURCE --out DIR [key=value ...] [options]"
        add_source_arguments(stage, required=name != "oflownet")
        if name == "oflownet":
            train_flow.add_family(stage)
        stage.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this training")
        stage.add_argument(
            "--time-budget", type=float, default=math.inf, metavar="S", help="stop after so many seconds"
        )
        stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run")
        if name == "scoordnet":
            stage.add_argument(
                "--transform", type=Path, metavar="FILE", help="transform.txt (default: made from SOURCE)"
            )
        for network in ("scoordnet", "oflownet"):
            if name in (network, "kfnet"):
                stage.add_argument(
                    f"--{network}", type=Path, metavar="FILE", required=name == "kfnet", help="weights to start from"
                )
    train_pixloc.add_stages(stages)


def run(args: argparse.Namespace) -> int:
    """Train; 130 when interrupted."""
    if args.stage in train_pixloc.STAGES:
        return train_pixloc.run(args)
    if args.stage == "oflownet" and args.family == "fast":
        return train_flow.run(args)
    if args.source is None:
        raise ConfigError("Name a SOURCE to train from; only `--family fast` has one of its own.")
    source = open_source_from(args)
    need_poses(source)

    from tqdm import tqdm

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.device import choose_device
    from kfloc_ros.training.kfnet_start import StartWeights, samples_of, stage_of
    from kfloc_ros.training.kfnet_trainer import TrainConfig, train

    config = build_config(TrainConfig, parse_overrides(TrainConfig, args.overrides))
    samples = samples_of(args.stage, source, config)
    files = {name: getattr(args, name, None) for name in ("scoordnet", "oflownet")}
    frame = _given_frame(args, config.scale) if args.stage == "scoordnet" else None
    stage = stage_of(args.stage, samples, config, StartWeights(**files, frame=frame))
    device = choose_device(args.device)
    with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:

        def show(progress: TrainProgress) -> None:
            bar.total = progress.steps
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(progress.figures.items())[:4]}, refresh=False)
            bar.update(progress.step - bar.n)

        result = train(stage, samples, config, args.out, device, time_budget_s=args.time_budget, on_progress=show)
    print(f"{args.out}: step {result.step:,} of {result.steps:,} ({result.stopped_by})")
    return 130 if result.stopped_by == "interrupted" else 0


def _given_frame(args: argparse.Namespace, scale: float) -> NetworkFrame | None:
    """The frame of ``--transform`` or of a ``kfnet:DIR`` source; None: to be made from the points."""
    from kfloc_ros.kfnet.reference.frame import read_transform

    kind, _, path = args.source.partition(":")
    beside = Path(path) / "transform.txt"
    if args.transform or (kind == "kfnet" and beside.is_file()):
        return read_transform(args.transform or beside, scale)
    return None
