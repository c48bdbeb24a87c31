# SPDX-License-Identifier: Apache-2.0
"""Several runs of one method: means with their spread, and maps that differ by a little noise."""

from __future__ import annotations

import math

import pytest
import torch
from closets import closet
from second_visit import Answer, cells, mean_row, noisy, row, shared_rows


def answers(*away_m: float) -> list[Answer]:
    return [Answer(away, 1.0, claimed=math.isfinite(away), time_ms=50.0) for away in away_m]


def test_means_and_spread_of_runs_are_over_the_same_figures() -> None:
    runs = [row("kfloc", answers(0.01, 0.01, 0.03, 0.2)), row("kfloc", answers(0.01, 0.03, 0.03, math.inf))]
    mean = mean_row(runs)
    assert mean.recalls["0.05_5.0"] == pytest.approx(0.75) and mean.spread["0.05_5.0"] == 0.0
    assert mean.pose_given == pytest.approx(0.875) and mean.wrong == pytest.approx(0.125)
    assert mean.spread["wrong"] == pytest.approx(0.25 / math.sqrt(2))
    assert mean.runs == tuple(runs) and mean.frames == 4
    assert cells(mean)[2] == "87.5 +- 17.7 %"


def test_a_single_run_is_told_without_a_spread() -> None:
    single = row("kfloc", answers(0.01, math.inf))
    assert mean_row([single]) is single
    assert "+-" not in "".join(cells(single))


def test_methods_are_compared_on_the_frames_on_which_both_give_a_pose() -> None:
    peer, own = answers(0.01, math.inf, 0.03, 0.02), answers(0.04, 0.2, math.inf, 0.06)
    mine, other = shared_rows("SIFT", peer, own)
    assert mine.frames == other.frames == 2
    assert mine.median_m == pytest.approx(0.05) and other.median_m == pytest.approx(0.015)
    assert shared_rows("SIFT", answers(math.inf), answers(0.1)) == []


def test_the_first_run_has_the_map_as_it_is_and_every_other_its_own_noise() -> None:
    scene_map = closet(3)
    assert noisy(scene_map, 0) is scene_map
    before = torch.cat([view.confidence for view in scene_map.references.views])
    ratios = [
        torch.cat([view.confidence for view in noisy(scene_map, run).references.views]) / before for run in (1, 1, 2)
    ]
    assert torch.equal(ratios[0], ratios[1]) and not torch.equal(ratios[0], ratios[2])
    assert 0.01 < float(ratios[0].std()) < 0.03
    assert noisy(scene_map, 1).head is scene_map.head
