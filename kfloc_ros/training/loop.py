# SPDX-License-Identifier: Apache-2.0
"""The training loop: schedule, guards, validation, log, checkpoints, exact resume, time budget.

What is trained is a :class:`Stage`; the numbers it is trained by are a :class:`LoopConfig`, which makes a
:class:`Schedule` of itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch

from kfloc_ros.config import option
from kfloc_ros.errors import KflocError, WeightsError
from kfloc_ros.training.distributed import agree, interruptions, mean_of_figures, parallel_loss, rank, world_size
from kfloc_ros.training.stage import Best, ItemT, Samples, Stage, mean_figures, prefetched
from kfloc_ros.training.state import Progress, TrainingLog, load_state, save_state

STOPPED_BY = {1: "time budget", 2: "interrupted"}


class TrainingError(KflocError):
    """Training cannot go on: it has no finite gradient any more."""


@dataclass(frozen=True)
class Schedule:
    """The numbers that a training runs by."""

    first: int
    """Step that it starts at."""
    last: int
    """Step that it ends at."""
    batch: int
    rates: Callable[[int], Sequence[float]]
    """Learning rate of each group of parameters at a step."""
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest value of a gradient; None: not clipped."""
    max_skipped: int = 0
    """Steps in a row without a finite gradient that are left out; one more ends the training."""
    precision: str = "float32"
    compile: bool = False
    validate_every: int = 0
    """Steps between validations; 0: none."""
    validation_items: int = 0


@dataclass(frozen=True)
class LoopConfig(ABC):
    """Options of every training, each settable as key=value."""

    FREE_KEYS: ClassVar[frozenset[str]] = frozenset({"steps", "snapshot_every", "log_every", "workers"})
    """Options that may change when a training is continued."""

    steps: int = option(0, "Steps in all.", low=0)
    learning_rate: float = option(1e-4, "Of the networks.", low=0.0, high=1.0)
    batch: int = option(0, "Samples in a step.", low=0, high=1024)
    seed: int = option(0, "Of initial weights, order and augmentation.", low=0)
    snapshot_every: int = option(5000, "Steps between checkpoints; one is also written at the end.", low=1)
    log_every: int = option(50, "Steps between lines of the log.", low=1)
    workers: int = option(4, "Threads that read images.", low=1, high=64)

    @abstractmethod
    def schedule(self, stage: Stage[Any]) -> Schedule:
        """Return the numbers that the training of a stage runs by."""


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


def train(
    stage: Stage[ItemT],
    samples: Samples[ItemT],
    config: LoopConfig,
    out: Path,
    device: torch.device,
    *,
    validation: Samples[ItemT] | None = None,
    continued: Path | None = None,
    time_budget_s: float = math.inf,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> TrainResult:
    """Train, or continue the training that ``out`` holds; write checkpoints, the log and the networks' weights.

    Ctrl-C writes a checkpoint and returns. A training that was killed continues from its last checkpoint and arrives
    at the same weights as one that was not, on the same machine and number of threads. With validation, the weights
    with the lowest loss on it are kept as well, with ``_best`` in their names. Where ``out`` holds no training yet,
    that of the folder ``continued`` goes on there: with its weights, its optimizer's state and its step.

    Raises:
        TrainingError: too many steps in a row had no finite gradient.
        WeightsError: ``out`` holds a training of another stage or configuration.
    """
    return _Run(stage, config, out, device, continued, on_progress).make(samples, validation, time_budget_s)


class _Run(Generic[ItemT]):
    """One run of a training, from its last checkpoint on."""

    def __init__(
        self,
        stage: Stage[ItemT],
        config: LoopConfig,
        out: Path,
        device: torch.device,
        continued: Path | None,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        self.stage, self.config, self.out, self.device, self.on_progress = stage, config, out, device, on_progress
        self.schedule = config.schedule(stage)
        self.modules = stage.modules()
        for module in self.modules.values():
            module.to(device).train()
        self.optimizer = torch.optim.Adam(
            [{"params": group} for group in stage.groups()], lr=0.0, weight_decay=self.schedule.weight_decay
        )
        self.described = {"stage": stage.name, "processes": world_size(), **dataclasses.asdict(config)}
        found = load_state(out, self.modules, self.optimizer, self.described, config.FREE_KEYS)
        self.is_new = found is None
        if found is None and continued is not None:
            found = load_state(continued, self.modules, self.optimizer, {})
            if found is None:
                raise WeightsError(f"'{continued}' holds no training to continue; name the --out of one.")
        self.progress = found or Progress(self.schedule.first, 0.0)
        self.step = self.progress.step
        self.saved_step = -1 if self.is_new else self.step
        self.skipped, self.left_out = 0, 0
        self.best = Best.of(out)
        if self.schedule.compile:
            for part in stage.compiled_parts():
                part.compile()
        self.loss = parallel_loss(stage)
        self.start = time.monotonic()

    def make(self, samples: Samples[ItemT], validation: Samples[ItemT] | None, time_budget_s: float) -> TrainResult:
        schedule, config = self.schedule, self.config
        self.out.mkdir(parents=True, exist_ok=True)
        # each process reads its part of a batch that is as many times as large
        whole_batch, own = schedule.batch * world_size(), schedule.batch * rank()
        numbers = (
            range(first + own, first + own + schedule.batch)
            for first in itertools.count((self.step - schedule.first) * whole_batch, whole_batch)
        )
        stopped_by = "finished"
        workers = ThreadPoolExecutor(config.workers)
        with TrainingLog(self.out, self.step, writes=rank() == 0) as log, interruptions() as is_interrupted:
            try:
                if self.is_new:
                    self._validate(validation, workers, log)
                batches = prefetched(samples, numbers, workers)
                while self.step < schedule.last:
                    asked = 2 if is_interrupted() else int(time.monotonic() - self.start >= time_budget_s)
                    if reason := agree(asked):
                        stopped_by = STOPPED_BY[reason]
                        break
                    figures = self._make_step(next(batches))
                    if self.step % config.log_every == 0 or self.step == schedule.last:
                        self._note(log, mean_of_figures(figures))
                    if schedule.validate_every and (
                        self.step % schedule.validate_every == 0 or self.step == schedule.last
                    ):
                        self._validate(validation, workers, log)
                    if self.step % config.snapshot_every == 0:
                        self._snapshot()
            except KeyboardInterrupt:
                stopped_by = "interrupted"
            finally:
                workers.shutdown(wait=True, cancel_futures=True)
            if self.saved_step != self.step:
                self._snapshot()
        return TrainResult(self.step, schedule.last, stopped_by)

    def _make_step(self, items: Sequence[ItemT]) -> dict[str, float]:
        rates = self.schedule.rates(self.step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.precision == "bfloat16"):
            total, figures = self.loss([item.to(self.device) for item in items], generator)
        taken = take_step(total, self.optimizer, self.schedule.clip)
        self.skipped, self.left_out = (0, self.left_out) if taken else (self.skipped + 1, self.left_out + 1)
        loss = float(total.detach())
        if self.skipped > self.schedule.max_skipped:
            raise TrainingError(
                f"The last {self.skipped} steps had no finite gradient, with a loss of {loss}; the last checkpoint is "
                "good. Lower learning_rate, or look at the depth and poses of the source."
            )
        self.step += 1
        left_out = {"left_out": float(self.left_out)} if self.schedule.max_skipped else {}
        return {"learning_rate": rates[0], "loss": loss, **left_out, **figures}

    def _validate(self, samples: Samples[ItemT] | None, workers: ThreadPoolExecutor, log: TrainingLog) -> None:
        if samples is None or not self.schedule.validate_every:
            return
        figures = validate(self.stage, samples, self.schedule, self.device, workers)
        self._note(log, figures)
        files = {self.out / f"{name}_best.safetensors": name for name in self.modules}
        origin = f"trained here, step {self.step}, the best of its validation"
        if rank() == 0:
            self.best.offer(
                figures["validation/loss"], self.step, files, lambda path, name: self.stage.write(name, path, origin)
            )

    def _note(self, log: TrainingLog, figures: dict[str, float]) -> None:
        log.add(self.step, figures)
        self.on_progress(TrainProgress(self.step, self.schedule.last, figures))

    def _snapshot(self) -> None:
        self.saved_step = self.step
        if rank() != 0:
            return
        spent = self.progress.seconds + time.monotonic() - self.start
        save_state(self.out, self.modules, self.optimizer, Progress(self.step, spent), self.described)
        for name in self.modules:
            self.stage.write(name, self.out / f"{name}.safetensors", f"trained here, step {self.step}")


def validate(
    stage: Stage[ItemT],
    samples: Samples[ItemT],
    schedule: Schedule,
    device: torch.device,
    workers: ThreadPoolExecutor,
) -> dict[str, float]:
    """Return loss and figures on held-out samples, under ``validation/``; nothing of the training changes.

    Several processes share the batches; the samples are then as many as fill them all.
    """
    modules = stage.modules().values()
    was_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    parts = []
    count = schedule.validation_items
    whole_batch, own = schedule.batch * world_size(), schedule.batch * rank()
    limit = count if world_size() == 1 else math.ceil(count / whole_batch) * whole_batch
    numbers = [range(first, min(first + schedule.batch, limit)) for first in range(own, limit, whole_batch)]
    try:
        with torch.no_grad():
            for batch, items in zip(numbers, prefetched(samples, numbers, workers), strict=True):
                generator = torch.Generator().manual_seed(batch.start - own)
                result = stage.loss([item.to(device) for item in items], generator)
                parts.append({"loss": float(result.total), **result.figures})
    finally:
        for module, mode in zip(modules, was_training, strict=True):
            module.train(mode)
    return mean_of_figures(mean_figures(parts))


def take_step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, clip: float | None) -> bool:
    """Take one step, every gradient's value clipped before it; False, with nothing changed, if one is not finite.

    A loss without a gradient, as of a batch that says nothing, takes no step either and is no fault. Where several
    processes train, all take the step or none.
    """
    if not agree(bool(torch.isfinite(loss)), lowest=True):
        return False
    if not agree(loss.requires_grad, lowest=True):
        return True
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(p.grad.isfinite().all()) for p in parameters):
        return False
    if clip is not None:
        torch.nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()
    return True
