# SPDX-License-Identifier: Apache-2.0
"""Cells without depth: predictions are drawn to their rays, and several views of a point fix its depth."""

from __future__ import annotations

import numpy as np
import torch

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.training.reprojection import reprojection_loss

POINT = torch.tensor([0.3, -0.2, 2.0])


def views(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses (N, 4, 4) on a line, and the rays (N, 2) on which they see the point."""
    T = torch.from_numpy(
        np.stack([make_pose(so3_exp([0, -0.1 * k, 0]), [0.3 * k, 0, 0]) for k in range(count)])
    ).float()
    local = torch.einsum("nji,nj->ni", T[:, :3, :3], POINT - T[:, :3, 3])
    return T, local[:, :2] / local[:, 2:]


def fit(start: list[float], count: int) -> torch.Tensor:
    T, rays = views(count)
    point = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=0.02)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 600)
        optimizer.zero_grad()
        loss = reprojection_loss(point.expand(count, 3), torch.full((count,), -2.0), rays, T, 2.0)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return point.detach()


def test_several_views_fix_a_point() -> None:
    assert (fit([0.2, 0.0, 2.6], 4) - POINT).norm() < 0.01


def test_a_point_behind_the_camera_is_drawn_before_it() -> None:
    assert (fit([0.1, 0.3, -1.0], 4) - POINT).norm() < 0.01


def test_one_view_fixes_the_ray_but_not_the_depth() -> None:
    found = fit([0.35, -0.2, 2.5], 1)
    assert (found[:2] / found[2] - POINT[:2] / POINT[2]).norm() < 0.005
    assert found[2] > 2.2


def test_a_claimed_precision_that_is_not_met_costs() -> None:
    T, rays = views(4)
    off = (POINT + torch.tensor([0.0, 0.05, 0.0])).expand(4, 3)
    sure, fair = (reprojection_loss(off, torch.full((4,), np.log(b)), rays, T, 2.0) for b in (0.005, 0.025))
    assert fair < sure
