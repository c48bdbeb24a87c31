# SPDX-License-Identifier: Apache-2.0
"""The solvers find a pose that is known, contain what cannot be solved, and stop when the original would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.errors import ConfigError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.solver import (
    Iteration,
    Method,
    SolverSettings,
    damped_step,
    from_recentred,
    minimize,
    recentre,
)

CAMERA = Camera(120, 96, 100.0, 101.0, 59.0, 47.0, "plumb_bob", (-0.05, 0.01, 0.0, 0.0))
EXACT = SolverSettings(num_iters=40, loss=RobustLoss.parse("scaled_barron(0, 0.5)"), stop_period=1, stop_step_m=1e-7,
                       stop_step_deg=1e-6, stop_gradient=0.0)  # fmt: skip


def scene(batch: int = 2, spread: float = 1.0) -> tuple[FeatureCost, Pose]:
    """Points whose features are those that the query shows at the true pose."""
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(batch, 8, 14, 17, generator=generator, dtype=torch.float64)
    maps = F.interpolate(maps, (96, 120), mode="bicubic")
    query = FeatureMap.with_confidence(maps, torch.full((batch, 1, 96, 120), 0.8).double())
    camera = CameraTensor.stack([CameraTensor.from_camera(CAMERA)] * batch)
    points = (torch.rand(batch, 400, 3, generator=generator, dtype=torch.float64) - 0.5) * 2.4 * spread
    points[..., 2] += 3.0
    truth = Pose.from_aa(
        torch.tensor([[0.02, -0.03, 0.04], [-0.03, 0.01, 0.0]])[:batch].double(),
        torch.tensor([[0.02, 0.03, -0.05], [0.0, -0.04, 0.03]])[:batch].double(),
    )
    uv = camera.world2image(truth.transform(points)).points
    ones = torch.ones(batch, 400, dtype=torch.float64)
    return FeatureCost(query, camera, points, query.sample(uv).values[..., :8], ones), truth


def distance(a: Pose, b: Pose) -> tuple[torch.Tensor, torch.Tensor]:
    angle, length = (a @ b.inv()).magnitude()
    return angle, length


@pytest.mark.parametrize(
    ("method", "damping", "scaling"),
    [
        (Method.FIXED, 0.0, False), (Method.FIXED, 1e-2, False), (Method.FIXED, [0.1] * 6, True),
        (Method.CLASSIC, 0.0, False), (Method.CLASSIC, 0.0, True),
    ],
)  # fmt: skip
def test_every_method_finds_the_pose(method: Method, damping: float | list[float], scaling: bool) -> None:
    cost, truth = scene()
    settings = replace(EXACT, method=method, jacobi_scaling=scaling)
    result = minimize(cost, Pose.identity(2, dtype=torch.float64), settings, torch.as_tensor(damping))
    angle, length = distance(result.T, truth)
    assert angle.max() < 1e-3
    assert length.max() < 1e-4
    assert not result.failed.any()
    assert result.initial.mean_cost.min() > 10 * cost.linearize(result.T, settings.loss).mean_cost.max()


def test_far_worlds_end_where_near_ones_do() -> None:
    cost, truth = scene()
    far = torch.tensor([4.5e5, 5.1e6, 300.0], dtype=torch.float64)
    world = Pose.from_Rt(truth.R, truth.t - truth.R @ far)
    start = world.retract(torch.full((2, 6), 0.01, dtype=torch.float64))
    local = recentre(cost.points + far, start)
    single = FeatureCost(
        FeatureMap(cost.query.table.float(), 2, 96, 120), cost.camera, local.points, cost.features.float(),
        cost.confidence.float(),
    )  # fmt: skip
    found = from_recentred(minimize(single, local.T, EXACT).T, local.origin)
    angle, _ = distance(found, world)
    assert angle.max() < 1e-3
    # The camera's place, not t, which grows with the distance to the origin.
    assert (found.inv().t - world.inv().t).norm(dim=-1).max() < 2e-4


def test_classic_never_raises_the_cost() -> None:
    cost, _ = scene()
    costs: list[torch.Tensor] = []
    minimize(
        cost, Pose.identity(2, dtype=torch.float64), replace(EXACT, method=Method.CLASSIC),
        observer=lambda it: costs.append(it.at.mean_cost),
    )  # fmt: skip
    assert len(costs) > 3
    assert (torch.stack(costs).diff(dim=0) <= 0).all()


def test_one_element_without_points_does_not_hold_up_the_other() -> None:
    cost, truth = scene()
    mask = torch.ones(2, 400, dtype=torch.bool)
    mask[0, 9:] = False
    for method in Method:
        result = minimize(
            replace(cost, mask=mask), Pose.identity(2, dtype=torch.float64), replace(EXACT, method=method)
        )
        assert result.failed.tolist() == [True, False]
        assert torch.equal(result.T.data[0], Pose.identity(dtype=torch.float64).data)
        assert distance(result.T[1:], truth[1:])[1].max() < 1e-4


def test_a_system_without_a_solution_gives_no_step() -> None:
    H = torch.stack([torch.eye(6), torch.full((6, 6), torch.nan), -torch.eye(6), torch.eye(6)]).double()
    g = torch.ones(4, 6, dtype=torch.float64)
    g[3, 2] = torch.inf
    step = damped_step(H, g, torch.zeros(6), torch.ones(4, dtype=torch.bool))
    assert step.solved.tolist() == [True, False, False, False]
    assert torch.allclose(step.delta[0], torch.full((6,), -1.0).double(), atol=1e-5)
    assert step.delta[1:].abs().max() == 0


def test_damping_slows_its_own_direction_only() -> None:
    H, g = torch.eye(6, dtype=torch.float64)[None], torch.ones(1, 6, dtype=torch.float64)
    step = damped_step(H, g, torch.tensor([0.0, 99.0, 0, 0, 0, 0]), torch.ones(1, dtype=torch.bool))
    assert step.delta[0].tolist() == pytest.approx([-1, -0.01, -1, -1, -1, -1], rel=1e-5)


def test_the_stop_test_runs_every_tenth_iteration() -> None:
    cost, truth = scene()
    seen: list[Iteration] = []
    settings = SolverSettings(num_iters=60)
    # Where the first step is short already, the first test ends it.
    assert minimize(cost, truth, settings, observer=seen.append).iterations == 1
    assert len(seen) == 1
    assert minimize(cost, Pose.identity(2, dtype=torch.float64), settings, 0.3).iterations in (11, 21, 31)
    assert minimize(cost, truth, replace(settings, stop_period=0, num_iters=4)).iterations == 4


def test_training_can_differentiate_through_all_steps() -> None:
    cost, truth = scene(1)
    features = cost.features.clone().requires_grad_()
    damping = torch.full((6,), 0.1, dtype=torch.float64, requires_grad=True)
    settings = SolverSettings(num_iters=5, stop_period=0)
    result = minimize(
        replace(cost, features=features), truth.retract(torch.full((1, 6), 0.01).double()), settings, damping
    )
    (result.T.t - truth.t).square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all() and features.grad.abs().max() > 0
    assert damping.grad is not None and damping.grad.isfinite().all() and damping.grad.abs().min() > 0


@pytest.mark.parametrize("change", [{"num_iters": 0}, {"stop_period": -1}, {"min_valid": 0}])
def test_settings_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        SolverSettings(**change)  # type: ignore[arg-type]
