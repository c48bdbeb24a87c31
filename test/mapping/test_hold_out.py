# SPDX-License-Identifier: Apache-2.0
"""Runs of views held out follow the camera's motion, and cost a bounded share of the views."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.build import affordable
from kfloc_ros.mapping.schedule import MAX_HELD_OUT, MAX_RUN, REACH_M, SHARE, HeldOut, HoldOut, inner_half
from kfloc_ros.mapping.views import View
from kfloc_ros.types import Matrix

VIEW = View(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.float32), None, np.eye(4), 0)  # type: ignore[arg-type]


def held_out(count: int, pace_m: float, turn_rad: float = 0.0, missing: frozenset[int] = frozenset()) -> list[int]:
    """Run of every view of a camera that goes straight on, 0 for views that are trained on."""
    chosen = HoldOut(count)
    runs = []
    for position in range(count):
        kept = chosen.holds_out(position)
        runs.append(chosen.runs if kept else 0)
        if kept:
            T: Matrix = make_pose(so3_exp([0.0, turn_rad * position, 0.0]), [pace_m * position, 0.0, 0.0])
            chosen.record(position, None if position in missing else T)
    return runs


def lengths(runs: list[int]) -> list[int]:
    return [len(list(group)) for run, group in itertools.groupby(runs) if run]


def test_a_run_ends_when_the_camera_has_left() -> None:
    slow, fast, strolling = (lengths(held_out(1000, pace_m)) for pace_m in (0.001, REACH_M / 12, 1.0))
    assert set(slow[:-1]) == {MAX_RUN}  # the last has what is left of the share
    assert all(12 <= length <= 14 for length in fast[:-1]) and len(fast) > 2 * len(slow) - 1
    assert set(strolling) == {2}


def test_a_turn_is_a_way_too() -> None:
    assert max(lengths(held_out(1000, 0.0, np.radians(2.0)))) <= REACH_M / 0.04 + 2


@pytest.mark.parametrize("count", [200, 350, 750, 1000, 5000, 50_000])
@pytest.mark.parametrize("pace_m", [0.0, 0.01, 0.3])
def test_the_share_and_the_number_held_out_are_bounded(count: int, pace_m: float) -> None:
    runs = held_out(count, pace_m)
    kept = sum(run > 0 for run in runs)
    assert 4 <= kept <= min(MAX_HELD_OUT, 1.6 * SHARE * count)
    assert len(lengths(runs)) >= 2
    assert not runs[0]


@pytest.mark.parametrize("count", [8, 12, 24, 60, 120, 199])
def test_a_short_source_gives_pairs(count: int) -> None:
    runs = held_out(count, 0.02)
    assert 2 <= sum(run > 0 for run in runs) <= count / 2
    assert min(lengths(runs)) >= 2


def test_views_without_a_pose_do_not_end_a_run_nor_stretch_it() -> None:
    everywhere = frozenset(range(1000))
    assert lengths(held_out(1000, 1.0, missing=everywhere))[0] == MAX_RUN
    bad = HoldOut(1000)
    assert not bad.holds_out(0)
    start = next(p for p in range(1000) if bad.holds_out(p))
    bad.record(start, np.full((4, 4), np.nan))
    assert bad.holds_out(start + 1)


def test_whole_runs_are_left_out_for_want_of_time() -> None:
    views = [HeldOut(VIEW, stamp, 1 + stamp // 10) for stamp in range(40)]
    assert affordable(views, 40) == views
    half = affordable(views, 20)
    assert [held.run for held in half] == [1] * 10 + [3] * 10
    assert len(affordable(views, 0)) == 3


def test_variances_are_seen_far_from_trained_views() -> None:
    def of(*lengths: int) -> list[int]:
        runs = [HeldOut(VIEW, 0, number) for number, length in enumerate(lengths) for _ in range(length)]
        return [k for k, inner in enumerate(inner_half(runs)) if inner]

    assert of(8) == [2, 3, 4, 5]
    assert of(2, 3) == [0, 1, 2, 3, 4]
    assert of(4, 24) == [1, 2, *range(10, 22)]
    assert of() == []
