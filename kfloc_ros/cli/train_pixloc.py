# SPDX-License-Identifier: Apache-2.0
"""``kfloc train pixloc`` and ``gnnet``: training of PixLoc's network on pairs of views."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.train_run import add_run_arguments, describe_options, read_conf, run_training
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError

if TYPE_CHECKING:
    from kfloc_ros.training.pixloc_samples import Pairs
    from kfloc_ros.training.pixloc_stages import PixLocTrainConfig
    from kfloc_ros.training.stage import Samples

NETWORKS = {
    "pixloc": "PixLoc on pairs of views: pose errors through the alignment",
    "gnnet": "PixLoc's network with GN-Net's losses at true correspondences",
}
STAGES = NETWORKS

EPILOG = """\
SOURCE needs poses, and depth or the points of a reconstruction. Or it is PixLoc's own training data: megadepth:DIR
or cmu:DIR, where DIR is the data path of the original. OUT receives pixloc.safetensors (the format of `kfloc convert
pixloc-checkpoint`, for `kfloc pixloc`), pixloc_best.safetensors (lowest validation loss), a checkpoint, and a log; the
same command continues from the checkpoint.

examples:
  kfloc train pixloc 7scenes:DIR --split blocks50:train --weights pixloc_megadepth.safetensors --out out/tuned
  kfloc train pixloc megadepth:DIR --conf config/train/pixloc_megadepth.yaml experiment=pixloc_megadepth
  kfloc train pixloc cmu:DIR --conf config/train/pixloc_cmu.yaml --out out/cmu train.lr=5e-6 batch=2
  kfloc train gnnet cmu:DIR --conf config/train/gnnet_cmu.yaml --out out/gnnet

--conf takes the original's files as they are, and words data.*, model.* and train.* its keys.
"""


def add_stages(stages: Any) -> None:
    """Register both stages."""
    from kfloc_ros.training.pixloc_stages import PixLocTrainConfig

    for name, text in NETWORKS.items():
        stage = stages.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"{EPILOG}\n{describe_options(PixLocTrainConfig)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        stage.usage = f"kfloc train {name} SOURCE --out DIR [--weights FILE] [key=value ...] [options]"
        add_source_arguments(stage)
        add_run_arguments(stage)
        stage.add_argument("--weights", type=Path, metavar="FILE", help="initial model (default: random weights)")
        stage.add_argument(
            "--validation", metavar="SOURCE", help="SOURCE for validation (default: a held-out part of SOURCE)"
        )


def run(args: argparse.Namespace) -> int:
    """Run the training; return 0, or 130 when interrupted."""
    import torch

    from kfloc_ros.pixloc.reference.model import PixLocModel, load_model
    from kfloc_ros.training.pixloc_stages import GnNetStage, PairStage, TwoViewStage

    config = _config(args)
    data = open_data(args, config)
    torch.manual_seed(config.seed)
    model = PixLocModel(config.model()) if args.weights is None else load_model(args.weights)
    model.config = config.trained(model.config)
    stage: PairStage = GnNetStage(model)
    if args.stage == "pixloc":
        stage = TwoViewStage(model, success_px=config.success_px, clamp_px=config.clamp_px)
    if data.validation is None:
        print("no validation: the source is too short, or validation_share=0; --validation gives another source")
    return run_training(args, stage, data.training, config, data.validation)


def _config(args: argparse.Namespace) -> PixLocTrainConfig:
    """Options of --conf and of the command's words, under either's names.

    Raises:
        ConfigError: a key is unknown or not taken.
    """
    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.training.pixloc_original import translate, translate_word
    from kfloc_ros.training.pixloc_stages import PixLocTrainConfig

    kind = args.source.partition(":")[0]
    words, notes = list[str](), list[str]()
    for content in (read_conf(args.conf), *map(translate_word, args.overrides)):
        translated = translate(content, args.stage, kind)
        words += translated.words
        notes += translated.notes
    for note in notes:
        print(f"no effect here: {note}")
    return build_config(PixLocTrainConfig, parse_overrides(PixLocTrainConfig, words))


@dataclass(frozen=True)
class Data:
    """Training and validation data."""

    training: Samples[Pairs]
    validation: Samples[Pairs] | None


def open_data(args: argparse.Namespace, config: PixLocTrainConfig) -> Data:
    """Open the pairs of the sources on the command line.

    Raises:
        SourceError: a source cannot be read, or has no pairs.
    """
    from kfloc_ros.training.pixloc_samples import PairSamples
    from kfloc_ros.training.preprocessed import KINDS, open_preprocessed
    from kfloc_ros.training.stage import hold_out

    rule = config.rule()
    kind, _, folder = args.source.partition(":")
    if kind in KINDS:
        if args.frames or args.split or args.validation:
            raise SourceError(f"{kind}:DIR has parts of its own for training and validation; leave out other choices.")
        parts = open_preprocessed(kind, Path(folder), rule, config.seed, config.validation_share, config.scenes())
        return Data(parts.training, parts.held_out)
    source = open_source_from(args)
    if args.validation is not None:
        other = PairSamples(open_source(args.validation, poses=args.poses), rule, config.seed)
        return Data(PairSamples(source, rule, config.seed), other)
    split = hold_out(source, config.validation_share)
    held_out = None if split.held_out is None else PairSamples(split.held_out, rule, config.seed)
    return Data(PairSamples(split.training, rule, config.seed), held_out)
