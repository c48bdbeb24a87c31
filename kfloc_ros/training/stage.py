# SPDX-License-Identifier: Apache-2.0
"""What the training loop asks for: samples by number, and a stage that makes a loss of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn

BATCHES_AHEAD = 4
"""Batches that are being read while a step is made."""

ItemT = TypeVar("ItemT", bound="Item")
ItemT_co = TypeVar("ItemT_co", bound="Item", covariant=True)


class Item(Protocol):
    """A training sample."""

    def to(self: ItemT, device: torch.device) -> ItemT:
        """Return the same sample on a device."""
        ...


class Samples(Protocol[ItemT_co]):
    """Samples by number, without end; the k-th is always the same, and several threads read at once."""

    def __getitem__(self, number: int) -> ItemT_co: ...


@dataclass(frozen=True, eq=False)
class StepLoss:
    """Loss of a batch, and figures for the log."""

    total: torch.Tensor
    figures: dict[str, float]


class Stage(ABC, Generic[ItemT]):
    """Networks with a loss: what the loop trains."""

    name: ClassVar[str]
    batch: ClassVar[int] = 1
    """Samples in a step, as published."""

    leaves_parameters_out: ClassVar[bool] = False
    """Some parameters take no part in the loss."""
    last_halving_only: ClassVar[bool] = False
    """The published schedule covers the last halving of the learning rate alone."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Return what is trained, by the names of the files that the weights go to."""

    @abstractmethod
    def loss(self, items: Sequence[ItemT], generator: torch.Generator) -> StepLoss:
        """Return the loss of a batch.

        Args:
            items: samples on the modules' device.
            generator: on the CPU, of all random choices.
        """

    @abstractmethod
    def write(self, name: str, path: Path, origin: str) -> None:
        """Write the weights of one of the modules as those who use them read them; ``origin`` says how they came."""

    def groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters, one list for each learning rate of the configuration."""
        return [[p for module in self.modules().values() for p in module.parameters() if p.requires_grad]]

    def compiled_parts(self) -> list[nn.Module]:
        """Return what ``compile=true`` compiles."""
        return list(self.modules().values())


def prefetched(
    samples: Samples[ItemT], batches: Iterable[Sequence[int]], workers: ThreadPoolExecutor, ahead: int = BATCHES_AHEAD
) -> Iterator[list[ItemT]]:
    """Yield batches of samples, given by their numbers and read by threads a few batches ahead."""
    waiting: deque[list[Future[ItemT]]] = deque()
    for numbers in batches:
        waiting.append([workers.submit(samples.__getitem__, number) for number in numbers])
        if len(waiting) == ahead:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]
