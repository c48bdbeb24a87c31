# SPDX-License-Identifier: Apache-2.0
"""Disturbed recordings: the camera is covered, without images, moved elsewhere, or in another room.

The stream is composed of frames of a source: undisturbed motion, a disturbance, and the motion after it, repeatedly,
with evenly increasing stamps. The truth of every frame stays known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.types import Frame, Matrix

FAR_M, FAR_DEG = 0.7, 35.0
"""Two poses further apart than either limit show different parts of a map."""
STREAM_START_NS = 1_700_000_000 * 10**9


class Disturbance(Enum):
    """Kind of disturbance of the camera."""

    BLACK = "covered, black"
    WHITE = "blinded, white"
    HAND = "covered by a hand"
    NOISE = "noise"
    MIRROR = "another room"
    """Mirrored images: another room with the same textures, in which nothing is where the map has it."""
    GAP = "no images"
    KIDNAP = "carried elsewhere"

    @property
    def replaces_images(self) -> bool:
        """True if images come during the disturbance, but show nothing of the map."""
        return self not in (Disturbance.GAP, Disturbance.KIDNAP)


@dataclass(frozen=True)
class Slot:
    """Frame of the stream."""

    position: int
    """Position in the source."""
    stamp_ns: int
    shown: Disturbance | None = None
    """Disturbance that replaces the source's image; None: the source's image."""
    event: int = -1
    """Number of the disturbance before it, -1 before the first."""


@dataclass(frozen=True)
class DisturbancePlan:
    """Parameters of a stream."""

    events_per_kind: int = 5
    rate_hz: float = 10.0
    before_s: float = 1.2
    """Undisturbed motion before each disturbance."""
    after_s: float = 1.5
    """Undisturbed motion after each disturbance; if the source has too little, the camera stands still."""
    durations_s: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Durations of replaced images, in turn."""
    gap_s: float = 2.0
    kinds: tuple[Disturbance, ...] = tuple(Disturbance)
    seed: int = 0


class DisturbedSource(DerivedSource):
    """Disturbed stream as a source.

    Args:
        source: frames with truth, in temporal order.
        plan: parameters; the same plan and source give the same stream.

    Raises:
        SourceError: the source has too few frames with truth, or none far enough from the others.
    """

    def __init__(self, source: FrameSource, plan: DisturbancePlan | None = None) -> None:
        super().__init__(source)
        plan = plan or DisturbancePlan()
        self.name = f"{source.name} (disturbed)"
        self._seed = plan.seed
        self.events = tuple(
            kind for number in range(plan.events_per_kind) for kind in _shuffled(plan.kinds, plan.seed + number)
        )
        self.slots = tuple(_Cutter(source, plan).cut(self.events))

    def __len__(self) -> int:
        return len(self.slots)

    def indices(self) -> Sequence[int]:
        return range(len(self.slots))

    def origin(self, position: int) -> int:
        return self.slots[position].position

    def changed(self, frame: Frame, position: int) -> Frame:
        slot = self.slots[position]
        image = frame.image if slot.shown is None else _picture(slot.shown, frame.image, self._seed + position)
        return replace(frame, image=image, stamp_ns=slot.stamp_ns, index=position, depth_m=None)


class _Cutter:
    """Composer of a stream."""

    def __init__(self, source: FrameSource, plan: DisturbancePlan) -> None:
        self._plan = plan
        self._rng = np.random.default_rng(plan.seed)
        self._poses = [source.pose(position) for position in range(len(source))]
        indices = list(source.indices())
        step = max(round(_source_rate_hz(source) / plan.rate_hz), 1)
        self._runs = _runs(indices, [pose is not None for pose in self._poses], step)
        self._period_ns = int(1e9 / plan.rate_hz)
        self._next_ns = STREAM_START_NS
        self._slots: list[Slot] = []
        self._run, self._at = self._somewhere(None)

    def cut(self, events: Sequence[Disturbance]) -> list[Slot]:
        """Return the frames of the stream."""
        plan = self._plan
        self._move(plan.before_s, -1)
        for number, kind in enumerate(events):
            if kind is Disturbance.KIDNAP:
                self._run, self._at = self._somewhere(self._here())
            elif kind is Disturbance.GAP:
                self._skip(plan.gap_s)
            else:
                self._show(kind, plan.durations_s[number % len(plan.durations_s)], number)
            self._move(plan.after_s + plan.before_s, number)
        return self._slots

    def _move(self, seconds: float, event: int) -> None:
        """Continue along the run; at its end turn round, as a person who looks back."""
        for _ in range(max(round(seconds * self._plan.rate_hz), 1)):
            self._put(None, event)
            if self._at + 1 >= len(self._run):
                self._run, self._at = self._run[::-1], 0
            self._at = min(self._at + 1, len(self._run) - 1)

    def _show(self, kind: Disturbance, seconds: float, event: int) -> None:
        for _ in range(round(seconds * self._plan.rate_hz)):
            self._put(kind, event)

    def _skip(self, seconds: float) -> None:
        """Leave images out for a while, during which the camera moves on to the end of its run at most."""
        self._next_ns += int(seconds * 1e9)
        self._at = min(self._at + round(seconds * self._plan.rate_hz), len(self._run) - 1)

    def _put(self, shown: Disturbance | None, event: int) -> None:
        self._slots.append(Slot(self._here(), self._next_ns, shown, event))
        self._next_ns += self._period_ns

    def _here(self) -> int:
        return self._run[self._at]

    def _somewhere(self, away_from: int | None) -> tuple[list[int], int]:
        """Return a random position in a run, far from a given frame, if any."""
        places = [(run, at) for run in self._runs for at in range(len(run))]
        if away_from is not None:
            here = self._poses[away_from]
            places = [(run, at) for run, at in places if _far(here, self._poses[run[at]])]
        if not places:
            raise SourceError("The source has too few frames with truth, or shows one place only.")
        return places[int(self._rng.integers(len(places)))]


def _runs(indices: Sequence[int], usable: Sequence[bool], step: int) -> list[list[int]]:
    """Return positions of frames that follow each other without a gap in the source, every ``step``-th."""
    runs: list[list[int]] = [[]]
    for position, index in enumerate(indices):
        if runs[-1] and (index != indices[runs[-1][-1]] + 1 or not usable[position]):
            runs.append([])
        if usable[position]:
            runs[-1].append(position)
    return [run[::step] for run in runs if len(run) > 2 * step]


def _source_rate_hz(source: FrameSource) -> float:
    """Return the frame rate, from the first frames that follow each other."""
    indices = source.indices()
    for position in range(min(len(source) - 1, 100)):
        if indices[position + 1] == indices[position] + 1:
            period_ns = source[position + 1].stamp_ns - source[position].stamp_ns
            return 1e9 / max(period_ns, 1)
    raise SourceError("No two frames of the source follow each other.")


def _far(a: Matrix | None, b: Matrix | None) -> bool:
    if a is None or b is None:
        return False
    between = inverse_pose(a) @ b
    return bool(np.linalg.norm(between[:3, 3]) > FAR_M or rotation_angle_deg(between[:3, :3]) > FAR_DEG)


def _picture(kind: Disturbance, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Return the image of a disturbance."""
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    if kind is Disturbance.BLACK:
        return rng.integers(0, 4, image.shape, dtype=np.uint8)
    if kind is Disturbance.WHITE:
        return np.full_like(image, 255)
    if kind is Disturbance.NOISE:
        return rng.integers(0, 256, image.shape, dtype=np.uint8)
    if kind is Disturbance.HAND:
        down = np.linspace(0, 1, height)[:, None] * np.ones((1, width))
        glow = 40 + 60 * down + rng.normal(0, 3, (height, width))
        skin = np.stack([1.4 * glow, 0.8 * glow, 0.6 * glow], axis=-1)
        return np.clip(skin, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image[:, ::-1])


def _shuffled(kinds: Sequence[Disturbance], seed: int) -> list[Disturbance]:
    return [kinds[k] for k in np.random.default_rng(seed).permutation(len(kinds))]
