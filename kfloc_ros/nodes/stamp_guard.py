# SPDX-License-Identifier: Apache-2.0
"""Tells stamps that are merely out of order from a time that really went backwards; imports nothing of ROS."""

from __future__ import annotations

from kfloc_ros.errors import FrameError

_LAST_NS = (2**31 - 1 - 86_400) * 1_000_000_000
"""ROS time ends in 2038; transforms are stamped ahead of their images, and sent again with later stamps."""
_IN_A_ROW = 3
"""So many images with earlier stamps, one later than the other, are no disorder any more."""


def check_stamp(stamp_ns: int) -> None:
    """Raise FrameError for a stamp that cannot be sent on, or not with what is added to it."""
    if not 0 < stamp_ns <= _LAST_NS:
        raise FrameError(
            f"An image has the time stamp {1e-9 * stamp_ns:.0f} s, which is no time that ROS can work with. "
            "Have the camera driver fill header.stamp with its clock's seconds and nanoseconds."
        )


class StampGuard:
    """Judges the stamps of images in the order of their arrival.

    Args:
        window_s: an image may come this much too late to be called out of order; by more, time went backwards.
    """

    def __init__(self, window_s: float) -> None:
        self._window_ns = int(window_s * 1e9)
        self._newest_ns: int | None = None
        self._late: list[int] = []

    def fault(self, stamp_ns: int) -> str:
        """Why an image must be dropped, or empty.

        Raises:
            FrameError: the stamp is zero, before 1970, or at the end of ROS time.
        """
        if stamp_ns == 0:
            raise FrameError(
                "An image has no time stamp (it is 0), so its pose would have no time. "
                "Have the camera driver fill header.stamp."
            )
        check_stamp(stamp_ns)
        newest_ns = self._newest_ns
        if newest_ns is None or stamp_ns > newest_ns or newest_ns - stamp_ns > self._window_ns:
            return self._accept(stamp_ns)
        if stamp_ns == newest_ns:
            return "it has the same stamp as the one before"
        if self._late and stamp_ns <= self._late[-1]:
            self._late = []
        self._late.append(stamp_ns)
        if len(self._late) >= _IN_A_ROW:
            return self._accept(stamp_ns)
        return f"it is {1e-6 * (newest_ns - stamp_ns):.0f} ms older than one that came before it"

    def forget(self) -> None:
        """The next stamp may be any."""
        self._newest_ns = None

    def _accept(self, stamp_ns: int) -> str:
        self._newest_ns, self._late = stamp_ns, []
        return ""
