# SPDX-License-Identifier: Apache-2.0
"""Training of a map's SCoordNet head: features of all views in one buffer, cells drawn at random.

Shuffling cells over all views decorrelates the gradients of a batch, which makes training in minutes possible.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kfloc_ros.device import quick_matmul
from kfloc_ros.kfnet.scoordnet import SCoordNet, laplace_nll

WARM_UP_STEPS = 50
MAX_STEPS = 2000
"""Limit on steps where none is given."""
MIN_STEPS, MIN_STEPS_PER_SECOND = 1500, 12.0
"""Steps that a slow or busy machine makes in any case, within ``MAX_STRETCH`` times the given time, and the same for a
shorter time, per second: the quality of a map must not depend on other load. Two idle cores make 20 a second."""
MAX_STRETCH = 2.0
"""Largest ratio of the training time to the given time, and to the time announced after ``ANNOUNCING_STEPS``."""
ANNOUNCING_STEPS = 100
DECAY_SHARE = 0.3
"""Share of the steps in which the learning rate falls to zero; before, it is constant."""
CHECK_STEPS = 200
CHECK_CELLS = 20_000
CHECKS_WITHOUT_GAIN, LEAST_GAIN = 3, 0.02
"""Number of checks in a row whose error is not lower than the best before, by this share, after which it has stopped
falling."""


@dataclass(frozen=True)
class HeadTraining:
    """Options of the training of a head."""

    seconds: float
    """Time after which training ends; it may end sooner."""
    steps: int = 0
    """End after exactly this many steps, if time has not run out first, which makes a result repeatable; 0: when the
    error on other cells stops falling, after ``MAX_STEPS`` at the latest."""
    width: int = 256
    blocks: int = 3
    batch: int = 8192
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    seed: int = 0
    stretches: bool = True
    """A slow machine takes up to ``MAX_STRETCH`` times the time; False: end at the given time."""


@dataclass(frozen=True)
class HeadProgress:
    """Progress of training, for display."""

    share_done: float
    step: int
    loss: float
    median_error_m: float


def train_head(
    inputs: torch.Tensor,
    coordinates: torch.Tensor,
    settings: HeadTraining,
    device: torch.device,
    on_progress: Callable[[HeadProgress], None],
    others: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SCoordNet:
    """Fit a head to cells until the error on other cells stops falling, for a time, or for a number of steps.

    Args:
        inputs: (N, 192) half precision, see ``head_input``.
        coordinates: (N, 3) float, metres, map frame.
        settings: time, size and schedule.
        device: device for training.
        on_progress: called about four times a second.
        others: (M, 192) half and (M, 3) of cells that are not trained on; None: training goes on to its limits.

    Returns:
        The head, in evaluation mode, on the CPU.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    head = SCoordNet(settings.width, settings.blocks)
    sample = torch.randint(len(inputs), (min(len(inputs), 50_000),), generator=generator)
    head.normalize_with(inputs[sample].float(), coordinates[sample])
    head.to(device).train()
    inputs, coordinates = inputs.to(device), coordinates.to(device)
    check = None if others is None or settings.steps or not len(others[0]) else _Check(*others, device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=settings.weight_decay, fused=True)
    limits = _Limits(settings)
    last_report = time.monotonic()
    step, loss_value, error_value = 0, math.nan, math.nan
    while (share := limits.share_done(step)) < 1.0:
        _set_learning_rate(optimizer, settings.learning_rate, step, share)
        index = torch.randint(len(inputs), (settings.batch,), generator=generator).to(device)
        with quick_matmul(device):  # without bfloat16 instructions, bfloat16 is half as fast as float32
            predicted, log_scale = head(inputs[index].float())
        error = (predicted - coordinates[index]).norm(dim=1)
        loss = laplace_nll(error, log_scale).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        step += 1
        if check is not None and step % CHECK_STEPS == 0 and check.stopped_falling(head):
            limits.begin_end(step)
            check = None
        if time.monotonic() - last_report > 0.25:
            last_report = time.monotonic()
            loss_value, error_value = float(loss.detach()), float(error.detach().median())
            on_progress(HeadProgress(share, step, loss_value, error_value))
    on_progress(HeadProgress(1.0, step, loss_value, error_value))
    return head.cpu().eval()


class _Check:
    """Error of a head on cells that it is not trained on, from check to check."""

    def __init__(self, inputs: torch.Tensor, coordinates: torch.Tensor, device: torch.device) -> None:
        every = slice(None, None, -(-len(inputs) // CHECK_CELLS))
        self._inputs, self._coordinates = inputs[every].to(device), coordinates[every].to(device)
        self._best_m, self._without_gain = math.inf, 0

    def stopped_falling(self, head: SCoordNet) -> bool:
        """Measure the median error; return True if the last checks brought no gain."""
        with torch.inference_mode(), quick_matmul(self._inputs.device):
            predicted, _ = head(self._inputs.float())
            error_m = float((predicted - self._coordinates).norm(dim=1).median())
        if error_m < (1.0 - LEAST_GAIN) * self._best_m:
            self._best_m, self._without_gain = error_m, 0
        else:
            self._without_gain += 1
        return self._without_gain >= CHECKS_WITHOUT_GAIN


class _Limits:
    """Share of the training that is done, by time and by steps, whichever is further."""

    def __init__(self, settings: HeadTraining) -> None:
        self._settings, self._start = settings, time.monotonic()
        self._faster = 1.0
        self._announced_s = math.inf

    def share_done(self, step: int) -> float:
        """Return the share before a step."""
        settings, elapsed_s = self._settings, time.monotonic() - self._start
        by_time = elapsed_s / settings.seconds
        if settings.stretches:
            least = min(MIN_STEPS, MIN_STEPS_PER_SECOND * settings.seconds)
            by_time = max(min(by_time, step / least), by_time / MAX_STRETCH)
        share = self._faster * max(by_time, step / (settings.steps or MAX_STEPS))
        if step == ANNOUNCING_STEPS:
            self._announced_s = elapsed_s / max(share, 1e-9)
        return max(share, elapsed_s / (MAX_STRETCH * self._announced_s))

    def begin_end(self, step: int) -> None:
        """Let the learning rate fall from now on; the rest takes as long as ``DECAY_SHARE`` says."""
        self._faster *= max(1.0, (1.0 - DECAY_SHARE) / self.share_done(step))


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, share: float) -> None:
    """Set the learning rate: linear warm-up by steps, then constant, and at last a cosine to zero."""
    ending = max(0.0, (share - (1.0 - DECAY_SHARE)) / DECAY_SHARE)
    rate = peak * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * ending))
    for group in optimizer.param_groups:
        group["lr"] = rate
