# SPDX-License-Identifier: Apache-2.0
"""The training loop of KFNet's networks: schedule, checkpoints, exact resume, time budget."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfloc_ros.config import option
from kfloc_ros.errors import KflocError
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.training.event_log import EventLog
from kfloc_ros.training.kfnet_samples import Numbered, prefetched
from kfloc_ros.training.kfnet_stages import JointStage, SampleT, Stage
from kfloc_ros.training.state import Progress, load_state, save_state

LOG_FILE = "log.jsonl"
FREE_KEYS = frozenset({"steps", "snapshot_every", "log_every", "workers", "remember_mb", "precision", "compile"})
"""Options that may change when a training is continued."""


class TrainingError(KflocError):
    """Training cannot go on: its loss is no number any more."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``kfloc train``, each settable as key=value; the defaults are the published schedule."""

    steps: int = option(0, "Steps in all; 0: five halvings of the learning rate.", low=0)
    halving_steps: int = option(100_000, "Steps in which the learning rate halves, continuously.", low=1)
    learning_rate: float = option(1e-4, "At step 0.", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "L2 on all variables, added to the gradient.", low=0.0)
    batch: int = option(0, "Samples in a step; 0: 4 images, 1 pair or 1 group of four.", low=0, high=1024)
    width: float = option(1.0, "Share of SCoordNet's published channels.", low=0.01, high=4.0)
    padding: str = option("centred", "Of convolutions.", choices=("centred", "tensorflow"))
    scale: float = option(1.0, "Network units per metre; below 1 for large outdoor scenes.", low=1e-6, high=1e3)
    image_width: int = option(0, "Scale images to this width; 0 keeps them.", low=0, high=10_000)
    image_height: int = option(0, "And to this height; 0 keeps their shape, to a multiple of 8.", low=0, high=10_000)
    augment: str = option("stage", "Augmentation.", choices=("stage", "none", "rotate", "full"))
    max_step: int = option(1, "Largest step of the frame index between neighbouring frames.", low=1)
    spacing: int = option(1, "Frames from one of a group to the next; more where images are small.", low=1, high=1000)
    truncation: bool = option(True, "Truncate the likelihood in stages 2 and 3.")
    fix_flow: bool = option(False, "Stage 3: train SCoordNet only.")
    precision: str = option("float32", "Of the forward pass.", choices=("float32", "bfloat16"))
    compile: bool = option(False, "Compile the networks; pays on a GPU after some minutes.")
    seed: int = option(0, "Of initial weights, order and augmentation.", low=0)
    snapshot_every: int = option(5000, "Steps between checkpoints; one is also written at the end.", low=1)
    log_every: int = option(50, "Steps between lines of the log.", low=1)
    workers: int = option(4, "Threads that read images.", low=1, high=64)
    remember_mb: int = option(
        2000,
        "Images and depth kept in memory, at the networks' size, so that they are read once.",
        low=0,
        high=1_000_000,
    )


@dataclass(frozen=True)
class TrainProgress:
    """State of training, for display."""

    step: int
    steps: int
    figures: dict[str, float]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    steps: int
    stopped_by: str
    """``finished``, ``time budget`` or ``interrupted``."""


def total_steps(stage: Stage[SampleT], config: TrainConfig) -> int:
    """Step at which training ends."""
    return config.steps or 5 * config.halving_steps


def first_step(stage: Stage[SampleT], config: TrainConfig) -> int:
    """Stage 3 runs through the last of the five halvings only."""
    return 4 * config.halving_steps if isinstance(stage, JointStage) and not config.steps else 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """Continuous halving."""
    return float(config.learning_rate * 0.5 ** (step / config.halving_steps))


def train(
    stage: Stage[SampleT],
    samples: Numbered[SampleT],
    config: TrainConfig,
    out: Path,
    device: torch.device,
    *,
    time_budget_s: float = math.inf,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> TrainResult:
    """Train, or continue the training that ``out`` holds; writes checkpoints, logs and the networks' weights.

    The figures of every ``log_every`` steps go into ``log.jsonl`` and into an event file for TensorBoard.
    Ctrl-C writes a checkpoint and returns. A training that was killed continues from its last checkpoint and arrives
    at the same weights as one that was not, on the same machine and number of threads.

    Raises:
        TrainingError: the loss is not finite.
        WeightsError: ``out`` holds a training of another stage or configuration.
    """
    modules = stage.modules()
    for module in modules.values():
        module.to(device).train()
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0, weight_decay=config.weight_decay)
    described = {"stage": stage.name, **dataclasses.asdict(config)}
    found = load_state(out, modules, optimizer, described, FREE_KEYS)
    progress = found or Progress(first_step(stage, config), 0.0)
    start, steps, first = time.monotonic(), total_steps(stage, config), first_step(stage, config)
    batch = config.batch or stage.batch
    if config.compile:
        _compile(modules)
    out.mkdir(parents=True, exist_ok=True)
    step, stopped_by = progress.step, "finished"

    def snapshot() -> None:
        spent = progress.seconds + time.monotonic() - start
        save_state(out, modules, optimizer, Progress(step, spent), described)
        stage.save(out)

    last_saved = step if found else -1
    forget_after(out / LOG_FILE, step)
    with (
        (out / LOG_FILE).open("a", encoding="utf-8") as log,
        EventLog(out, step) as events,
        closing(prefetched(samples, (step - first) * batch, batch, config.workers)) as batches,
    ):
        try:
            while step < steps:
                if time.monotonic() - start >= time_budget_s:
                    stopped_by = "time budget"
                    break
                figures = _step(stage, next(batches), optimizer, learning_rate(step, config), config, device)
                step += 1
                if step % config.log_every == 0 or step == steps:
                    figures = {"learning_rate": learning_rate(step - 1, config), **figures}
                    write_figures(log, step, figures)
                    events.add(step, figures)
                    on_progress(TrainProgress(step, steps, figures))
                if step % config.snapshot_every == 0:
                    snapshot()
                    last_saved = step
        except KeyboardInterrupt:
            stopped_by = "interrupted"
        if last_saved != step:
            snapshot()
    return TrainResult(step, steps, stopped_by)


def _step(
    stage: Stage[SampleT],
    groups: Sequence[SampleT],
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    moved = [group.to(device) for group in groups]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        result = stage.loss(moved)
    if not bool(torch.isfinite(result.total)):
        raise TrainingError(
            f"The loss is {float(result.total.detach())}; the last checkpoint is good. Lower learning_rate."
        )
    optimizer.zero_grad(set_to_none=True)
    result.total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return {"loss": float(result.total.detach()), **result.figures}


def _compile(modules: Mapping[str, nn.Module]) -> None:
    """Compile in place what runs in one go; the names of the weights stay."""
    for module in modules.values():
        parts = [module.features, module.unet] if isinstance(module, ReferenceOFlowNet) else [module]
        for part in parts:
            part.compile()


def write_figures(stream: Any, step: int, figures: dict[str, float]) -> None:
    """One line of the log."""
    clean = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    stream.write(json.dumps({"step": step, **clean}) + "\n")
    stream.flush()


def forget_after(log: Path, step: int) -> None:
    """Cut off what a run that was killed logged after its last checkpoint: these steps are made again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line that the kill cut short
    temporary = log.with_name(f".{log.name}.new")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(log)
