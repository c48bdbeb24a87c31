# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, one for each GPU or share of the CPUs, started by ``torchrun``.

Every process reads its share of each batch; gradients are averaged by DistributedDataParallel. What a loss divides by,
what it draws at random and what a batch normalization averages are those of the whole batch, so that W processes make
the step that one would make of W times the batch. Without ``torchrun`` there is one process, and nothing is exchanged.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfloc_ros.training.stage import ItemT, Stage


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did; yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    device = own_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: of several on one machine, each has a GPU of its own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def rank() -> int:
    """The number of this process; 0 writes what a training leaves behind."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """Return the mean over the processes of what a batch's loss is divided by.

    Sums over parts of the batch, divided by it and averaged over processes, are the whole batch's mean.
    """
    if world_size() == 1:
        return count
    total = count.double()
    dist.all_reduce(total)
    return total / world_size()


def draw(random: Callable[..., torch.Tensor], shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draw what belongs to this process's part of a batch: ``shape`` (B, ...) of the whole batch's (W B, ...)."""
    size, first = shape[0], rank() * shape[0]
    return random((world_size() * size, *shape[1:]), generator=generator)[first : first + size]


def agree(value: int, lowest: bool = False) -> int:
    """Return the highest of all processes' values, or the lowest."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value])
    dist.all_reduce(shared, op=dist.ReduceOp.MIN if lowest else dist.ReduceOp.MAX)
    return int(shared)


def mean_of_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the means over the processes of figures with the same keys; what is nowhere finite stays NaN."""
    if world_size() == 1:
        return dict(figures)
    values = torch.tensor(list(figures.values()), dtype=torch.float64)
    finite = values.isfinite()
    shared = torch.stack([torch.where(finite, values, torch.zeros_like(values)), finite.double()])
    dist.all_reduce(shared)
    return dict(zip(figures, (shared[0] / shared[1]).tolist(), strict=True))


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Tell whether this process was asked to stop.

    With several processes SIGINT and SIGTERM are noted, not raised: all must end after the same step. With one,
    Ctrl-C raises KeyboardInterrupt as ever.
    """
    asked: list[int] = []
    if world_size() == 1:
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StageModule(nn.Module):
    """A stage as a module, whose forward pass is its loss: what DistributedDataParallel wraps."""

    def __init__(self, stage: Stage[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(stage.modules())
        self._stage = stage
        self.figures: dict[str, float] = {}

    def forward(self, items: Sequence[Any], generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch; its figures are kept."""
        result = self._stage.loss(items, generator)
        self.figures = result.figures
        return result.total


def parallel_loss(
    stage: Stage[ItemT],
) -> Callable[[Sequence[ItemT], torch.Generator], tuple[torch.Tensor, dict[str, float]]]:
    """Return the loss of a stage, whose gradients are averaged over the processes, and its figures."""
    module = StageModule(stage)
    forward: nn.Module = module
    if world_size() > 1:
        for part in module.parts.values():
            share_batch_norm(part)
        forward = DistributedDataParallel(module, find_unused_parameters=stage.leaves_parameters_out)
    return lambda items, generator: (forward(items, generator), module.figures)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, differentiable."""
    total: torch.Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalization over all processes' parts of a batch, on CPUs as well as on GPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize (B, C, H, W)."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * count / (count - 1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def share_batch_norm(module: nn.Module) -> None:
    """Let every batch normalization in a module average over all processes; its parameters stay the same objects."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d and child.affine:
            child.__class__ = SharedBatchNorm
