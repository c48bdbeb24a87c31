# SPDX-License-Identifier: Apache-2.0
"""Several sequences as one source, kept apart in time so that nothing is filtered across their borders."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Degradation:
    """What is done to a source; the zeros of the default leave it as it is."""

    blur_every: int = 0
    """Every so many frames, one is blurred as by a jerk of the camera; 0: none."""
    blur_length_px: float = 40.0
    """Length of the blur at a width of 640 pixels; the direction is random."""
    cover_every: int = 0
    """Every so many frames, half of the image is covered for a while; 0: never."""
    cover_frames: int = 10
    """Frames that the cover stays."""
    drop_share: float = 0.0
    """Share of the frames that are missing."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_share < 1:
            raise SourceError(f"The share of dropped frames must lie in [0, 1), got {self.drop_share}.")
        if min(self.blur_every, self.cover_every, self.cover_frames) < 0 or self.blur_length_px < 1:
            raise SourceError("Periods of a degradation must not be negative, and a blur at least a pixel long.")


DEGRADATIONS = {
    "clean": Degradation(),
    "blur": Degradation(blur_every=3),
    "cover": Degradation(cover_every=25),
    "drop": Degradation(drop_share=0.3),
    "all": Degradation(blur_every=3, cover_every=25, drop_share=0.3),
}
"""By name: every third frame blurred, half the image covered for ten frames of 25, 30 % dropped, and all of it."""


class Degraded(DerivedSource):
    """Another source with blurred, covered and missing frames; stamps, indices, depth and poses stay true."""

    def __init__(self, source: FrameSource, degradation: Degradation) -> None:
        super().__init__(source)
        self._degradation = degradation
        chance = np.random.default_rng((degradation.seed, 1)).random(len(source))
        self._kept = [p for p in range(len(source)) if chance[p] >= degradation.drop_share]
        if not self._kept:
            raise SourceError(f"All {len(source)} frames of '{source.name}' would be dropped.")

    def __len__(self) -> int:
        return len(self._kept)

    def origin(self, position: int) -> int:
        return self._kept[position]

    def changed(self, frame: Frame, position: int) -> Frame:
        original = self._kept[position]
        d = self._degradation
        rng = np.random.default_rng((d.seed, 2, original))
        image = frame.image
        if d.blur_every and original % d.blur_every == d.blur_every - 1:
            image = motion_blur(image, d.blur_length_px * image.shape[1] / 640, float(rng.uniform(0, np.pi)))
        if d.cover_every and original % d.cover_every >= d.cover_every - d.cover_frames:
            side = np.random.default_rng((d.seed, 3, original // d.cover_every)).integers(4)
            image = cover_half(image, int(side), rng)
        return replace(frame, image=image)


def motion_blur(image: NDArray[np.uint8], length_px: float, angle_rad: float) -> NDArray[np.uint8]:
    """The mean of an image (H, W, 3) moved along a straight line, as when the camera turns during the exposure."""
    size = 2 * int(np.ceil(length_px / 2)) + 1
    kernel = np.zeros((size, size), dtype=np.float32)
    for s in np.linspace(-length_px / 2, length_px / 2, 4 * size):
        x, y = size // 2 + s * np.cos(angle_rad), size // 2 + s * np.sin(angle_rad)
        kernel[round(float(y)), round(float(x))] += 1
    kernel /= kernel.sum()
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101), dtype=np.uint8)


def cover_half(image: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy whose left, right, upper or lower half (0..3) is a dim, slightly noisy surface near the lens."""
    h, w = image.shape[:2]
    top, bottom = (0, h) if side < 2 else ((0, h // 2) if side == 2 else (h // 2, h))
    left, right = (0, w) if side >= 2 else ((0, w // 2) if side == 0 else (w // 2, w))
    covered = image.copy()
    noise = rng.normal(60.0, 3.0, (bottom - top, right - left, 3))
    covered[top:bottom, left:right] = np.clip(noise, 0, 255).astype(np.uint8)
    return covered
