# SPDX-License-Identifier: Apache-2.0
"""Training a map's SCoordNet head: features of all views in one buffer, cells drawn at random.

Shuffling cells over all views decorrelates the gradients of a batch, which is what makes minutes enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kfloc_ros.kfnet.scoordnet import SCoordNet, laplace_nll, quick_matmul

WARM_UP_STEPS = 50
MIN_STEPS_PER_SECOND = 12.0
"""A busy or slower machine trains for longer than it was given, until it has made so many steps for every second
given: two idle cores make about 20, and a map must not be bad because something else ran beside its making."""
MAX_STRETCH = 2.0
"""Training never takes more than this times the seconds given, however slow the machine is."""


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained."""

    seconds: float
    steps: int = 0
    """End after so many steps if the time has not run out first, which makes a result repeatable; 0: by time alone."""
    width: int = 256
    blocks: int = 3
    batch: int = 8192
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    seed: int = 0
    min_steps_per_second: float = MIN_STEPS_PER_SECOND
    """0: the time given is a promise, however little is learned in it."""


@dataclass(frozen=True)
class HeadProgress:
    """State of training, for display."""

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
) -> SCoordNet:
    """Fit a head to cells for a given time or number of steps.

    Args:
        inputs: (N, 192) half precision, see ``head_input``.
        coordinates: (N, 3) float, metres, map frame.
        settings: time, size and schedule.
        device: where to train.
        on_progress: called about four times a second.

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
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.0, weight_decay=settings.weight_decay)
    start = last_report = time.monotonic()
    step, loss_value, error_value = 0, math.nan, math.nan
    while (share := _share_done(step, time.monotonic() - start, settings)) < 1.0:
        _set_learning_rate(optimizer, settings.learning_rate, step, share)
        index = torch.randint(len(inputs), (settings.batch,), generator=generator).to(device)
        with quick_matmul(device):  # a processor without bfloat16 computes it at half the speed of float32
            predicted, log_scale = head(inputs[index].float())
        error = (predicted - coordinates[index]).norm(dim=1)
        loss = laplace_nll(error, log_scale).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - last_report > 0.25:
            last_report = time.monotonic()
            loss_value, error_value = float(loss.detach()), float(error.detach().median())
            on_progress(HeadProgress(share, step, loss_value, error_value))
    on_progress(HeadProgress(1.0, step, loss_value, error_value))
    return head.cpu().eval()


def _share_done(step: int, elapsed_s: float, settings: HeadTraining) -> float:
    by_steps = step / settings.steps if settings.steps else 0.0
    if settings.min_steps_per_second:
        # A slow machine gets more time for the same steps, but never more than MAX_STRETCH times what was announced.
        elapsed_s = max(min(elapsed_s, step / settings.min_steps_per_second), elapsed_s / MAX_STRETCH)
    return max(by_steps, elapsed_s / settings.seconds)


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, share: float) -> None:
    """Linear warm-up by steps, then a cosine to zero over what is given."""
    rate = peak * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = rate
