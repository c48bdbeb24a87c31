# SPDX-License-Identifier: Apache-2.0
"""``kfloc train heads``: alignment heads for the fast family, on simulated pairs of views."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kfloc_ros.cli.train_run import add_run_arguments, describe_options, run_training

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
    from kfloc_ros.training.heads_stage import HeadsTrainConfig

    stage = stages.add_parser(
        STAGE,
        help=TEXT,
        description=DESCRIPTION,
        epilog=f"{EPILOG}\n{describe_options(HeadsTrainConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stage.usage = f"kfloc train {STAGE} --out DIR [--heads FILE] [key=value ...] [options]"
    add_run_arguments(stage)
    stage.add_argument("--heads", type=Path, metavar="FILE", help="heads to start from (default: that change nothing)")


def run(args: argparse.Namespace) -> int:
    """Train; 130 when interrupted."""
    import torch
    from tqdm import tqdm

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.pixloc.heads import AlignmentHeads, HeadsConfig, load_heads
    from kfloc_ros.training.heads_stage import HeadsStage, HeadsTrainConfig
    from kfloc_ros.training.heads_views import SimulatedPairs, ViewRule

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
    stage = HeadsStage(heads, iterations=config.iterations, success_px=config.success_px, clamp_px=config.clamp_px)
    return run_training(args, stage, samples, config, held_out)
