# SPDX-License-Identifier: Apache-2.0
"""Interface of frame sources, and selection of a part of one."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame, Matrix

LOG = logging.getLogger(__name__)
NAMED_FRAMES = 5
"""Largest number of left-out frames that a warning names."""


class FrameSource(ABC):
    """Sequence of frames in temporal order; images are read on access."""

    name: str
    """Short name for reports, such as ``redkitchen``."""
    strict: bool = False
    """True if an unusable frame ends the run; otherwise it is left out, counted and named."""

    @cached_property
    def left_out(self) -> MutableMapping[int, str]:
        """Reasons of the frames that could not be used, by ``Frame.index``."""
        return {}

    @property
    @abstractmethod
    def camera(self) -> Camera:
        """Intrinsics of the colour images."""

    @property
    def camera_is_guess(self) -> bool:
        """True if the intrinsics are unknown and those of a typical camera."""
        return False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, position: int) -> Frame: ...

    @abstractmethod
    def indices(self) -> Sequence[int]:
        """Return ``Frame.index`` of every frame, without reading any image."""

    def sequences(self) -> Sequence[int]:
        """Return the number of each frame's recording, without reading any image.

        Neighbouring frames of different recordings are not neighbours in time and must not be paired.
        """
        return [0] * len(self)

    def fault(self, position: int) -> str:
        """Return the reason why a frame cannot be used, known without decoding its image, or an empty string."""
        del position
        return ""

    def read(self, position: int) -> Frame | None:
        """Return a frame; if it cannot be used, None, with an entry in :attr:`left_out` and a warning.

        Raises:
            FrameError: the frame cannot be used, and the source is strict.
        """
        return self._usable(position, self.__getitem__)

    def recorded(self, position: int) -> Frame:
        """Return a frame as its own camera took it, where a source brings the images of several to one camera."""
        return self[position]

    def own_camera(self, position: int) -> Camera:
        """Return the camera of :meth:`recorded`, without reading the image if the source can."""
        return self.camera

    def read_recorded(self, position: int) -> Frame | None:
        """Return :meth:`recorded`, or None like :meth:`read`."""
        return self._usable(position, self.recorded)

    def _usable(self, position: int, get: Callable[[int], Frame]) -> Frame | None:
        try:
            return get(position)
        except FrameError as error:
            if self.strict:
                raise
            index = self.indices()[position]
            if index not in self.left_out:
                LOG.warning("Frame %d of '%s' is left out: %s", index, self.name, error)
            self.left_out[index] = str(error)
            return None

    def encoded_image(self, position: int) -> bytes | None:
        """Return the image as recorded, if it is a JPEG, so that a bag can store it without loss; else None."""
        del position
        return None

    def pose(self, position: int) -> Matrix | None:
        """Return ``T_map_camera`` of a frame, without reading the image if the source can."""
        return self[position].T_map_camera

    def stamp_ns(self, position: int) -> int:
        """Stamp of a frame; sources that can tell it without reading the image do so."""
        return self[position].stamp_ns

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        """Return (N, 3) points of a reconstruction, map frame, that the image sees; None if the source has none."""
        del position
        return None

    def __iter__(self) -> Iterator[Frame]:
        """Yield every frame that can be used; see :meth:`read`."""
        for position in range(len(self)):
            frame = self.read(position)
            if frame is not None:
                yield frame


class DerivedSource(FrameSource):
    """Base of sources that change another source: other frames, or the same frames modified.

    Subclasses override :meth:`origin` with ``__len__`` to select frames. To modify frames they override
    :meth:`changed`, and with it :meth:`pose`, ``camera`` and all else that differs from the other source.
    """

    passes_images_on = False
    """True if images stay unchanged, so that they are also available as recorded."""

    def __init__(self, source: FrameSource) -> None:
        self.name = source.name
        self.strict = source.strict
        self._source = source

    def origin(self, position: int) -> int:
        """Return the position in the other source of the frame at a position, 0 to ``len(self) - 1``."""
        return position

    def changed(self, frame: Frame, position: int) -> Frame:
        """Return the modified frame for a frame of the other source and its position here."""
        del position
        return frame

    @cached_property
    def left_out(self) -> MutableMapping[int, str]:
        return self._source.left_out

    @property
    def camera(self) -> Camera:
        return self._source.camera

    @property
    def camera_is_guess(self) -> bool:
        return self._source.camera_is_guess

    def __len__(self) -> int:
        return len(self._source)

    def fault(self, position: int) -> str:
        return self._source.fault(self.origin(position))

    def __getitem__(self, position: int) -> Frame:
        position = range(len(self))[position]
        return self.changed(self._source[self.origin(position)], position)

    def recorded(self, position: int) -> Frame:
        if not self.passes_images_on:
            return self[position]
        return self.changed(self._source.recorded(self.origin(position)), position)

    def own_camera(self, position: int) -> Camera:
        return self._source.own_camera(self.origin(position)) if self.passes_images_on else self.camera

    def indices(self) -> Sequence[int]:
        whole = self._source.indices()
        return [whole[self.origin(position)] for position in range(len(self))]

    def sequences(self) -> Sequence[int]:
        whole = self._source.sequences()
        return [whole[self.origin(position)] for position in range(len(self))]

    def encoded_image(self, position: int) -> bytes | None:
        return self._source.encoded_image(self.origin(position)) if self.passes_images_on else None

    def pose(self, position: int) -> Matrix | None:
        return self._source.pose(self.origin(position))

    def stamp_ns(self, position: int) -> int:
        return self._source.stamp_ns(self.origin(position))

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        return self._source.visible_points(self.origin(position))


class Selection(DerivedSource):
    """Selected frames of another source, in order; ``Frame.index`` stays that of the whole source."""

    passes_images_on = True

    def __init__(self, source: FrameSource, positions: Sequence[int]) -> None:
        super().__init__(source)
        self._positions = list(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def origin(self, position: int) -> int:
        return self._positions[position]


def usable(source: FrameSource, *, strict: bool = False) -> FrameSource:
    """Return the frames of a source but for those with a :meth:`~FrameSource.fault`, which a warning names.

    Args:
        source: to look through; no image is decoded for that.
        strict: refuse the source for a frame with a fault, now or when it is read.

    Raises:
        SourceError: a frame has a fault and ``strict`` is true, or all have one.
    """
    source.strict = strict
    faults = {position: fault for position in range(len(source)) if (fault := source.fault(position))}
    if not faults:
        return source
    first = next(iter(faults.values()))
    if strict:
        raise SourceError(f"{first} Without --strict such frames are left out: {len(faults)} of {len(source)}.")
    if len(faults) == len(source):
        raise SourceError(f"No frame of '{source.name}' can be used. The first: {first}")
    named = " ".join(list(faults.values())[:NAMED_FRAMES])
    more = f" And {len(faults) - NAMED_FRAMES} more." if len(faults) > NAMED_FRAMES else ""
    LOG.warning("%d of %d frames of '%s' are left out: %s%s", len(faults), len(source), source.name, named, more)
    indices = source.indices()
    source.left_out.update({indices[position]: fault for position, fault in faults.items()})
    return Selection(source, [position for position in range(len(source)) if position not in faults])


SPLITS = {
    "blocks50:train": lambda i: (i // 50) % 4 != 3,
    "blocks50:test": lambda i: (i // 50) % 4 == 3,
    "extrapolate:train": lambda i: i < 700,
    "extrapolate:test": lambda i: i >= 700,
}
"""Named splits, each a test of the frame index."""


def select(source: FrameSource, *, frames: str | None = None, split: str | None = None) -> FrameSource:
    """Keep the frames named by ``--frames`` (such as ``0:150,200:350`` or ``0:300:2``) and ``--split``.

    Raises:
        SourceError: the expression is malformed, the split unknown, or nothing is left.
    """
    indices = source.indices()
    keep = set(range(len(indices)))
    if frames is not None:
        ranges = [_parse_range(part) for part in frames.split(",")]
        keep = {p for p in keep if any(indices[p] in r for r in ranges)}
    if split is not None:
        if split not in SPLITS:
            raise SourceError(f"Unknown split '{split}'; known: {', '.join(SPLITS)}.")
        keep = {p for p in keep if SPLITS[split](indices[p])}
    if not keep:
        given = [f"--{name} {value}" for name, value in (("frames", frames), ("split", split)) if value is not None]
        raise SourceError(f"No frame of the {len(indices)} in '{source.name}' is left by {' '.join(given)}.")
    return source if len(keep) == len(indices) else Selection(source, sorted(keep))


def _parse_range(text: str) -> range:
    match = re.fullmatch(r"\s*(\d+)(?::(\d+)(?::(\d+))?)?\s*", text)
    if match is None or match[3] == "0":
        raise SourceError(f"Cannot read the frame range '{text}'; write START:STOP, START:STOP:STEP or one index.")
    start = int(match[1])
    stop = int(match[2]) if match[2] else start + 1
    return range(start, stop, int(match[3] or 1))
