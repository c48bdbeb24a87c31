# SPDX-License-Identifier: Apache-2.0
"""The training loop of what aligns images: two learning rates, clipped gradients, guards, validation, exact resume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from kfloc_ros.config import option
from kfloc_ros.training.event_log import EventLog
from kfloc_ros.training.kfnet_trainer import (
    LOG_FILE,
    TrainingError,
    TrainProgress,
    TrainResult,
    forget_after,
    write_figures,
)
from kfloc_ros.training.pixloc_samples import PairRule
from kfloc_ros.training.pixloc_stages import Samples, TrainingStage
from kfloc_ros.training.state import Progress, load_state, save_state
from kfloc_ros.training.validation import Best, mean_figures

BatchT = TypeVar("BatchT")

MAX_SKIPPED = 20
"""Steps in a row without a finite gradient after which training ends."""
FREE_KEYS = frozenset({"steps", "snapshot_every", "log_every", "validate_every", "workers"})
"""Options that may change when a training is continued."""


@dataclass(frozen=True)
class LoopConfig:
    """Options of every such training, each settable as key=value."""

    steps: int = option(20_000, "Steps in all.", low=1)
    learning_rate: float = option(1e-5, "Of the features; published: 5e-6 (MegaDepth), 1e-5 (CMU).", low=0.0, high=1.0)
    damping_rate: float = option(100.0, "Times the learning rate, for the damping factors.", low=0.0, high=1e6)
    batch: int = option(3, "Pairs in a step.", low=1, high=256)
    clip: float = option(1.0, "Largest value of a gradient.", low=1e-9, high=1e9)
    seed: int = option(0, "Of initial weights and pairs.", low=0)
    validate_every: int = option(500, "Steps between looks at the held-out part; also at the start and end.", low=1)
    validation_pairs: int = option(60, "Pairs of the held-out part that are looked at, always the same.", low=1)
    snapshot_every: int = option(500, "Steps between checkpoints; one is also written at the end.", low=1)
    log_every: int = option(20, "Steps between lines of the log.", low=1)
    workers: int = option(4, "Threads that read images.", low=1, high=64)


@dataclass(frozen=True)
class PixLocTrainConfig(LoopConfig):
    """Options of ``kfloc train pixloc`` and ``gnnet``."""

    encoder: str = option("vgg16", "Of a network without --weights.", choices=("vgg16", "vgg19"))
    iterations: int = option(15, "Of the alignment, a level.", low=1, high=1000)
    pad: int = option(2, "Cells at a map's border that are not used.", low=1, high=16)
    success_px: float = option(3.0, "Error, in a level's cells, above which the next level does not count.", low=0.0)
    clamp_px: float = option(50.0, "Error above which there is no gradient.", low=0.0)
    resize: int = option(640, "Side that images are brought to.", low=32, high=8192)
    resize_by: str = option(
        "longer", "The side that is brought to it: longer, or shorter as published.", choices=("longer", "shorter")
    )
    crop: int = option(512, "Side of the squares that are cut out of them.", low=32, high=8192)
    points: int = option(512, "Points of a pair.", low=10, high=100_000)
    max_distance_m: float = option(2.0, "Between the views of a pair; a radian counts as 1.2 m.", low=0.0, high=1e6)
    min_overlap: float = option(0.3, "Share of the reference's points that the query sees.", low=0.0, high=1.0)
    init: str = option("interpolate", "Where alignments start.", choices=("identity", "interpolate", "max_error"))
    init_low: float = option(0.75, "Interpolate: least share of the true motion.", low=-10.0, high=10.0)
    init_high: float = option(1.0, "Interpolate: largest share.", low=-10.0, high=10.0)
    validation_share: float = option(
        0.1, "Share of the source, its last frames, that is held out for validation.", low=0.0, high=0.9
    )

    def rule(self) -> PairRule:
        """Which pairs, and how they are shown."""
        return PairRule(
            self.max_distance_m, self.min_overlap, self.resize, self.resize_by, self.crop, self.points, self.init,
            self.init_low, self.init_high,
        )  # fmt: skip


def train_stage(
    stage: TrainingStage[BatchT],
    samples: Samples[BatchT],
    config: LoopConfig,
    out: Path,
    device: torch.device,
    *,
    validation: Samples[BatchT] | None = None,
    time_budget_s: float = math.inf,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> TrainResult:
    """Train, or continue the training that ``out`` holds; writes checkpoints, logs and weights.

    A step whose loss or gradient is not finite is left out, and said in the log. Ctrl-C writes a checkpoint and
    returns. A training that was killed continues from its last checkpoint and arrives at the same weights as one that
    was not, on the same machine and number of threads. With a held-out part, the weights with the lowest loss on it
    are kept as well, with ``_best`` in their name.

    Raises:
        TrainingError: many steps in a row had no finite gradient.
        WeightsError: ``out`` holds a training of another kind or with other options.
    """
    model = stage.model.to(device).train()
    optimizer = torch.optim.Adam(stage.groups(config.learning_rate, config.damping_rate))
    described = {"stage": stage.name, **dataclasses.asdict(config)}
    found = load_state(out, {stage.weights_name: model}, optimizer, described, FREE_KEYS)
    progress = found or Progress(0, 0.0)
    out.mkdir(parents=True, exist_ok=True)
    start, step, stopped_by, skipped, left_out = time.monotonic(), progress.step, "finished", 0, 0
    best = Best.of(out)

    def snapshot() -> None:
        spent = progress.seconds + time.monotonic() - start
        save_state(out, {stage.weights_name: model}, optimizer, Progress(step, spent), described)
        stage.save(out / f"{stage.weights_name}.safetensors", f"trained here, step {step}")

    last_saved = step if found else -1
    forget_after(out / LOG_FILE, step)
    with (
        (out / LOG_FILE).open("a", encoding="utf-8") as log,
        EventLog(out, step) as events,
        ThreadPoolExecutor(config.workers) as workers,
    ):

        def note(figures: dict[str, float]) -> None:
            write_figures(log, step, figures)
            events.add(step, figures)
            on_progress(TrainProgress(step, config.steps, figures))

        def look() -> None:
            if validation is None:
                return
            figures = validate(stage, validation, config, device, workers)
            note(figures)
            best.offer(
                figures["validation/loss"],
                step,
                out / f"{stage.weights_name}_best.safetensors",
                lambda path: stage.save(path, f"trained here, step {step}, the best of its validation"),
            )

        try:
            if found is None:
                look()
            while step < config.steps:
                if time.monotonic() - start >= time_budget_s:
                    stopped_by = "time budget"
                    break
                batch = samples.batch(step * config.batch, config.batch, workers, device)
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
                result = stage.loss(batch, generator)
                taken = take_step(result.total, optimizer, config.clip)
                skipped, left_out = (0, left_out) if taken else (skipped + 1, left_out + 1)
                if skipped > MAX_SKIPPED:
                    raise TrainingError(
                        f"The last {skipped} steps had no finite gradient; the last checkpoint is good. Lower "
                        "learning_rate, or look at the depth and poses of the source."
                    )
                step += 1
                if step % config.log_every == 0 or step == config.steps:
                    note({"loss": float(result.total.detach()), "left_out": float(left_out), **result.figures})
                if step % config.validate_every == 0 or step == config.steps:
                    look()
                if step % config.snapshot_every == 0:
                    snapshot()
                    last_saved = step
        except KeyboardInterrupt:
            stopped_by = "interrupted"
        if last_saved != step:
            snapshot()
    return TrainResult(step, config.steps, stopped_by)


def validate(
    stage: TrainingStage[BatchT],
    samples: Samples[BatchT],
    config: LoopConfig,
    device: torch.device,
    workers: ThreadPoolExecutor | None = None,
) -> dict[str, float]:
    """Loss and figures on the held-out pairs, under ``validation/``; nothing of the training changes."""
    was_training = stage.model.training
    stage.model.eval()
    parts = []
    try:
        with torch.no_grad():
            for first in range(0, config.validation_pairs, config.batch):
                count = min(config.batch, config.validation_pairs - first)
                generator = torch.Generator().manual_seed(first)
                result = stage.loss(samples.batch(first, count, workers, device), generator)
                parts.append({"loss": float(result.total), **result.figures})
    finally:
        stage.model.train(was_training)
    return mean_figures(parts)


def take_step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, clip: float) -> bool:
    """One step, with every gradient's value clipped before it; False, and nothing changed, if one is not finite.

    A loss without a gradient, as of a batch that says nothing, takes no step either and is no fault.
    """
    if not bool(torch.isfinite(loss)):
        return False
    if not loss.requires_grad:
        return True
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(p.grad.isfinite().all()) for p in parameters):
        return False
    torch.nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()
    return True
