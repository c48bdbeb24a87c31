# SPDX-License-Identifier: Apache-2.0
"""Cell statistics on errors whose distribution is known."""

from __future__ import annotations

import math

import pytest
import torch

from kfloc_ros.types import SceneCoordinates
from studies.cells import CellStatistics


def frame(sigma_m: float, claimed_m: float, seed: int) -> tuple[SceneCoordinates, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(3, 60, 80, generator=generator)
    noise = sigma_m * torch.randn(3, 60, 80, generator=generator)
    return SceneCoordinates(truth + noise, torch.full((60, 80), claimed_m**2), torch.ones(60, 80).bool(), 8), truth


def test_right_variances_cover_what_a_gaussian_does() -> None:
    statistics = CellStatistics()
    for seed in range(3):
        coordinates, truth = frame(0.05, 0.05, seed)
        statistics.add(coordinates, truth, torch.ones(60, 80).bool())
    result = statistics.result()
    assert result.frames == 3
    assert result.coverage == pytest.approx((0.683, 0.954, 0.997), abs=0.01)
    assert result.normalized_mean_square == pytest.approx(1.0, abs=0.03)
    assert result.median_error_m == pytest.approx(0.05 * 1.538, rel=0.03)  # median of a chi with 3 degrees


def test_overconfident_variances_show_and_unknown_cells_do_not_count() -> None:
    statistics = CellStatistics()
    coordinates, truth = frame(0.05, 0.025, 0)
    known = torch.ones(60, 80).bool()
    known[:30] = False
    coordinates.mean[:, :30] += 100.0
    statistics.add(coordinates, truth, known)
    result = statistics.result()
    assert result.normalized_mean_square == pytest.approx(4.0, rel=0.06)
    assert result.coverage[0] == pytest.approx(0.383, abs=0.02)


def test_without_truth_there_is_no_figure() -> None:
    statistics = CellStatistics()
    coordinates, truth = frame(0.05, 0.05, 0)
    statistics.add(coordinates, truth, torch.zeros(60, 80).bool())
    assert statistics.result().frames == 0
    assert math.isnan(statistics.result().median_error_m)
