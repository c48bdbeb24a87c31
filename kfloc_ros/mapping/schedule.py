# SPDX-License-Identifier: Apache-2.0
"""Schedule of a map build: held-out views for calibration, and division of the time budget.

Variances that are calibrated next to trained views are too small everywhere else, so a run of held-out views has to
extend away from trained ones. If the views of a source are far apart, a long run would leave a hole in the training
data.
A run therefore ends by the distance that the camera has moved, and the share of held-out views is constant.
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
"""Share of held-out views."""
REACH_M = 0.4
"""Distance from the start of a run at which it ends, in metres (1 deg counts as 0.02 m)."""
MIN_RUN, MAX_RUN = 2, 32
"""Limits on the length of a run: two views, so that the filter can be calibrated too."""
SHORT_SOURCE, MAX_SHORT_RUN = 200, 8
"""A source of fewer views has shorter runs, but four of them at any length; others have at least two."""
MAX_HELD_OUT = 80
"""Limit on held-out views (they stay in memory): longer sources have fewer runs."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """View held out from training."""

    view: View
    stamp_ns: int
    run: int
    """Number of the run; views of one run are consecutive."""
    recording: int = 0
    """Number of its recording; views of different recordings are no neighbours in time."""


def inner_half(held_out: Sequence[HeldOut]) -> list[bool]:
    """Return True for views in the middle of their run, where trained views are far; in short runs for all."""
    runs = np.array([held.run for held in held_out])
    inner = []
    for k, run in enumerate(runs):
        before, after = int((runs[:k] == run).sum()), int((runs[k + 1 :] == run).sum())
        inner.append(min(before, after) >= (before + after + 1) // 4)
    return inner


class HoldOut:
    """Selector of held-out views of one source, in order.

    Args:
        count: number of views.
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
        """Number of runs so far."""

    def holds_out(self, position: int) -> bool:
        """Return True if the view at the next position is held out; its pose must then be given to :meth:`record`."""
        if self._length:
            return True
        if position < self._next or self._left < MIN_RUN:
            return False
        self._began, self._start = position, None
        self.runs += 1
        return True

    def record(self, position: int, T_map_camera: Matrix | None) -> None:
        """Record the pose of a held-out view."""
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
"""Largest share of the time budget for reading views."""
CALIBRATION_SHARE = 0.2
CALIBRATION_PER_PASS = 10.0
"""Time to calibrate with one held-out view, in backbone passes."""
CALIBRATION_MARGIN = 1.3
WRITE_S = 2.0
LEAST_TRAINING_S = 3.0
FIRST_VIEWS = 5
"""Number of views read in any case, to measure the time per view."""


class TimeBudget:
    """Division of a build's time budget among its stages; without a limit, no view is left out.

    Args:
        budget_s: time for everything; 0: no limit.
        started: start of the budget, from ``clock``.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, budget_s: float, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.budget_s = clock, budget_s
        self._end = started + budget_s
        self._reading_since = clock()
        self._read_until = started + READ_SHARE * budget_s
        self._read, self._credit = 0, 0.0

    @property
    def limited(self) -> bool:
        """True if there is a time limit."""
        return self.budget_s > 0

    def allows_view(self, views_left: int, *, needed: bool = False) -> bool:
        """Return True if the next view should be read: evenly spread, as many as the time allows.

        Args:
            views_left: number of remaining views, including this one.
            needed: the view is read in any case, and only counted.
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
        """Return the number of held-out views that the time allows for calibration."""
        if not self.limited:
            return held_out
        affordable = CALIBRATION_SHARE * self.budget_s / (CALIBRATION_PER_PASS * max(backbone_pass_s, 1e-6))
        return min(held_out, int(affordable))

    def training_s(self, calibration_views: int, backbone_pass_s: float) -> float:
        """Return the time for training after calibration and writing.

        Raises:
            SourceError: too little time is left.
        """
        reserve_s = CALIBRATION_MARGIN * CALIBRATION_PER_PASS * backbone_pass_s * calibration_views + WRITE_S
        left_s = self._end - self._clock() - reserve_s
        if left_s < LEAST_TRAINING_S:
            raise SourceError(
                f"A time budget of {self.budget_s:.0f} s is too short: after reading {self._read} views, and with "
                f"{reserve_s:.0f} s for calibration, {max(left_s, 0.0):.0f} s are left for training. Increase "
                "--budget."
            )
        return left_s
