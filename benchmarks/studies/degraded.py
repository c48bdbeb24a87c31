# SPDX-License-Identifier: Apache-2.0
"""Degraded recordings: frames that are blurred, covered or missing, with true stamps, depth and poses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.training.flow import motion_blur
from kfloc_ros.types import Frame


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


def cover_half(image: NDArray[np.uint8], side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy whose left, right, upper or lower half (0..3) is a dim, slightly noisy surface near the lens."""
    h, w = image.shape[:2]
    top, bottom = (0, h) if side < 2 else ((0, h // 2) if side == 2 else (h // 2, h))
    left, right = (0, w) if side >= 2 else ((0, w // 2) if side == 0 else (w // 2, w))
    covered = image.copy()
    noise = rng.normal(60.0, 3.0, (bottom - top, right - left, 3))
    covered[top:bottom, left:right] = np.clip(noise, 0, 255).astype(np.uint8)
    return covered
