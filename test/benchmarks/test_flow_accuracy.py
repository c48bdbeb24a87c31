# SPDX-License-Identifier: Apache-2.0
"""Figures of a flow whose errors are known."""

from __future__ import annotations

import math

import pytest
import torch

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.types import SceneCoordinates
from studies.flow_accuracy import FlowStatistics

H, W = 30, 40
EVERYWHERE = torch.ones(H, W, dtype=torch.bool)


def slope(metres_per_cell: float) -> SceneCoordinates:
    """Coordinates that grow to the right in x, the same in both frames, and are 1 m in y and z."""
    mean = torch.ones(3, H, W)
    mean[0] = metres_per_cell * torch.arange(W)
    return SceneCoordinates(mean, torch.zeros(H, W), EVERYWHERE, 8, 0.0)


def flow_of(offset: torch.Tensor, sigma_cells: float, process_m2: float) -> Flow:
    return Flow(
        offset,
        torch.full((H, W), sigma_cells**2),
        EVERYWHERE,
        process_variance_m2=torch.full((H, W), process_m2),
    )


def test_errors_lost_cells_and_what_they_carry_are_told() -> None:
    """The camera rests, and the flow of the left quarter is 2 cells off: 2 cm where a cell is a centimetre."""
    offset = torch.zeros(2, H, W)
    offset[0, :, : W // 4] = 2.0
    statistics = FlowStatistics()
    for _ in range(2):
        statistics.add(flow_of(offset, 0.5, 0.01**2), torch.zeros(2, H, W), EVERYWHERE, slope(0.01), slope(0.01))
    found = statistics.result()
    assert (found.pairs, found.known) == (2, 1.0)
    assert (found.median_cells, found.p90_cells) == (0.0, 2.0)
    assert found.lost == pytest.approx(0.25)
    assert found.flow_inside_1sigma == pytest.approx(7 / 8)  # y is right everywhere
    assert found.prior_axis_rms_m == pytest.approx(0.02 * math.sqrt(1 / 12), rel=1e-3)
    assert found.prior_inside_1sigma == pytest.approx(11 / 12)


def test_the_scale_makes_the_process_noise_right() -> None:
    """Errors of 3 cm sigma under a noise that says 1 cm: the variance is too small by nine."""
    generator = torch.Generator().manual_seed(0)
    offset = torch.zeros(2, H, W)
    now = slope(0.0)
    noisy = SceneCoordinates(
        now.mean + 0.03 * torch.randn(3, H, W, generator=generator), now.variance, EVERYWHERE, 8, 0.0
    )
    statistics = FlowStatistics()
    statistics.add(flow_of(offset, 0.5, 0.01**2), offset, EVERYWHERE, noisy, now)
    found = statistics.result()
    assert found.process_scale == pytest.approx(9.0, rel=0.15)
    assert found.process_inside_1sigma == pytest.approx(0.683, abs=0.03)
    assert found.prior_inside_1sigma == pytest.approx(0.26, abs=0.03)


def test_cells_that_cannot_be_compared_do_not_count() -> None:
    statistics = FlowStatistics()
    flow = flow_of(torch.zeros(2, H, W), 0.5, 1e-4)
    statistics.add(flow, torch.zeros(2, H, W), ~EVERYWHERE, slope(0.01), slope(0.01))
    assert math.isnan(statistics.result().median_cells)
    assert math.isnan(FlowStatistics().result().prior_axis_median_m)
