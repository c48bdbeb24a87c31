# SPDX-License-Identifier: Apache-2.0
"""A change of medians is told from chance, frames being paired and neighbours alike."""

from __future__ import annotations

import math

import numpy as np
import pytest

from studies.paired import median_change


def errors(seed: int, count: int = 200) -> list[float]:
    """Hard and easy frames, neighbours alike."""
    noise = np.random.default_rng(seed).normal(size=count + 20)
    return [float(e) for e in 0.04 + 0.02 * np.abs(np.convolve(noise, np.ones(20) / 4, mode="valid")[:count])]


def test_what_is_hard_about_a_frame_cancels() -> None:
    before = errors(0)
    shuffle = np.random.default_rng(1).normal(0.0, 1e-4, len(before))
    better = median_change(before, [b - 0.001 + e for b, e in zip(before, shuffle, strict=True)])
    assert better.change == pytest.approx(-0.001, abs=3e-4)
    assert better.low <= better.change <= better.high
    assert better.is_better and not better.is_worse
    worse = median_change(before, [b + 0.001 + e for b, e in zip(before, shuffle, strict=True)])
    assert worse.is_worse and not worse.is_better


def test_errors_of_the_same_kind_are_not_told_apart() -> None:
    told = [median_change(errors(2 * k), errors(2 * k + 1)) for k in range(20)]
    wrong = sum(change.is_worse or change.is_better for change in told)
    assert wrong <= 4  # 1 expected; without blocks it would be a third


def test_failed_frames_count_as_infinitely_far() -> None:
    some = median_change([0.02, math.inf, 0.02, 0.02, 0.02] * 8, [0.01, 0.01, 0.01, math.inf, 0.01] * 8)
    assert some.change == pytest.approx(-0.01) and some.is_better
    lost = median_change([math.inf] * 9, [math.inf] * 9)
    assert math.isnan(lost.change) and not lost.is_better and not lost.is_worse
    found = median_change([math.inf] * 20, [0.05] * 20)
    assert found.change == -math.inf and found.is_better


def test_there_is_nothing_to_tell_without_frames() -> None:
    assert math.isnan(median_change([], []).change)
    with pytest.raises(ValueError, match="cannot be paired"):
        median_change([0.1], [])
