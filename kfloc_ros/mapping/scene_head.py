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

from kfloc_ros.kfnet.scoordnet import SCoordNet, laplace_nll, quick_matmul

WARM_UP_STEPS = 50
MIN_STEPS_PER_SECOND = 12.0
"""Fewest steps per second of training time: a busy or slow machine trains longer until it has made as many. Two idle
cores
make about 20, and the quality of a map must not depend on other load.
"""
MAX_STRETCH = 2.0
"""Largest ratio of the training time to the given time, on a machine of any speed."""


@dataclass(frozen=True)
class HeadTraining:
    """Options of the training of a head."""

    seconds: float
    steps: int = 0
    """End after this many steps, if time has not run out first, which makes a result repeatable; 0: by time alone."""
    width: int = 256
    blocks: int = 3
    batch: int = 8192
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    seed: int = 0
    min_steps_per_second: float = MIN_STEPS_PER_SECOND
    """Fewest steps per second of training time; 0: end at the given time."""


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
) -> SCoordNet:
    """Fit a head to cells for a given time or number of steps.

    Args:
        inputs: (N, 192) half precision, see ``head_input``.
        coordinates: (N, 3) float, metres, map frame.
        settings: time, size and schedule.
        device: device for training.
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
        with quick_matmul(device):  # without bfloat16 instructions, bfloat16 is half as fast as float32
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
        # A slow machine gets more time for the same steps, but at most MAX_STRETCH times the given time.
        elapsed_s = max(min(elapsed_s, step / settings.min_steps_per_second), elapsed_s / MAX_STRETCH)
    return max(by_steps, elapsed_s / settings.seconds)


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, share: float) -> None:
    """Set the learning rate: linear warm-up by steps, then a cosine to zero over the given time or steps."""
    rate = peak * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = rate
