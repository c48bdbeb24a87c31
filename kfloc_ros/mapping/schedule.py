# SPDX-License-Identifier: Apache-2.0
"""Which views are kept from training, for calibration: runs as long as the camera takes to leave what was trained on.

Variances that are calibrated next to trained views are too small everywhere else, so a run has to reach away from
them; and of a source whose views lie far apart, a long run would be a hole that no head should have. So a run ends
with the way that the camera has gone, and the share of all views that are held out stays what it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kfloc_ros.errors import SourceError
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


READ_SHARE = 0.45
"""Most of the time that reading views may take."""
CALIBRATION_SHARE = 0.2
CALIBRATION_PER_PASS = 8.0
"""Time that a held-out view takes to calibrate with, in passes through the backbone."""
CALIBRATION_MARGIN = 1.3
WRITE_S = 2.0
LEAST_TRAINING_S = 3.0
FIRST_VIEWS = 5
"""Read in any case, to learn how long a view takes."""


class TimeBudget:
    """Divides the time for a whole build among its stages; without a limit nothing is left out.

    Args:
        budget_s: time for everything; 0: no limit.
        started: when it began, as told by ``clock``.
        clock: seconds that only grow.
    """

    def __init__(self, budget_s: float, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.budget_s = clock, budget_s
        self._end = started + budget_s
        self._reading_since = clock()
        self._read_until = started + READ_SHARE * budget_s
        self._read, self._credit = 0, 0.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.budget_s > 0

    def wants(self, views_left: int, *, needed: bool = False) -> bool:
        """Whether to read the next view: evenly spread, as many as there is time for.

        Args:
            views_left: with this one.
            needed: it is read anyway, and only counted.
        """
        if not self.limited or needed or self._read < FIRST_VIEWS:
            self._read += 1
            return True
        now = self._clock()
        per_view_s = max((now - self._reading_since) / self._read, 1e-6)
        self._credit += min(1.0, max(0.0, self._read_until - now) / (per_view_s * views_left))
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        self._read += 1
        return True

    def calibration_views(self, held_out: int, backbone_pass_s: float) -> int:
        """How many of the held-out views there is time to calibrate with."""
        if not self.limited:
            return held_out
        affordable = CALIBRATION_SHARE * self.budget_s / (CALIBRATION_PER_PASS * max(backbone_pass_s, 1e-6))
        return min(held_out, int(affordable))

    def training_s(self, calibration_views: int, backbone_pass_s: float) -> float:
        """Time left for training when calibration and writing have theirs.

        Raises:
            SourceError: hardly any is left.
        """
        reserve_s = CALIBRATION_MARGIN * CALIBRATION_PER_PASS * backbone_pass_s * calibration_views + WRITE_S
        left_s = self._end - self._clock() - reserve_s
        if left_s < LEAST_TRAINING_S:
            raise SourceError(
                f"A budget of {self.budget_s:.0f} s is too short here: after reading {self._read} views, and with "
                f"{reserve_s:.0f} s for calibration, {max(left_s, 0.0):.0f} s are left for training. Give it more."
            )
        return left_s
