# SPDX-License-Identifier: Apache-2.0
"""The process noise of both flows is scaled until it holds as many errors as it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.kfnet.flow_network import LEARNED_FLOOR_M2
from kfloc_ros.mapping.calibration import (
    ONE_SIGMA,
    TEMPERATURES,
    USUAL_LEARNED_SCALE,
    PropagationErrors,
    calibrate_flow,
)
from kfloc_ros.maps.scene_map import Calibration
from kfloc_ros.types import SceneCoordinates

METRES_PER_CELL = 0.03


@pytest.mark.parametrize("scale", [0.02, 0.5, 8.0])
def test_the_scale_puts_the_right_share_inside_one_sigma(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    process = 1e-4 * torch.rand(50_000, generator=generator) + 1e-6
    error = (scale * process + LEARNED_FLOOR_M2).sqrt() * torch.randn(50_000, generator=generator)
    carried = PropagationErrors(error.square(), process, 0.0)
    found = carried.scale(LEARNED_FLOOR_M2)
    assert found == pytest.approx(scale, rel=0.1)
    inside = (error.square() < found * process + LEARNED_FLOOR_M2).float().mean()
    assert inside == pytest.approx(ONE_SIGMA, abs=1e-3)
    assert PropagationErrors(torch.zeros(3), torch.ones(3), 0.0).scale(LEARNED_FLOOR_M2) == USUAL_LEARNED_SCALE


def test_both_flows_are_calibrated_on_the_same_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 64, 24, 32, generator=generator)
    world = F.interpolate(noise, scale_factor=2, mode="bicubic")[0]
    features, truth = [], []
    for k in range(3):  # the camera moves one cell a frame along a wall
        part = world[:, 4:40, 4 + k : 52 + k] + 0.1 * torch.randn(64, 36, 48, generator=generator)
        features.append(F.normalize(part, dim=0))
        rows, cols = torch.meshgrid(torch.arange(36.0), torch.arange(48.0) + k, indexing="ij")
        mean = METRES_PER_CELL * torch.stack([cols, rows, torch.zeros_like(rows)])
        truth.append(SceneCoordinates(mean, torch.zeros(36, 48), torch.ones(36, 48, dtype=torch.bool), 8))
    before = Calibration()
    found = calibrate_flow(before, features, truth, [1, 2])
    assert found.flow_temperature in TEMPERATURES and found.process_scale != before.process_scale
    assert found.learned_process_scale is not None and 1e-3 <= found.learned_process_scale <= 10.0
    assert found.process_floor_m2 == before.process_floor_m2
