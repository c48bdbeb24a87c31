# SPDX-License-Identifier: Apache-2.0
"""Arguments and main function shared by all trainings of ``kfloc train``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfloc_ros.training.loop import LoopConfig, TrainProgress
    from kfloc_ros.training.stage import ItemT, Samples, Stage

SHOWN_FIGURES = 4


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --out, --time-budget and --device."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this training")
    parser.add_argument("--time-budget", type=float, default=math.inf, metavar="S", help="stop after this many seconds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")


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
    from tqdm import tqdm

    from kfloc_ros.device import choose_device
    from kfloc_ros.training.distributed import processes, rank
    from kfloc_ros.training.loop import train

    with (
        processes(choose_device(args.device)) as device,
        tqdm(unit="step", disable=rank() != 0 or not sys.stderr.isatty()) as bar,
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
