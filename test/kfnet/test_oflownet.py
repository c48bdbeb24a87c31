# SPDX-License-Identifier: Apache-2.0
"""Backward flow on feature maps whose motion is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.kfnet.flow import PIXEL_LOCKING_VARIANCE, backward_flow


def smooth_features(h: int, w: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 64, h // 2 + 8, w // 2 + 8, generator=generator)
    return F.interpolate(noise, scale_factor=2, mode="bicubic")[0]


@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (-3, 2), (6, -5)])
def test_integer_motion_is_found(shift: tuple[int, int]) -> None:
    dx, dy = shift
    world = smooth_features(48, 64)
    previous = F.normalize(world[:, 8:48, 8:64], dim=0)
    current = F.normalize(world[:, 8 + dy : 48 + dy, 8 + dx : 64 + dx], dim=0)
    flow = backward_flow(current, previous, temperature=0.02)
    inner = flow.valid.clone()
    inner[:8], inner[-8:], inner[:, :8], inner[:, -8:] = False, False, False, False
    assert inner.sum() > 400
    # cell p of the current frame shows what was at p + shift in the world cut-out, hence p + shift before
    error = (flow.offset - torch.tensor([dx, dy]).reshape(2, 1, 1)).norm(dim=0)[inner]
    assert error.median() < 0.15


def test_half_cell_motion_is_found() -> None:
    world = smooth_features(48, 64)
    previous = F.normalize(world[:, 4:44, 4:60], dim=0)
    current = F.normalize((world[:, 4:44, 4:60] + world[:, 4:44, 5:61]) / 2, dim=0)
    flow = backward_flow(current, previous, temperature=0.05)
    assert flow.offset[0][5:-5, 5:-5].median() == pytest.approx(0.5, abs=0.15)
    assert flow.offset[1][5:-5, 5:-5].median() == pytest.approx(0.0, abs=0.1)


def test_motion_beyond_the_window_is_invalid_or_uncertain_and_never_nan() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (F.normalize(torch.randn(64, 30, 40, generator=generator), dim=0) for _ in range(2))
    flow = backward_flow(a, b, temperature=0.05)
    assert torch.isfinite(flow.offset).all()
    assert torch.isfinite(flow.variance).all()
    assert flow.variance.median() > 5 * PIXEL_LOCKING_VARIANCE


def test_cells_that_leave_the_image_are_invalid() -> None:
    world = smooth_features(48, 64)
    previous = F.normalize(world[:, 8:48, 8:64], dim=0)
    current = F.normalize(world[:, 8:48, 12:68], dim=0)
    flow = backward_flow(current, previous, temperature=0.02)
    assert flow.valid[:, -3:].float().mean() < 0.3
    assert flow.valid[4:-4, 8:-12].float().mean() > 0.9
