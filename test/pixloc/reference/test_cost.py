# SPDX-License-Identifier: Apache-2.0
"""Sampling and normal equations of the reference family, against grid_sample, autograd and the formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.solver import recentre

CAMERAS = [
    Camera(80, 64, 70.0, 72.0, 39.0, 31.0),
    Camera(80, 64, 70.0, 72.0, 39.0, 31.0, "plumb_bob", (-0.1, 0.02, 0.003, -0.002)),
    Camera(80, 64, 60.0, 61.0, 39.0, 31.0, "equidistant", (0.02, -0.01, 0.003, 0.001)),
]


def smooth_maps(batch: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, channels, height // 6 + 2, width // 6 + 2, generator=generator, dtype=torch.float64)
    return F.interpolate(maps, (height, width), mode="bicubic")


def problem(camera: Camera, batch: int = 2, pad: int = 2) -> tuple[FeatureCost, Pose]:
    generator = torch.Generator().manual_seed(4)
    points = torch.rand(batch, 150, 3, generator=generator, dtype=torch.float64) * 3 - 1.5
    points[..., 2] += 3.5
    T = Pose.from_aa(
        torch.tensor([[0.03, -0.02, 0.05], [0.0, 0.04, -0.02]])[:batch].double(), torch.zeros(batch, 3).double()
    )
    return (
        FeatureCost(
            query=FeatureMap.with_confidence(smooth_maps(batch, 6, 64, 80), smooth_maps(batch, 1, 64, 80, 1).sigmoid()),
            camera=CameraTensor.stack([CameraTensor.from_camera(camera)] * batch),
            points=points,
            features=torch.randn(batch, 150, 6, generator=generator, dtype=torch.float64),
            confidence=torch.rand(batch, 150, generator=generator, dtype=torch.float64),
            pad=pad,
        ),
        T,
    )


def test_samples_are_those_of_grid_sample() -> None:
    maps = smooth_maps(2, 5, 20, 30)
    uv = torch.rand(2, 50, 2, dtype=torch.float64) * torch.tensor([29.0, 19.0])
    grid = uv / torch.tensor([29.0, 19.0]) * 2 - 1
    expected = F.grid_sample(maps, grid[:, None], align_corners=True)[:, :, 0].mT
    found = FeatureMap.from_maps(maps).sample(uv)
    assert torch.allclose(found.values, expected, atol=1e-12)
    assert found.inside.all()


def test_the_gradient_is_the_central_difference_of_the_samples() -> None:
    field = FeatureMap.from_maps(smooth_maps(1, 5, 20, 30))
    uv = torch.rand(1, 50, 2, dtype=torch.float64) * torch.tensor([25.0, 15.0]) + 2
    found = field.sample_with_gradient(uv)
    step = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(found.du, (field.sample(uv + step).values - field.sample(uv - step).values) / 2)


def test_cubic_samples_are_cubic_convolution_with_its_own_gradient() -> None:
    maps = smooth_maps(2, 3, 20, 30).double()
    field = FeatureMap.from_maps(maps, cubic=True)
    uv = (torch.rand(2, 40, 2, dtype=torch.float64) * torch.tensor([25.0, 15.0]) + 2).requires_grad_()
    values, du, dv, inside = field.sample_with_gradient(uv, pad=1)
    assert inside.all()
    whole = torch.stack(torch.meshgrid(torch.arange(3.0, 9.0), torch.arange(4.0, 7.0), indexing="xy"), -1)
    at_cells = field.sample(whole.reshape(1, -1, 2).expand(2, -1, 2).double()).values
    assert torch.allclose(at_cells, maps[:, :, 4:7, 3:9].flatten(2).mT)
    for channel in range(3):
        (slope,) = torch.autograd.grad(values[..., channel].sum(), uv, retain_graph=True)
        assert torch.allclose(slope, torch.stack([du[..., channel], dv[..., channel]], -1))
    line = FeatureMap.from_maps(torch.arange(30.0).expand(1, 1, 20, 30), cubic=True)  # a plane is reproduced
    assert torch.allclose(line.sample(uv[:1].detach().float()).values[..., 0], uv[:1, :, 0].detach().float(), atol=1e-4)
    edge = torch.tensor([[[1.5, 9.0], [2.0, 9.0], [27.0, 9.0], [27.5, 9.0], [-3.0, 40.0], [torch.nan, 9.0]]])
    assert line.inside(edge, 1)[0].tolist() == [False, True, True, False, False, False]
    assert line.sample(edge).values.isfinite().all()


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_the_border_is_not_used(pad: int) -> None:
    field = FeatureMap.from_maps(torch.rand(1, 2, 20, 30))
    uv = torch.tensor(
        [[[pad, pad], [pad - 0.01, 9], [29.0 - pad, 19 - pad], [9, 19.01 - pad], [torch.nan, 3], [1e30, 3]]]
    )
    assert field.sample(uv, pad).inside.tolist() == [[True, False, True, False, False, False]]
    assert field.sample(uv, pad).values.isfinite().all()


def test_a_map_of_one_cell_can_be_sampled() -> None:
    values, _ = FeatureMap.from_maps(torch.full((1, 1, 1, 1), 3.0)).sample(torch.tensor([[[0.0, 0.0], [5.0, -5.0]]]))
    assert values.flatten().tolist() == [3.0, 3.0]


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.distortion_model)
def test_normal_equations_are_those_of_the_jacobian_written_out(camera: Camera) -> None:
    cost, T = problem(camera)
    loss = RobustLoss.parse("scaled_barron(0, 0.7)")
    at = cost.linearize(T, loss, column_norms=True)

    def pixels(delta: torch.Tensor) -> torch.Tensor:
        return cost.camera.world2image(T.retract(delta).transform(cost.points)).points

    delta = torch.zeros(2, 6, dtype=torch.float64)
    dp = torch.autograd.functional.jacobian(pixels, delta)
    dp = torch.stack([dp[b, :, :, b] for b in range(2)])
    samples = cost.query.sample_with_gradient(pixels(delta), cost.pad)
    J = samples.du[..., :6, None] * dp[:, :, 0, None] + samples.dv[..., :6, None] * dp[:, :, 1, None]
    r = samples.values[..., :6] - cost.features
    w = at.valid * cost.confidence * samples.values[..., 6] * loss.weight(r.square().sum(-1))
    assert 30 < at.valid_count.min() <= at.valid_count.max() < 150
    assert torch.allclose(at.H, torch.einsum("bn,bnci,bncj->bij", w, J, J), rtol=1e-8)
    assert torch.allclose(at.g, torch.einsum("bn,bnci,bnc->bi", w, J, r), rtol=1e-8)
    assert at.column_norms is not None
    assert torch.allclose(at.column_norms, J.norm(dim=-2) * at.valid[..., None], atol=1e-8)


def test_masked_points_do_not_count() -> None:
    cost, T = problem(CAMERAS[0])
    few = torch.zeros(2, 150, dtype=torch.bool)
    few[0, :40] = True
    masked = FeatureCost(**{**vars(cost), "mask": few})
    at = masked.linearize(T, RobustLoss())
    assert at.valid_count[1] == 0
    assert at.H[1].abs().max() == 0
    assert at.mean_cost[1] == torch.inf
    alone = FeatureCost(**{
        **vars(cost), "points": cost.points[:, :40], "features": cost.features[:, :40],
        "confidence": cost.confidence[:, :40],
    }).linearize(T, RobustLoss())  # fmt: skip
    assert torch.allclose(at.H[0], alone.H[0])
    assert torch.allclose(at.mean_cost[0], alone.mean_cost[0])


def test_gradients_reach_features_and_pose() -> None:
    cost, T = problem(CAMERAS[0], batch=1)
    table = cost.query.table.clone().requires_grad_()
    tracked = FeatureCost(**{**vars(cost), "query": FeatureMap(table, 1, 64, 80)})
    delta = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    at = tracked.linearize(T.retract(delta), RobustLoss())
    at.mean_cost.sum().backward()
    assert table.grad is not None and table.grad.abs().max() > 0
    assert delta.grad is not None and delta.grad.abs().min() > 0


def test_far_from_the_origin_single_precision_is_enough() -> None:
    cost, T = problem(CAMERAS[0])
    far = torch.tensor([4.5e5, 5.1e6, 300.0], dtype=torch.float64)
    world = Pose.from_Rt(T.R, T.t - (T.R @ far))
    local = recentre(cost.points + far, world)
    assert local.points.dtype == torch.float32
    expected = T.transform(cost.points)
    assert torch.allclose(local.T.transform(local.points.double()), expected, atol=1e-6)
