# SPDX-License-Identifier: Apache-2.0
"""``kfloc train``: the three training stages of KFNet's networks, and the training of PixLoc's network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli import train_run
from kfloc_ros.cli.arguments import OverridesParser, add_source_arguments, need_poses, open_source_from
from kfloc_ros.cli.train_run import add_run_arguments, choose_folder, conf_words, describe_options, run_training
from kfloc_ros.errors import ConfigError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource
    from kfloc_ros.kfnet.reference.scoordnet import NetworkFrame
    from kfloc_ros.training.kfnet_config import TrainConfig

STAGES = {
    "scoordnet": "stage 1: scene coordinates and their sigma from single images",
    "oflownet": "stage 2: flow and process noise from pairs of frames",
    "kfnet": "stage 3: both, through the filter over four frames; needs --scoordnet and --oflownet",
}

RUN_LENGTH, RUN_EVERY = 15, 4
"""Simulated recordings: one run of 15 frames in four is used, since rendering takes time."""

DESCRIPTION = """\
Train on a SOURCE with depth and poses. OUT receives the network's weights (.safetensors), a checkpoint, and the log
log.jsonl; the same command continues from the checkpoint. If TensorBoard is installed (pip install
"kfloc_ros[tensorboard]"), `tensorboard --logdir OUT` shows the log. Options are given as key=value; the defaults are
the published schedule (500,000 steps, days on one GPU). `--family fast` trains this package's small OFlowNet, in 15
minutes without a GPU. PixLoc's network has its own options: `kfloc train pixloc --help`.
"""

EPILOG = """\
examples:
  kfloc train scoordnet 7scenes:DIR@train --out out/stage1 halving_steps=100000
  kfloc train scoordnet cambridge:DIR/ShopFacade@train --scene ShopFacade --out out/shop
  kfloc train oflownet 7scenes:DIR@train --out out/stage2 --time-budget 3600
  torchrun --nproc-per-node 4 -m kfloc_ros.cli train scoordnet 7scenes:DIR@train --out out/stage1
  kfloc train oflownet --family fast --out out/flow --time-budget 1200
  kfloc train kfnet 7scenes:DIR@train --scoordnet out/stage1/scoordnet.safetensors \\
      --oflownet out/stage2/oflownet.safetensors --out out/stage3
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc train``."""
    from kfloc_ros.training.kfnet_config import TrainConfig

    parser = subparsers.add_parser(
        "train",
        help="train KFNet's and PixLoc's networks",
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
            stage.add_argument(
                "--family",
                choices=("reference", "fast"),
                default="reference",
                help="reference: as published (default); fast: the small network on the backbone's cost volume, "
                "trained on simulated recordings if no SOURCE is given",
            )
        add_run_arguments(stage)
        stage.add_argument(
            "--scene", metavar="NAME", help="schedule, scale and image size of a benchmark's scene, such as fire"
        )
        stage.add_argument(
            "--reset-step", "--reset_step", action="store_true", help="start the schedule again: reset_step=true"
        )
        if name != "kfnet":
            stage.add_argument(
                "--finetune", "--finetune_folder", type=Path, metavar="DIR",
                help="folder of a training to start from; its step count continues, unless --reset-step is given",
            )  # fmt: skip
        if name == "oflownet":
            stage.add_argument("--noise", action="store_true", help="noise on the warped coordinates: noise=true")
        if name == "scoordnet":
            stage.add_argument(
                "--transform", type=Path, metavar="FILE", help="transform.txt (default: computed from SOURCE)"
            )
        for network in ("scoordnet", "oflownet"):
            if name in (network, "kfnet"):
                stage.add_argument(
                    f"--{network}", type=Path, metavar="FILE", required=name == "kfnet", help="initial weights"
                )
    train_run.add_stages(stages)


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc train``; return 0, or 130 when interrupted."""
    choose_folder(args)
    if args.stage in train_run.NETWORKS:
        return train_run.run(args)
    if args.stage == "oflownet" and args.family == "fast":
        return _run_fast_flow(args)
    if args.source is None:
        raise ConfigError("Give a SOURCE to train from; only `--family fast` has a default.")
    source = open_source_from(args)
    need_poses(source)

    from kfloc_ros.training.kfnet_stages import StartWeights, samples_of, stage_of

    config = _config(args)
    samples = samples_of(args.stage, source, config)
    files = {name: getattr(args, name, None) for name in ("scoordnet", "oflownet")}
    finetuned: Path | None = getattr(args, "finetune", None)
    if finetuned is not None:
        if files[args.stage] is not None:
            raise ConfigError(f"--finetune and --{args.stage} both give initial weights; omit one of them.")
        files[args.stage] = finetuned / f"{args.stage}.safetensors"
    continued = None if config.reset_step else finetuned
    frame = _given_frame(args, config.scale) if args.stage == "scoordnet" else None
    stage = stage_of(args.stage, samples, config, StartWeights(**files, frame=frame))
    return run_training(args, stage, samples, config, continued=continued)


def _config(args: argparse.Namespace) -> TrainConfig:
    """Return the published schedule, or the scene's, with the overrides of the command line.

    Raises:
        ConfigError: an option or the scene is unknown, or --reset-step is given without --finetune.
    """
    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.datasets.scenes import find_scene
    from kfloc_ros.training.kfnet_config import TrainConfig, scene_options

    values = {} if args.scene is None else scene_options(find_scene(args.scene), args.stage)
    values |= {key: True for key in ("noise", "reset_step") if getattr(args, key, False)}
    values |= parse_overrides(TrainConfig, [*conf_words(args.conf), *args.overrides])
    config = build_config(TrainConfig, values)
    if config.reset_step and args.stage != "kfnet" and args.finetune is None:
        raise ConfigError("--reset-step requires --finetune: a new training starts at step 0.")
    if config.noise and args.stage != "oflownet":
        raise ConfigError("noise=true applies only to stage 2, `kfloc train oflownet`.")
    return config


def _given_frame(args: argparse.Namespace, scale: float) -> NetworkFrame | None:
    """Return the frame of ``--transform`` or of a ``kfnet:DIR`` source; None if it must be computed from the points."""
    from kfloc_ros.kfnet.reference.scoordnet import read_transform

    kind, _, path = args.source.partition(":")
    beside = Path(path) / "transform.txt"
    if args.transform or (kind == "kfnet" and beside.is_file()):
        return read_transform(args.transform or beside, scale)
    return None


def _run_fast_flow(args: argparse.Namespace) -> int:
    """Train the fast family's optical-flow network; return 0, or 130 when interrupted."""
    import torch

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.device import choose_device
    from kfloc_ros.kfnet.flow_network import FlowNetwork, load_flow_network
    from kfloc_ros.training.distributed import own_device
    from kfloc_ros.training.flow import FLOW_DEFAULTS, FLOW_OPTIONS, FastFlowStage, FlowPairs
    from kfloc_ros.training.kfnet_config import TrainConfig

    for flag in ("scene", "noise", "reset_step", "finetune"):
        if getattr(args, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is of the published network; leave out --family fast.")
    overrides = parse_overrides(TrainConfig, [*conf_words(args.conf), *args.overrides])
    config = build_config(TrainConfig, {**FLOW_DEFAULTS, **overrides})
    if unused := sorted(set(overrides) - FLOW_OPTIONS):
        raise ConfigError(
            f"The fast family has no option '{unused[0]}'; its options: {', '.join(sorted(FLOW_OPTIONS))}."
        )
    sources = simulated_sources() if args.source is None else [open_source_from(args)]
    samples = FlowPairs(sources, max_step=config.max_step, augment=config.augment != "none", seed=config.seed)
    torch.manual_seed(config.seed)
    network = FlowNetwork() if args.oflownet is None else load_flow_network(args.oflownet)
    return run_training(args, FastFlowStage(network, own_device(choose_device(args.device))), samples, config)


def simulated_sources() -> Sequence[FrameSource]:
    """Return the training data of the shipped weights: simulated rooms with other textures than the demo's, which is
    for tests.
    """
    from kfloc_ros.frames import Selection
    from kfloc_ros.simulation.source import SimulatedSource

    sources = []
    for seed in (1, 2):
        for which in ("map", "localize"):
            whole = SimulatedSource(which, seed=seed)
            chosen = [p for p in range(len(whole)) if p // RUN_LENGTH % RUN_EVERY == seed]
            sources.append(Selection(whole, chosen))
    return sources
