# SPDX-License-Identifier: Apache-2.0
"""Arguments and main function of all trainings of ``kfloc train``, and the stages ``pixloc`` and ``gnnet``."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import ConfigError, SourceError, WeightsError
from kfloc_ros.files import read_text

if TYPE_CHECKING:
    from kfloc_ros.training.loop import LoopConfig, TrainProgress
    from kfloc_ros.training.pixloc_samples import Pairs
    from kfloc_ros.training.pixloc_stages import PixLocTrainConfig
    from kfloc_ros.training.stage import ItemT, Samples, Stage

SHOWN_FIGURES = 4
MAX_CONF_BYTES = 100_000
TRAININGS = Path("outputs/training")
"""Folder of experiments, as in the original."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out, --conf, --time-budget and --device."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of this training; or experiment=NAME: outputs/training/NAME"
    )
    parser.add_argument("--conf", type=Path, metavar="FILE", help="YAML with options; key=value words override it")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="S", help="stop after this many seconds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")


def read_conf(path: Path | None) -> dict[str, Any]:
    """Return the options in the YAML of ``--conf``; empty if there is none.

    Raises:
        ConfigError: the file cannot be read, or has no keys.
    """
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(read_text(path, MAX_CONF_BYTES))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration '{path}' cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration '{path}' has no lines 'key: value'.")
    return content


def conf_words(path: Path | None) -> list[str]:
    """Return the options of a ``--conf`` file as ``key=value`` words.

    Raises:
        ConfigError: see :func:`read_conf`; or a value is not a number, text or truth value.
    """
    words = []
    for key, value in read_conf(path).items():
        if isinstance(value, (dict, list)) or value is None:
            raise ConfigError(f"'{path}' has no single value for '{key}'.")
        words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return words


def choose_folder(args: argparse.Namespace) -> None:
    """Set ``args.out`` from ``experiment=NAME``, and remove that word from the options.

    Raises:
        ConfigError: neither it nor --out is given, or both are, or the name is a path.
    """
    names = [word.partition("=")[2] for word in args.overrides if word.startswith("experiment=")]
    args.overrides = [word for word in args.overrides if not word.startswith("experiment=")]
    if len(names) + (args.out is not None) != 1:
        raise ConfigError("Give the folder of this training once: --out DIR, or experiment=NAME.")
    if names:
        args.out = experiment_folder(names[0])


def experiment_folder(name: str) -> Path:
    """Return the folder of a training with an experiment's name.

    Raises:
        ConfigError: the name is empty or a path.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"The name of an experiment must not be a path, got '{name}'; use --out for paths.")
    return TRAININGS / name


EXPERIMENT_FILES = ("pixloc_best.safetensors", "pixloc.safetensors", "checkpoint_best.tar")
"""Weights in the folder of a training, of this package or the original, the first preferred."""


def experiment_weights(name: str) -> Path:
    """Return the file of PixLoc's weights of a training by its name.

    Raises:
        ConfigError: the name is empty or a path.
        WeightsError: the training has no weights.
    """
    folder = experiment_folder(name)
    for file in EXPERIMENT_FILES:
        if (folder / file).is_file():
            return folder / file
    raise WeightsError(
        f"There are no weights in '{folder}' ({', '.join(EXPERIMENT_FILES)}); give --weights FILE or experiment=NAME."
    )


def describe_options(config_type: type) -> str:
    """Return the help text of a training's key=value options."""
    from kfloc_ros.config import options_of

    return "options as key=value:\n" + "\n".join(f"  {o.name}={o.default}  {o.text}" for o in options_of(config_type))


def run_training(
    args: argparse.Namespace,
    stage: Stage[ItemT],
    samples: Samples[ItemT],
    config: LoopConfig,
    validation: Samples[ItemT] | None = None,
    continued: Path | None = None,
) -> int:
    """Train with a progress bar and print the result; return 0, or 130 when interrupted."""
    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.device import choose_device
    from kfloc_ros.training.distributed import processes, rank
    from kfloc_ros.training.loop import train

    with (
        processes(choose_device(args.device)) as device,
        progress_bar(unit="step", disable=rank() != 0) as bar,
    ):

        def show(progress: TrainProgress) -> None:
            bar.total = progress.steps
            figures = [item for item in progress.figures.items() if item[0] != "learning_rate"][:SHOWN_FIGURES]
            bar.set_postfix({key: f"{value:.3g}" for key, value in figures}, refresh=False)
            bar.update(progress.step - bar.n)

        result = train(
            stage, samples, config, args.out, device, validation=validation,
            continued=continued, time_budget_s=args.time_budget, on_progress=show,
        )  # fmt: skip
        is_first = rank() == 0
    if is_first:
        print(f"{args.out}: step {result.step:,} of {result.steps:,} ({result.stopped_by})")
    return 130 if result.stopped_by == "interrupted" else 0


NETWORKS = {
    "pixloc": "PixLoc on pairs of views: pose errors through the alignment",
    "gnnet": "PixLoc's network with GN-Net's losses at true correspondences",
}

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
