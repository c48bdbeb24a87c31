# SPDX-License-Identifier: Apache-2.0
"""Arguments and main function shared by all trainings of ``kfloc train``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.errors import ConfigError, WeightsError
from kfloc_ros.files import read_text

if TYPE_CHECKING:
    from kfloc_ros.training.loop import LoopConfig, TrainProgress
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
    from kfloc_ros.cli.progress import progress_bar
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
