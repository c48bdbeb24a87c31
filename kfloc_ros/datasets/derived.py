# SPDX-License-Identifier: Apache-2.0
"""Several sequences as one source, kept apart in time so that nothing is filtered across their borders."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame, Matrix

FRAME_PERIOD_NS = 33_333_333
"""For datasets without time stamps: 30 Hz."""
SEQUENCE_GAP_NS = 10_000_000_000
PAUSE_STEPS = 10
"""A step of numbers or stamps that is so many times the usual one begins another recording."""


def stamps_with_gaps(sequence_of: Sequence[Hashable]) -> list[int]:
    """Time stamps at 30 Hz, with ten seconds between frames of different sequences."""
    borders = np.cumsum([0, *(a != b for a, b in itertools.pairwise(sequence_of))])
    return [(i + 1) * FRAME_PERIOD_NS + int(border) * SEQUENCE_GAP_NS for i, border in enumerate(borders)]


def recordings(sequence_of: Sequence[Hashable], *steps_of: Sequence[int]) -> list[int]:
    """The number of the recording of each frame: another one begins at a border, a step back or a pause.

    Args:
        sequence_of: what tells recordings apart, such as the folders of the images.
        steps_of: numbers or stamps of the frames, which grow evenly within a recording.
    """
    borders = np.array([a != b for a, b in itertools.pairwise(sequence_of)], dtype=np.bool_)
    for values in steps_of:
        numbers = np.asarray(values, dtype=np.int64)
        steps = numbers[1:] - numbers[:-1]
        forward = steps[(steps > 0) & ~borders]
        pause = PAUSE_STEPS * float(np.median(forward)) if len(forward) else np.inf
        borders |= (steps <= 0) | (steps > pause)
    return [0, *np.cumsum(borders).tolist()] if len(sequence_of) else []


class Sequences(FrameSource):
    """Sequences of one camera, one after the other; indices run on.

    Args:
        name: for reports.
        parts: in order.

    Raises:
        SourceError: no sequence, or different cameras.
    """

    def __init__(self, name: str, parts: Sequence[FrameSource]) -> None:
        if not parts:
            raise SourceError(f"'{name}' has no sequence.")
        if len({part.camera for part in parts}) > 1:
            raise SourceError(f"The sequences of '{name}' have different cameras.")
        self.name = name
        self._parts = list(parts)
        owner = [k for k, part in enumerate(parts) for _ in range(len(part))]
        self._where = [(k, p) for k, part in enumerate(parts) for p in range(len(part))]
        self._stamps_ns = stamps_with_gaps(owner)

    @property
    def camera(self) -> Camera:
        return self._parts[0].camera

    def __len__(self) -> int:
        return len(self._where)

    def indices(self) -> Sequence[int]:
        return range(len(self._where))

    def sequences(self) -> Sequence[int]:
        own = [(k, number) for k, part in enumerate(self._parts) for number in part.sequences()]
        indices = [part.indices() for part in self._parts]
        # a gap in a part's own indices is none in these, which run on
        jumps = [p and indices[k][p] - indices[k][p - 1] != 1 for k, p in self._where]
        return recordings(list(zip(own, np.cumsum(jumps).tolist(), strict=True)))

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self))[position]
        part, inner = self._where[index]
        frame = self._parts[part][inner]
        name = f"{part}/{frame.name}"
        return replace(frame, index=index, stamp_ns=self._stamps_ns[index], name=name)

    def fault(self, position: int) -> str:
        part, inner = self._where[position]
        return self._parts[part].fault(inner)

    def pose(self, position: int) -> Matrix | None:
        part, inner = self._where[position]
        return self._parts[part].pose(inner)

    def stamp_ns(self, position: int) -> int:
        return self._stamps_ns[position]

    def encoded_image(self, position: int) -> bytes | None:
        part, inner = self._where[position]
        return self._parts[part].encoded_image(inner)


class Remembered(DerivedSource):
    """Another source whose latest frames are kept in memory; frames are made one at a time, for any thread."""

    passes_images_on = True

    def __init__(self, source: FrameSource, capacity: int) -> None:
        super().__init__(source)
        self._capacity = capacity
        self._frames: OrderedDict[int, Frame] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, position: int) -> Frame:
        position = range(len(self))[position]
        with self._lock:
            if position not in self._frames:
                self._frames[position] = self._source[position]
                while len(self._frames) > self._capacity:
                    self._frames.popitem(last=False)
            self._frames.move_to_end(position)
            return self._frames[position]
