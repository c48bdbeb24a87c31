# SPDX-License-Identifier: Apache-2.0
"""Keeping a build within a time: how many views are read, how long is trained, how many views calibrate."""

from __future__ import annotations

import time
from collections.abc import Callable

from kfloc_ros.errors import SourceError

READ_SHARE = 0.45
"""Most of the time that reading views may take."""
CALIBRATION_SHARE = 0.2
CALIBRATION_PER_PASS = 8.0
"""Time that a held-out view takes to calibrate with, in passes through the trunk."""
CALIBRATION_MARGIN = 1.3
WRITE_S = 2.0
LEAST_TRAINING_S = 3.0
FIRST_VIEWS = 5
"""Read in any case, to learn how long a view takes."""


class Pace:
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

    def calibration_views(self, held_out: int, trunk_pass_s: float) -> int:
        """How many of the held-out views there is time to calibrate with."""
        if not self.limited:
            return held_out
        affordable = CALIBRATION_SHARE * self.budget_s / (CALIBRATION_PER_PASS * max(trunk_pass_s, 1e-6))
        return min(held_out, int(affordable))

    def training_s(self, calibration_views: int, trunk_pass_s: float) -> float:
        """Time left for training when calibration and writing have theirs.

        Raises:
            SourceError: hardly any is left.
        """
        reserve_s = CALIBRATION_MARGIN * CALIBRATION_PER_PASS * trunk_pass_s * calibration_views + WRITE_S
        left_s = self._end - self._clock() - reserve_s
        if left_s < LEAST_TRAINING_S:
            raise SourceError(
                f"A budget of {self.budget_s:.0f} s is too short here: after reading {self._read} views, and with "
                f"{reserve_s:.0f} s for calibration, {max(left_s, 0.0):.0f} s are left for training. Give it more."
            )
        return left_s
