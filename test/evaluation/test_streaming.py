# SPDX-License-Identifier: Apache-2.0
"""Availability, first pose, false OK and recovery."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.summary import streaming
from kfloc_ros.geometry.lie import make_pose

STATES = {"T": "TRACKING", "L": "LOST", "D": "DEGRADED", "I": "INITIALIZING", ".": "LOST"}


def records(pattern: str, error_m: float = 0.0, sigma_m: float = 0.1) -> list[FrameRecord]:
    """One frame every 0.1 s: T tracking, L lost, D degraded, I initializing, . dropped."""
    return [
        FrameRecord(
            index=i,
            stamp_ns=10**18 + i * 10**8,
            truth=np.eye(4),
            estimate=make_pose(np.eye(3), [error_m, 0, 0]) if letter in "TD" else None,
            state=STATES[letter],
            covariance=sigma_m**2 * np.eye(6),
            processed=letter != ".",
        )
        for i, letter in enumerate(pattern)
    ]


def test_a_good_run() -> None:
    result = streaming(records("TTTTT"))
    assert (result.availability, result.time_to_first_pose_s, result.false_ok, result.outages) == (1, 0, 0, 0)
    assert math.isnan(result.recovery_s["p50"]) and not result.lost_at_end


def test_first_pose_and_recovery_in_recorded_time() -> None:
    result = streaming(records("IIT.TLLDTTLT"))
    assert result.availability == pytest.approx(5 / 12)
    assert result.time_to_first_pose_s == pytest.approx(0.2)
    assert result.outages == 2 and result.recovery_s["p50"] == pytest.approx(0.2)


def test_an_outage_that_does_not_end_is_told_and_a_dropped_frame_is_none() -> None:
    assert streaming(records("TTLL")).lost_at_end and streaming(records("TTLL")).outages == 1
    assert streaming(records("TT..T")).outages == 0
    assert math.isnan(streaming(records("LLL")).time_to_first_pose_s) and streaming(records("LLL")).outages == 0


def test_false_ok_counts_only_what_is_called_tracking() -> None:
    assert streaming(records("TTTL", error_m=0.11)).false_ok == pytest.approx(0.75)
    assert streaming(records("TTTL", error_m=0.09)).false_ok == 0
    assert streaming(records("DDDD", error_m=5.0)).false_ok == 0
    assert streaming(records("TT", error_m=1.0, sigma_m=0.001)).confidently_wrong == 2
    assert streaming(records("TT", error_m=1.0, sigma_m=1.0)).confidently_wrong == 0


def test_nothing_is_no_number() -> None:
    result = streaming([])
    assert math.isnan(result.availability) and math.isnan(result.false_ok)


def test_a_bag_that_loops_does_not_take_time_back() -> None:
    looped = records("ITTT") + records("LLTT")
    result = streaming(looped)
    assert result.time_to_first_pose_s == pytest.approx(0.1)
    assert result.outages == 1 and result.recovery_s["p50"] == pytest.approx(0.2)
