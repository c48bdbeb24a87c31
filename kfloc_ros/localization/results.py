# SPDX-License-Identifier: Apache-2.0
"""Results of localizing one frame, and the time spent on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.jobs import SharedResult
from kfloc_ros.kfnet.fusion import Filtered
from kfloc_ros.types import CoarsePose, FilterReport, Frame, PoseEstimate, SceneCoordinates


class StageTimes:
    """Milliseconds spent on a frame so far, by stage, in the order in which stages first ran.

    Args:
        earlier: time spent on the same frame before, such as in another process.
    """

    def __init__(self, earlier: Mapping[str, float] | None = None) -> None:
        self._ms = {stage: ms for stage, ms in (earlier or {}).items() if stage != "total"}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, spent_s: float) -> None:
        """Add a time that another thread spent, in seconds, to a stage."""
        self._ms[name] = self._ms.get(name, 0.0) + 1e3 * spent_s

    def so_far(self) -> dict[str, float]:
        """Return the times of all stages."""
        return dict(self._ms)

    def with_total(self) -> dict[str, float]:
        """Return the times of all stages and their sum, ``total``."""
        return {**self._ms, "total": sum(self._ms.values())}


@dataclass(frozen=True)
class CellPart:
    """Part of the cells of an image, spread evenly over it."""

    parts: int
    """1: all cells; 2: those of a colour of a chessboard; 4: every other cell of every other row."""
    turn: int
    """0 to 3. Parts of successive turns have no cell in common; two successive quarters from an even turn make a colour
    of the chessboard, and four make the whole."""

    def mask(self, h: int, w: int, device: torch.device) -> torch.Tensor | None:
        """Return (h, w) bool, the cells of the part; None if it is the whole."""
        if self.parts == 1:
            return None
        row, column = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
        if self.parts == 2:
            return (row + column) % 2 == self.turn % 2
        first_row, first_column = _QUARTERS[self.turn]
        return (row % 2 == first_row) & (column % 2 == first_column)


_QUARTERS = ((0, 0), (1, 1), (0, 1), (1, 0))
"""Row and column of the first cell of each quarter."""
WHOLE = CellPart(1, 0)


class Measuring(Protocol):
    """Measurement of an image's scene coordinates, which several threads may share."""

    @property
    def helped_s(self) -> float:
        """Time that :meth:`help` spent on what was begun last, in seconds."""
        ...

    def help(self) -> None:
        """Compute a share of what was begun, in another thread than :meth:`coordinates`."""
        ...

    def coordinates(self, cells: torch.Tensor | None = None) -> SceneCoordinates:
        """Return scene coordinates; only the cells (h, w) are needed, begun or not. None: all."""
        ...


class WholeMeasurement(SharedResult[SceneCoordinates]):
    """Measurement by a network that takes the image as a whole."""

    def coordinates(self, cells: torch.Tensor | None = None) -> SceneCoordinates:
        """Return the scene coordinates of all cells, whichever are needed."""
        del cells
        return self.result()


@dataclass(frozen=True, eq=False)
class Ahead:
    """What was computed of a frame before its turn, in another thread."""

    times: StageTimes
    features: BackboneFeatures
    measuring: Measuring | None = None
    """Measurement of the cells that the frame is likely to need; None if there may be no need for one."""

    def help(self) -> None:
        """Compute a share of the measurement until it is done, also after the frame was handed over."""
        if self.measuring is not None:
            self.measuring.help()


@dataclass(frozen=True, eq=False)
class CoarseResult:
    """Result of the coarse half, sent from ``filter_node`` to ``refiner_node``."""

    stamp_ns: int
    pose: CoarsePose
    filter: FilterReport
    timings_ms: Mapping[str, float]
    features: BackboneFeatures
    scene_coordinates: SceneCoordinates | None = None
    """Belief over scene coordinates that PnP used; None if it stayed in another process."""
    measurement: SceneCoordinates | None = None
    """Scene coordinates regressed from this frame alone."""
    filtered: Filtered | None = None
    """Filter step, cell by cell; ``scene_coordinates`` is its posterior."""


@dataclass(frozen=True, eq=False)
class Localization:
    """Complete result of one frame, for viewers, pages and publishers."""

    frame: Frame
    features: BackboneFeatures
    estimate: PoseEstimate
    coarse: CoarseResult | None = None
    """None for a frame that was aligned from the predicted pose alone."""

    @property
    def belief(self) -> SceneCoordinates | None:
        """Filtered scene coordinates of the frame, or None."""
        return None if self.coarse is None else self.coarse.scene_coordinates
