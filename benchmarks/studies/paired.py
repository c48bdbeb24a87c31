# SPDX-License-Identifier: Apache-2.0
"""Paired test of two methods on the same frames: change of the median error, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_FRAMES = 10
"""Frames that are drawn together: errors of neighbouring frames are similar, and drawing single frames would make the
interval too narrow."""
MIN_BLOCKS = 8
"""Smallest number of blocks; short runs are drawn in shorter blocks."""
RESAMPLES = 2000
LOW, HIGH = 0.025, 0.975


@dataclass(frozen=True)
class MedianChange:
    """Change of the median error from one method to another, with its 95 % confidence interval."""

    change: float
    """Median after minus median before, in the errors' unit; negative is better."""
    low: float
    high: float

    @property
    def is_worse(self) -> bool:
        """True if the second method is significantly worse."""
        return self.low > 0

    @property
    def is_better(self) -> bool:
        """True if the second method is significantly better."""
        return self.high < 0


def median_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> MedianChange:
    """Return the change of the median error on the same frames, in order, by a paired block bootstrap (Kuensch, 1989).

    Both methods are drawn with the same frames, so the difficulty of a frame cancels; blocks of neighbouring frames are
    drawn as one, and wrap from the end to the beginning.

    Args:
        before, after: errors of every frame; infinite without an estimate.
        seed: seed of the draws.

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
    with np.errstate(invalid="ignore"):  # NaN if half of the frames failed with both methods
        changes = np.subtract(*np.median(table[::-1][:, drawn], axis=2))
        change = float(np.subtract(*np.median(table[::-1], axis=1)))
    valid = changes[~np.isnan(changes)]
    if math.isnan(change) or not len(valid):
        return MedianChange(change, math.nan, math.nan)
    low, high = np.quantile(valid, [LOW, HIGH], method="nearest")
    return MedianChange(change, float(low), float(high))
