# SPDX-License-Identifier: Apache-2.0
"""``kfloc train heads``: alignment heads for the fast family, on simulated pairs of views."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfloc_ros.training.kfnet_trainer import TrainProgress

STAGE = "heads"
TEXT = "alignment heads for the fast family, on simulated pairs of views"
DESCRIPTION = f"""\
Train {TEXT} in other light: a projection and a confidence for each level of XFeat's features, and the damping. The
rooms have the furniture of the demo's and other pictures and surfaces; a last one is held out. OUT receives
heads.safetensors, heads_best.safetensors (lowest loss in the held-out room), a checkpoint and a log; the same command
again continues. `kfloc localize --heads FILE` and the parameter alignment_heads use them, with any map.
"""
EPILOG = """\
example:
  kfloc train heads --out out/heads steps=1500 --time-budget 1200
"""


def add_stage(stages: Any) -> None:
    """Register it."""
    from kfloc_ros.config import options_of
    from kfloc_ros.training.heads_stage import HeadsTrainConfig

    options = "\n".join(f"  {o.name}={o.default}  {o.text}" for o in options_of(HeadsTrainConfig))
    stage = stages.add_parser(
        STAGE,
        help=TEXT,
        description=DESCRIPTION,
        epilog=f"{EPILOG}\noptions as key=value:\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stage.usage = f"kfloc train {STAGE} --out DIR [--heads FILE] [key=value ...] [options]"
    stage.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this training")
    stage.add_argument("--heads", type=Path, metavar="FILE", help="heads to start from (default: that change nothing)")
    stage.add_argument("--time-budget", type=float, default=math.inf, metavar="S", help="stop after so many seconds")
    stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the heads run")


def run(args: argparse.Namespace) -> int:
    """Train; 130 when interrupted."""
    import torch
    from tqdm import tqdm

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.device import choose_device
    from kfloc_ros.pixloc.heads import AlignmentHeads, HeadsConfig, load_heads
    from kfloc_ros.training.heads_stage import HeadsStage, HeadsTrainConfig
    from kfloc_ros.training.heads_views import SimulatedPairs, ViewRule
    from kfloc_ros.training.pixloc_trainer import train_stage

    config = build_config(HeadsTrainConfig, parse_overrides(HeadsTrainConfig, args.overrides))
    torch.manual_seed(config.seed)
    widths = HeadsConfig() if config.fine else HeadsConfig(fine_width=0)
    heads = load_heads(args.heads) if args.heads is not None else AlignmentHeads(widths)
    rule = ViewRule(rooms=config.rooms, places=config.places, views=config.views)
    quiet = not sys.stderr.isatty()
    with tqdm(total=100, unit="%", desc="rendering", disable=quiet) as bar:

        def rendered(share: float) -> None:
            bar.update(round(100 * share) - bar.n)

        # the demo's own room has seed 0
        samples = SimulatedPairs(rule, 1, config.seed, rendered)
    held_out = SimulatedPairs(ViewRule(rooms=1, places=config.places, views=config.views), 1 + config.rooms, 0)
    stage = HeadsStage(
        heads, iterations=config.iterations, success_px=config.success_px, clamp_px=config.clamp_px
    )  # fmt: skip
    with tqdm(unit="step", disable=quiet) as bar:

        def show(progress: TrainProgress) -> None:
            bar.total = progress.steps
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(progress.figures.items())[:4]}, refresh=False)
            bar.update(progress.step - bar.n)

        result = train_stage(
            stage, samples, config, args.out, choose_device(args.device), validation=held_out,
            time_budget_s=args.time_budget, on_progress=show,
        )  # fmt: skip
    print(f"{args.out}: step {result.step:,} of {result.steps:,} ({result.stopped_by})")
    return 130 if result.stopped_by == "interrupted" else 0
