# SPDX-License-Identifier: Apache-2.0
"""Stamps out of order against time that went backwards."""

from __future__ import annotations

import pytest

from kfloc_ros.errors import FrameError
from kfloc_ros.messages.poses import StampGuard

MS = 1_000_000


@pytest.fixture
def guard() -> StampGuard:
    guard = StampGuard(0.5)
    assert guard.fault(1000 * MS) == ""
    assert guard.fault(1033 * MS) == ""
    return guard


def test_a_straggler_is_dropped_and_the_stream_goes_on(guard: StampGuard) -> None:
    assert "33 ms older" in guard.fault(1000 * MS)
    assert guard.fault(1066 * MS) == ""


def test_a_duplicate_is_dropped(guard: StampGuard) -> None:
    assert "same stamp" in guard.fault(1033 * MS)


def test_a_big_step_back_is_a_jump(guard: StampGuard) -> None:
    assert guard.fault(100 * MS) == ""
    assert guard.fault(133 * MS) == ""


def test_a_small_step_back_that_lasts_is_one_too(guard: StampGuard) -> None:
    assert [bool(guard.fault(ms * MS)) for ms in (900, 933, 966, 999)] == [True, True, False, False]


def test_disorder_does_not_add_up_to_a_jump(guard: StampGuard) -> None:
    assert all(guard.fault(ms * MS) for ms in (1000, 990, 980, 970))


def test_no_stamp_is_refused_and_a_told_jump_believed(guard: StampGuard) -> None:
    with pytest.raises(FrameError, match="no time stamp"):
        guard.fault(0)
    guard.forget()
    assert guard.fault(1010 * MS) == ""
