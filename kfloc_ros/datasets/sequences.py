# SPDX-License-Identifier: Apache-2.0
"""Several sequences as one source, kept apart in time so that nothing is filtered across their borders."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame, Matrix

FRAME_PERIOD_NS = 33_333_333
"""For datasets without time stamps: 30 Hz."""
SEQUENCE_GAP_NS = 10_000_000_000


def stamps_with_gaps(sequence_of: Sequence[Hashable]) -> list[int]:
    """Time stamps at 30 Hz, with ten seconds between frames of different sequences."""
    borders = np.cumsum([0, *(a != b for a, b in itertools.pairwise(sequence_of))])
    return [(i + 1) * FRAME_PERIOD_NS + int(border) * SEQUENCE_GAP_NS for i, border in enumerate(borders)]


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

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self))[position]
        part, inner = self._where[index]
        frame = self._parts[part][inner]
        name = f"{part}/{frame.name}"
        return replace(frame, index=index, stamp_ns=self._stamps_ns[index], name=name)

    def pose(self, position: int) -> Matrix | None:
        part, inner = self._where[position]
        return self._parts[part].pose(inner)

    def encoded_image(self, position: int) -> bytes | None:
        part, inner = self._where[position]
        return self._parts[part].encoded_image(inner)
