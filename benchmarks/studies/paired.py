# SPDX-License-Identifier: Apache-2.0
"""Whether one way of doing it is better than another on the same frames, or whether that is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_FRAMES = 10
"""Frames that are drawn together: errors of neighbouring frames are alike, and frame by frame the interval would come
out too narrow."""
MIN_BLOCKS = 8
"""Short runs are drawn in shorter blocks."""
RESAMPLES = 2000
LOW, HIGH = 0.025, 0.975


@dataclass(frozen=True)
class MedianChange:
    """Change of the median error from one way to another, and where it lies in 95 of 100 such runs."""

    change: float
    """Median after minus median before, in the errors' unit; negative is better."""
    low: float
    high: float

    @property
    def is_worse(self) -> bool:
        """Whether the second is worse by more than noise."""
        return self.low > 0

    @property
    def is_better(self) -> bool:
        """Whether the second is better by more than noise."""
        return self.high < 0


def median_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> MedianChange:
    """Change of the median of errors of the same frames, in order, with a paired block bootstrap (Kuensch, 1989).

    Both ways are drawn with the same frames, so what is hard about a frame cancels; blocks of neighbouring frames are
    drawn as one, around the end to the beginning.

    Args:
        before, after: errors of every frame; infinite where there was no estimate.
        seed: of the draws.

    Raises:
        ValueError: the two are not of the same frames.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} errors cannot be paired with {len(after)}")
    if not before:
        return MedianChange(math.nan, math.nan, math.nan)
    table = np.array([before, after], dtype=np.float64)
    count = len(before)
    block = max(min(BLOCK_FRAMES, count // MIN_BLOCKS), 1)
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // block)))
    drawn = ((starts[..., None] + np.arange(block)) % count).reshape(RESAMPLES, -1)[:, :count]
    with np.errstate(invalid="ignore"):  # half of the frames failed both ways: no change that could be told
        changes = np.subtract(*np.median(table[::-1][:, drawn], axis=2))
        change = float(np.subtract(*np.median(table[::-1], axis=1)))
    told = changes[~np.isnan(changes)]
    if math.isnan(change) or not len(told):
        return MedianChange(change, math.nan, math.nan)
    low, high = np.quantile(told, [LOW, HIGH], method="nearest")
    return MedianChange(change, float(low), float(high))
