# SPDX-License-Identifier: Apache-2.0
"""Interface of the training loop: samples by number, stages that make a loss of them, and validation."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn

from kfloc_ros.errors import WeightsError
from kfloc_ros.files import read_json, replacing
from kfloc_ros.frames import FrameSource, Selection

BEST_FILE = "best.json"


@dataclass(frozen=True, eq=False)
class Parts:
    """A source in two."""

    training: FrameSource
    held_out: FrameSource | None
    """None where it would have fewer than two frames."""


def hold_out(source: FrameSource, share: float) -> Parts:
    """Keep the last ``share`` of the frames with poses out of training.

    They lie together, so that hardly one of them has a neighbour among the others.
    """
    if share <= 0:
        return Parts(source, None)
    posed = [k for k in range(len(source)) if source.pose(k) is not None]
    count = round(share * len(posed))
    if count < 2 or len(posed) - count < 2:
        return Parts(source, None)
    return Parts(Selection(source, posed[:-count]), Selection(source, posed[-count:]))


def mean_figures(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of figures over batches, under ``validation/``; a figure that is nowhere finite stays NaN."""
    means = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if math.isfinite(part.get(key, math.nan))]
        means[f"validation/{key}"] = sum(values) / len(values) if values else math.nan
    return means


@dataclass
class Best:
    """The lowest loss so far, and the step it was reached at; kept beside the weights.

    A training that is continued may find a best of a later step than its own: that of the run that was killed. Since
    it makes the same steps again and arrives at the same loss there, that best is right.
    """

    folder: Path
    loss: float = math.inf
    step: int = -1

    @classmethod
    def of(cls, folder: Path) -> Best:
        """Of a folder of a training, which may hold none.

        Raises:
            WeightsError: the file is damaged.
        """
        path = folder / BEST_FILE
        if not path.is_file():
            return cls(folder)
        try:
            values = read_json(path)
            return cls(folder, float(values["loss"]), int(values["step"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"'{path}' is damaged ({error}); remove it, and the best is looked for anew.") from error

    def offer(self, loss: float, step: int, files: Mapping[Path, str], write: Callable[[Path, str], None]) -> bool:
        """Keep the weights if their loss is the lowest; say if it is.

        Args:
            loss: of the weights as they are now.
            step: of the training.
            files: that receive the weights, and which module's each does.
            write: writes a module's weights to a path, whole or not at all.
        """
        if not loss < self.loss:
            return False
        for path, name in files.items():
            write(path, name)
        self.loss, self.step = loss, step
        with replacing(self.folder / BEST_FILE) as partial:
            partial.write_text(json.dumps({"loss": loss, "step": step}) + "\n", encoding="utf-8")
        return True


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
