# SPDX-License-Identifier: Apache-2.0
"""``kfloc train``: the three training stages of KFNet's reference networks, and PixLoc's network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli import train_flow, train_pixloc
from kfloc_ros.cli.arguments import OverridesParser, add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import need_poses
from kfloc_ros.cli.train_run import add_run_arguments, describe_options, run_training
from kfloc_ros.errors import ConfigError

if TYPE_CHECKING:
    from kfloc_ros.kfnet.reference.frame import NetworkFrame

STAGES = {
    "scoordnet": "stage 1: scene coordinates and their sigma from single images",
    "oflownet": "stage 2: flow and process noise from pairs of frames",
    "kfnet": "stage 3: both, through the filter over four frames; needs --scoordnet and --oflownet",
}

DESCRIPTION = """\
Train on a SOURCE with depth and poses. OUT receives the network's weights (.safetensors), a checkpoint, and a log,
log.jsonl; the same command again continues from the checkpoint. Where TensorBoard is installed (pip install
"kfloc_ros[tensorboard]"), `tensorboard --logdir OUT` shows the log. Options are given as key=value; the defaults are
the published schedule (500,000 steps, days on one GPU). `--family fast` trains the small OFlowNet that this package
ships, in a quarter of an hour without a GPU. PixLoc's network has options of its own: `kfloc train pixloc --help`.
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
    from kfloc_ros.training.kfnet_config import TrainConfig

    parser = subparsers.add_parser(
        "train",
        help="train KFNet's networks and PixLoc's",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{EPILOG}\n{describe_options(TrainConfig)}",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE", parser_class=OverridesParser)
    for name, text in STAGES.items():
        stage = stages.add_parser(name, help=text, description=text, epilog="Options: `kfloc train --help`.")
        stage.usage = f"kfloc train {name} SOURCE --out DIR [key=value ...] [options]"
        add_source_arguments(stage, required=name != "oflownet")
        if name == "oflownet":
            train_flow.add_family(stage)
        add_run_arguments(stage)
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

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.training.kfnet_config import TrainConfig
    from kfloc_ros.training.kfnet_stages import StartWeights, samples_of, stage_of

    config = build_config(TrainConfig, parse_overrides(TrainConfig, args.overrides))
    samples = samples_of(args.stage, source, config)
    files = {name: getattr(args, name, None) for name in ("scoordnet", "oflownet")}
    frame = _given_frame(args, config.scale) if args.stage == "scoordnet" else None
    stage = stage_of(args.stage, samples, config, StartWeights(**files, frame=frame))
    return run_training(args, stage, samples, config)


def _given_frame(args: argparse.Namespace, scale: float) -> NetworkFrame | None:
    """The frame of ``--transform`` or of a ``kfnet:DIR`` source; None: to be made from the points."""
    from kfloc_ros.kfnet.reference.frame import read_transform

    kind, _, path = args.source.partition(":")
    beside = Path(path) / "transform.txt"
    if args.transform or (kind == "kfnet" and beside.is_file()):
        return read_transform(args.transform or beside, scale)
    return None
