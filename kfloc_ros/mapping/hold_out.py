# SPDX-License-Identifier: Apache-2.0
"""Which views are kept from training, for calibration: runs as long as the camera takes to leave what was trained on.

Variances that are calibrated next to trained views are too small everywhere else, so a run has to reach away from
them; and of a source whose views lie far apart, a long run would be a hole that no head should have. So a run ends
with the way that the camera has gone, and the share of all views that are held out stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kfloc_ros.mapping.views import View
from kfloc_ros.pixloc.references import view_distances
from kfloc_ros.types import Matrix

SHARE = 0.08
"""Of all views."""
REACH_M = 0.4
"""A run ends when the camera is so far from where the run began (a degree counts as 2 cm)."""
MIN_RUN, MAX_RUN = 2, 32
"""Views: two, so that the filter can be calibrated, too."""
SHORT_SOURCE, MAX_SHORT_RUN = 200, 8
"""A source of fewer views has shorter runs, but four of them however short it is; others have at least two."""
MAX_HELD_OUT = 80
"""Views held out at most (they stay in memory): longer sources hold out runs farther apart."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A view that was kept from training."""

    view: View
    stamp_ns: int
    run: int
    """Views of one run follow one another."""


def inner_half(held_out: Sequence[HeldOut]) -> list[bool]:
    """Of every view, whether it lies in the middle of its run, where trained views are far; in short runs all do."""
    runs = np.array([held.run for held in held_out])
    inner = []
    for k, run in enumerate(runs):
        before, after = int((runs[:k] == run).sum()), int((runs[k + 1 :] == run).sum())
        inner.append(min(before, after) >= (before + after + 1) // 4)
    return inner


class HoldOut:
    """Decides for the views of one source, in order.

    Args:
        count: views that there are.
    """

    def __init__(self, count: int) -> None:
        if count >= SHORT_SOURCE:
            self._share = min(SHARE, MAX_HELD_OUT / count)
            self._longest = max(MAX_SHORT_RUN, min(MAX_RUN, int(SHARE * count / 2)))
            self._next = int(0.25 * self._longest / self._share)
        else:
            self._longest = max(MIN_RUN, min(MAX_SHORT_RUN, count // 24))
            self._share = self._longest / max(count // 4, 4)
            self._next = max(count // 8, 2)
        self._left = MAX_HELD_OUT
        self._start: Matrix | None = None
        self._began = self._length = 0
        self.runs = 0
        """Runs begun so far."""

    def wants(self, position: int) -> bool:
        """Whether the view at the next position is held out; then :meth:`saw` is to be told its pose."""
        if self._length:
            return True
        if position < self._next or self._left < MIN_RUN:
            return False
        self._began, self._start = position, None
        self.runs += 1
        return True

    def saw(self, position: int, T_map_camera: Matrix | None) -> None:
        """Take note of a view that was held out."""
        self._length = position - self._began + 1
        self._left -= 1
        away_m = 0.0
        if T_map_camera is not None and np.isfinite(T_map_camera).all():
            self._start = T_map_camera if self._start is None else self._start
            away_m = float(view_distances(self._start[None], T_map_camera)[0])
        if (self._length >= MIN_RUN and away_m >= REACH_M) or self._length >= self._longest or not self._left:
            self._next = self._began + max(round(self._length / self._share), self._length + 1)
            self._length = 0
