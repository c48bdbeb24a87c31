# SPDX-License-Identifier: Apache-2.0
"""``kfloc train pixloc`` and ``gnnet``: PixLoc's network on pairs of views of any SOURCE."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from

if TYPE_CHECKING:
    from kfloc_ros.training.kfnet_trainer import TrainProgress

STAGES = {
    "pixloc": "PixLoc on pairs of views: pose errors through the alignment itself",
    "gnnet": "PixLoc's network by GN-Net's losses at true correspondences",
}

EPILOG = """\
SOURCE needs poses, and depth or the points of a reconstruction. OUT receives pixloc.safetensors (as `kfloc convert
pixloc-checkpoint` writes, for `kfloc pixloc`), a checkpoint, and a log; the same command again continues.

example:
  kfloc train pixloc 7scenes:DIR --split blocks50:train --weights pixloc_megadepth.safetensors --out out/tuned
"""


def add_stages(stages: Any) -> None:
    """Register both."""
    from kfloc_ros.config import options_of
    from kfloc_ros.training.pixloc_trainer import PixLocTrainConfig

    options = "\n".join(f"  {o.name}={o.default}  {o.text}" for o in options_of(PixLocTrainConfig))
    for name, text in STAGES.items():
        stage = stages.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"{EPILOG}\noptions as key=value:\n{options}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        stage.usage = f"kfloc train {name} SOURCE --out DIR [--weights FILE] [key=value ...] [options]"
        add_source_arguments(stage)
        stage.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this training")
        stage.add_argument("--weights", type=Path, metavar="FILE", help="model to start from (default: random)")
        stage.add_argument(
            "--time-budget", type=float, default=math.inf, metavar="S", help="stop after so many seconds"
        )
        stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network runs")


def run(args: argparse.Namespace) -> int:
    """Train; 130 when interrupted."""
    source = open_source_from(args)

    from dataclasses import replace

    import torch
    from tqdm import tqdm

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.device import choose_device
    from kfloc_ros.features.unet import UNetConfig
    from kfloc_ros.pixloc.model import PixLocConfig, PixLocModel, load_model
    from kfloc_ros.training.pixloc_samples import PairSamples
    from kfloc_ros.training.pixloc_stages import GnNetStage, PairStage, TwoViewStage
    from kfloc_ros.training.pixloc_trainer import PixLocTrainConfig, train_pixloc

    config = build_config(PixLocTrainConfig, parse_overrides(PixLocTrainConfig, args.overrides))
    torch.manual_seed(config.seed)
    if args.weights is not None:
        model = load_model(args.weights)
    else:
        model = PixLocModel(PixLocConfig(extractor=UNetConfig(encoder=config.encoder)))
    model.config = replace(model.config, num_iters=config.iterations, pad=config.pad)
    stage: PairStage = GnNetStage(model)
    if args.stage == "pixloc":
        stage = TwoViewStage(model, success_px=config.success_px, clamp_px=config.clamp_px)
    samples = PairSamples(source, config.rule(), config.seed)
    with tqdm(unit="step", disable=not sys.stderr.isatty()) as bar:

        def show(progress: TrainProgress) -> None:
            bar.total = progress.steps
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(progress.figures.items())[:4]}, refresh=False)
            bar.update(progress.step - bar.n)

        result = train_pixloc(
            stage, samples, config, args.out, choose_device(args.device), time_budget_s=args.time_budget,
            on_progress=show,
        )  # fmt: skip
    print(f"{args.out}: step {result.step:,} of {result.steps:,} ({result.stopped_by})")
    return 130 if result.stopped_by == "interrupted" else 0
