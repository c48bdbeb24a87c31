# SPDX-License-Identifier: Apache-2.0
"""The feature-metric cost: its Jacobians agree with autograd, its sampling with grid_sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import has_numba
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.geometry.tensors import so3_exp_torch
from kfloc_ros.pixloc import camera_fit
from kfloc_ros.pixloc.camera_fit import fit_camera
from kfloc_ros.pixloc.cost import (
    FeatureImage,
    FitLevel,
    Intrinsics,
    RobustLoss,
    _jacobian,
    linearize,
    linearize_parts,
    project,
    projection_jacobian,
)
from kfloc_ros.pixloc.optimizer import StopRule, descend, left_update, minimize

CAMERA = Camera(160, 128, 140.0, 145.0, 80.0, 63.0)


def scene(count: int = 300) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([1.6, 1.2, 0.8])
    points[:, 2] += 2.0
    return points, make_pose(so3_exp([0.05, -0.03, 0.02]), [0.02, -0.01, 0.05])


def image(channels: int = 8, stride: float = 4.0) -> FeatureImage:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, channels, 10, 12, generator=generator)
    smooth = F.interpolate(maps, (32, 40), mode="bicubic")[0]
    return FeatureImage.from_maps(smooth, torch.rand(32, 40, generator=generator), stride)


def test_projection_jacobian_agrees_with_autograd() -> None:
    points, pose = scene(20)
    T = torch.from_numpy(pose)

    def projected(delta: torch.Tensor) -> torch.Tensor:
        moved = torch.eye(4, dtype=torch.float64)
        moved = torch.cat([torch.cat([so3_exp_torch(delta[3:]), delta[:3, None]], dim=1), moved[3:]])
        return project(points, moved @ T, CAMERA, 4.0)[0]

    expected = torch.autograd.functional.jacobian(projected, torch.zeros(6, dtype=torch.float64))
    _, P, _ = project(points, T, CAMERA, 4.0)
    assert torch.allclose(projection_jacobian(P, CAMERA, 4.0), expected, atol=1e-9)


def test_jacobian_by_the_camera_agrees_with_autograd() -> None:
    points, pose = scene(20)
    T, offsets = torch.from_numpy(pose), torch.tensor([0.05, -0.02, 3.0, -2.0, 0.08, 0.03], dtype=torch.float64)

    def projected(delta: torch.Tensor) -> torch.Tensor:
        moved = torch.eye(4, dtype=torch.float64)
        moved = torch.cat([torch.cat([so3_exp_torch(delta[3:6]), delta[:3, None]], dim=1), moved[3:]])
        x, y, z = (points @ (moved @ T)[:3, :3].T + (moved @ T)[:3, 3]).unbind(1)
        focal, aspect, cx, cy, k1, skew = (offsets + delta[6:]).unbind()
        x, y = x / z, y / z
        bend = 1 + k1 * (x * x + y * y)
        u = CAMERA.fx * focal.exp() * (x + skew * y) * bend + CAMERA.cx + cx
        v = CAMERA.fy * (focal + aspect).exp() * y * bend + CAMERA.cy + cy
        return (torch.stack([u, v], dim=1) + 0.5) / 4.0 - 0.5

    expected = torch.autograd.functional.jacobian(projected, torch.zeros(12, dtype=torch.float64))
    _, P, _ = project(points, T, CAMERA, 4.0)
    z = P[:, 2]
    found = _jacobian(P[:, 0] / z, P[:, 1] / z, z, Intrinsics.of(CAMERA, 4.0, offsets.numpy()))
    assert torch.allclose(found, expected, atol=1e-9)


def test_sampling_agrees_with_grid_sample() -> None:
    level = image()
    uv = torch.rand(100, 2) * torch.tensor([39.0, 31.0])
    rows, inside = level.sample(uv)
    maps = level.table.t().reshape(1, -1, 32, 40)
    grid = uv / torch.tensor([39.0, 31.0]) * 2 - 1
    expected = F.grid_sample(maps, grid[None, None], align_corners=True)[0, :, 0].t()
    assert inside.all()
    assert torch.allclose(rows, expected, atol=1e-5)


def test_gradient_is_the_central_difference_of_the_interpolated_map() -> None:
    level = image()
    C = level.channels
    uv = torch.rand(50, 2) * 20 + 5
    rows, _ = level.sample(uv)
    right, _ = level.sample(uv + torch.tensor([1.0, 0.0]))
    left, _ = level.sample(uv - torch.tensor([1.0, 0.0]))
    assert torch.allclose(rows[:, C : 2 * C], (right[:, :C] - left[:, :C]) / 2, atol=1e-5)


def test_normal_equations_agree_with_dense_jacobians() -> None:
    """H = sum w J^T J and g = sum w J^T r, built the long way from C x 6 Jacobians."""
    points, pose = scene()
    level, loss = image(), RobustLoss(0.5)
    C = level.channels
    features = torch.randn(len(points), C)
    confidence = torch.rand(len(points))
    T = torch.from_numpy(pose)
    at = linearize(level, points.float(), features, confidence, pose, CAMERA, loss)
    uv, P, front = project(points.float(), T.float(), CAMERA, level.stride)
    rows, inside = level.sample(uv)
    r = rows[:, :C] - features
    weight = confidence * rows[:, 3 * C] * (inside & front)
    total = weight.sum()
    weight = weight * loss.weight((r * r).sum(1)) / total
    gradient = torch.stack([rows[:, C : 2 * C], rows[:, 2 * C : 3 * C]], dim=2)
    J = gradient @ projection_jacobian(P, CAMERA, level.stride)
    H = torch.einsum("n,nci,ncj->ij", weight, J, J)
    g = torch.einsum("n,nci,nc->i", weight, J, r)
    assert np.allclose(at.H, H, rtol=1e-3, atol=1e-5)
    assert np.allclose(at.g, g, rtol=1e-3, atol=1e-5)
    assert at.valid_count == int((inside & front).sum())


@pytest.mark.parametrize("compiled", [True, False])
def test_parts_of_points_are_linearized_like_points_of_their_own(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("kfloc_ros.pixloc.cost.runs_compiled", lambda *tensors: False)
    points, pose = scene()
    level, cloud, features, confidence = image(), points.float(), torch.randn(len(points), 8), torch.rand(len(points))
    at = pose, CAMERA, RobustLoss(0.5)
    parts = linearize_parts(level, cloud, features, confidence, (120, 0, 150), *at)
    for part, rows in zip(parts, (slice(120), slice(0), slice(120, 270)), strict=True):
        own = linearize(level, cloud[rows], features[rows], confidence[rows], *at)
        assert (part.cost, part.valid_count, part.weight_sum) == (own.cost, own.valid_count, own.weight_sum)
        assert np.array_equal(part.H, own.H) and np.array_equal(part.g, own.g)


def test_no_point_in_view_is_an_infinite_cost_not_a_crash() -> None:
    points, pose = scene(10)
    behind = make_pose(np.eye(3), [0, 0, -10.0]) @ pose
    at = linearize(image(), points.float(), torch.randn(10, 8), torch.ones(10), behind, CAMERA, RobustLoss(0.5))
    assert at.cost == float("inf")
    assert at.valid_count == 0


@pytest.mark.parametrize("compiled", [True, False])
def test_points_beyond_the_fold_are_not_in_view(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("kfloc_ros.pixloc.cost.runs_compiled", lambda *tensors: False)
    offsets = np.array([0.0, 0.0, 0.0, 0.0, -0.06, 0.0])  # folds at a radius of 2.36
    r = 4.0  # far outside of the image, and r (1 - 0.06 r^2) = 0.16 is inside
    points = torch.tensor([[0.16, 0.0, 1.0], [r, 0.0, 1.0]])
    at = linearize(
        image(), points, torch.randn(2, 8), torch.ones(2), np.eye(4), CAMERA, RobustLoss(0.5), offsets=offsets
    )
    assert at.valid_count == 1


def test_robust_loss_weight_is_its_derivative() -> None:
    loss = RobustLoss(0.3)
    x = torch.linspace(0, 4, 50, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(loss.value(x).sum(), x)
    assert torch.allclose(derivative, loss.weight(x.detach()))
    assert float(loss.weight(torch.zeros(1))) == 1.0


def test_minimize_finds_the_pose_the_features_were_sampled_at() -> None:
    points, truth = scene()
    level = image(channels=16)
    uv, _, _ = project(points.float(), torch.from_numpy(truth).float(), CAMERA, level.stride)
    rows, inside = level.sample(uv)
    features, confidence = rows[:, :16], inside.float()

    def at(T: np.ndarray):  # type: ignore[no-untyped-def]
        return linearize(level, points.float(), features, confidence, T, CAMERA, RobustLoss(0.5))

    start = left_update(truth, np.array([0.01, -0.02, 0.02, 0.005, 0.01, -0.01]))
    result = minimize(at, start, StopRule(30))
    error = result.T_camera_map @ np.linalg.inv(truth)
    assert np.linalg.norm(error[:3, 3]) < 1e-3
    assert error[:3, :3] == pytest.approx(np.eye(3), abs=1e-3)
    assert result.end.cost < result.start.cost
    costs = [at(T).cost for T in result.poses]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.skipif(not has_numba(), reason="Numba is not installed; there is nothing to compare")
@pytest.mark.parametrize("iterations", [1, 30])
def test_the_compiled_descent_takes_the_steps_of_minimize(iterations: int) -> None:
    points, truth = scene()
    level = image(channels=16)
    uv, _, _ = project(points.float(), torch.from_numpy(truth).float(), CAMERA, level.stride)
    rows, inside = level.sample(uv)
    given = level, points.float(), rows[:, :16].contiguous(), inside.float()
    start = left_update(truth, np.array([0.03, -0.05, 0.04, 0.02, 0.02, -0.03]))
    fast = descend(*given, start, CAMERA, RobustLoss(0.5), StopRule(iterations))
    slow = minimize(lambda T: linearize(*given, T, CAMERA, RobustLoss(0.5)), start, StopRule(iterations))
    assert fast.iterations == slow.iterations and len(fast.poses) == len(slow.poses)
    assert np.allclose(fast.poses, slow.poses, atol=1e-9) and np.allclose(fast.costs, slow.costs, atol=1e-9)
    for a, b in ((fast.start, slow.start), (fast.end, slow.end)):
        assert a.valid_count == b.valid_count and a.cost == pytest.approx(b.cost)
        assert np.allclose(a.H, b.H, rtol=1e-6, atol=1e-6 * np.abs(b.H).max())
    nowhere = make_pose(np.eye(3), [0.0, 0.0, -100.0])
    assert descend(*given, nowhere, CAMERA, RobustLoss(0.5), StopRule(30)).end.cost == float("inf")


@pytest.mark.skipif(not has_numba(), reason="Numba is not installed; there is nothing to compare")
def test_the_compiled_fit_of_a_camera_takes_the_steps_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    points, truth = scene()
    image_level = image(channels=16)
    other = Camera(160, 128, 147.0, 145.0, 82.0, 63.0)
    uv, _, _ = project(points.float(), torch.from_numpy(truth).float(), other, image_level.stride)
    rows, inside = image_level.sample(uv)
    noise = 0.05 * torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(2))
    level = FitLevel(image_level, rows[:, :16] + noise, inside.float())
    start = left_update(truth, np.array([0.02, -0.03, 0.02, 0.01, 0.01, -0.02]))
    given = (level, level), points.float(), start, CAMERA, RobustLoss(0.5)
    fast = fit_camera(*given)
    monkeypatch.setattr(camera_fit, "runs_compiled", lambda *tensors: False)
    slow = fit_camera(*given)
    assert fast is not None and slow is not None and slow.offsets[0] > 0.01
    assert np.allclose(fast.offsets, slow.offsets, atol=1e-6) and fast.cost == pytest.approx(slow.cost)
    assert np.allclose(fast.T_camera_local, slow.T_camera_local, atol=1e-6)
    assert np.allclose(fast.information, slow.information, rtol=1e-4)
    nowhere = make_pose(np.eye(3), [0.0, 0.0, -100.0])
    monkeypatch.undo()
    assert fit_camera(*given[:2], nowhere, *given[3:]) is None
