# SPDX-License-Identifier: Apache-2.0
"""Cells gathered for reprojection are those without depth, each on its own ray."""

from __future__ import annotations

import numpy as np
import torch

from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.rays import RayCollector
from kfloc_ros.mapping.views import IDENTITY, View, cell_coordinates

CAMERA = Camera(320, 256, 250.0, 251.0, 160.0, 127.0)


def view() -> View:
    """Depth is known in the left half only."""
    depth = np.full((256, 320), 2.0, np.float32)
    depth[:, 160:] = 0
    return View(np.zeros((256, 320, 3), np.uint8), depth, CAMERA, make_pose(so3_exp([0.1, 0.2, 0]), [1, 2, 3]), 7)


def features() -> TrunkFeatures:
    """The first channel numbers the cells."""
    coarse = torch.zeros(1, 64, 32, 40)
    coarse[0, 0] = torch.arange(32 * 40).reshape(32, 40)
    return TrunkFeatures(coarse, torch.zeros(1, 24, 64, 80), torch.zeros(1, 128, 32, 40), torch.ones(1, 32, 40))


def test_cells_without_depth_are_gathered_with_their_rays() -> None:
    collector = RayCollector(10_000, 0)
    for _ in range(2):
        collector.add(view(), features(), IDENTITY)
    cells = collector.cells()
    assert cells is not None and cells.usual_depth_m == 2.0
    _, known = cell_coordinates(view(), (32, 40))
    number = cells.inputs[: len(cells) // 2, 0].long().numpy()
    assert set(number) == set(np.flatnonzero(~known))
    row, col = np.divmod(number, 40)
    expected = np.column_stack([(col * 8 + 3.5 - 160) / 250, (row * 8 + 3.5 - 127) / 251])
    np.testing.assert_allclose(cells.rays[: len(number)].numpy(), expected, atol=1e-6)
    assert set(cells.view.tolist()) == {0, 1}


def test_a_limit_holds_and_too_few_are_none() -> None:
    collector = RayCollector(100, 0)
    collector.add(view(), features(), IDENTITY)
    assert collector.cells() is None
    for _ in range(10):
        collector.add(view(), features(), IDENTITY)
    cells = collector.cells()
    assert cells is not None and len(cells) == 1100
