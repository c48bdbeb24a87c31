# SPDX-License-Identifier: Apache-2.0
"""``kfloc convert pixloc-checkpoint``: an original PixLoc checkpoint into a safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NAME = "pixloc-checkpoint"

DESCRIPTION = """\
Read checkpoint_best.tar of PixLoc (pixloc_cmu or pixloc_megadepth, or one's own training of the original) and write
it as safetensors, with its configuration in the file. The checkpoint is read without running anything in it, and
every entry must fit the network.
"""

EPILOG = """\
example:
  kfloc convert pixloc-checkpoint pixloc_megadepth/checkpoint_best.tar --out weights/pixloc_megadepth.safetensors
"""


def add_parser(actions: Any) -> None:
    """Register ``kfloc convert pixloc-checkpoint``."""
    parser = actions.add_parser(
        NAME,
        help="an original PixLoc checkpoint",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint_best.tar")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.set_defaults(run_action=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from kfloc_ros.pixloc.reference.checkpoint import read_checkpoint
    from kfloc_ros.pixloc.reference.model import save_model

    read = read_checkpoint(args.checkpoint)
    model, config = read.model, read.model.config
    save_model(args.out, model, origin=f"{args.checkpoint.parent.name}/{args.checkpoint.name}")
    epoch = "" if read.epoch is None else f", epoch {read.epoch}"
    print(f"{args.out}: {config.extractor.encoder}, {sum(p.numel() for p in model.parameters()):,} parameters{epoch}")
    if config.learned_damping:
        print("damping (tx ty tz rx ry rz of the query camera):")
        for level, stride in enumerate(config.extractor.strides):
            print(f"  stride {stride:2d}: " + " ".join(f"{value:.3g}" for value in model.damping(level).tolist()))
    if read.unknown_options:
        print("options in the checkpoint that are unknown here and were not used: " + ", ".join(read.unknown_options))
    return 0
