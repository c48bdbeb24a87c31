# SPDX-License-Identifier: Apache-2.0
"""Batched poses: composition, inversion, Jacobians, and behaving like the tensor they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, rotation_angle_deg, so3_exp
from kfloc_ros.geometry.tensors import Pose


def poses(*batch: int, dtype: torch.dtype = torch.float64) -> Pose:
    generator = torch.Generator().manual_seed(sum(batch))
    draw = torch.randn(*batch, 6, generator=generator, dtype=torch.float64)
    return Pose.from_aa(draw[..., :3], draw[..., 3:]).to(dtype)


def test_agrees_with_matrices() -> None:
    a, b, points = poses(4), poses(4).inv(), torch.randn(4, 7, 3, dtype=torch.float64)
    assert torch.allclose((a @ b).matrix(), a.matrix() @ b.matrix())
    assert torch.allclose(a.inv().matrix(), torch.linalg.inv(a.matrix()))
    moved = torch.cat([points, torch.ones(4, 7, 1, dtype=torch.float64)], -1) @ a.matrix().mT
    assert torch.allclose(a * points, moved[..., :3])
    assert torch.allclose(a.inv() * (a * points), points)
    assert np.allclose(Pose.from_4x4mat(a.matrix_numpy()).numpy(), a.numpy())


def test_leading_dimensions_broadcast() -> None:
    assert (poses(3, 1) @ poses(1, 5)).shape == (3, 5)
    assert (poses(3, 1) * torch.zeros(5, 2, 3, dtype=torch.float64)).shape == (3, 5, 2, 3)
    assert (poses() * np.zeros((4, 3))).shape == (4, 3)
    assert Pose.from_Rt(torch.eye(3), torch.zeros(6, 3)).shape == (6,)


def test_indexing_stacking_and_moving() -> None:
    batch = poses(2, 3)
    assert batch[1].shape == (3,)
    assert batch[..., 0].shape == (2,)
    assert batch[:, None].shape == (2, 1, 3)
    assert batch[torch.tensor([True, False])].shape == (1, 3)
    assert torch.equal(Pose.stack([batch[0], batch[1]]).data, batch.data)
    assert Pose.stack([batch[0], batch[1]], dim=-1).shape == (3, 2)
    assert (batch.half().dtype, batch.float().dtype, batch.double().dtype) == (
        torch.float16,
        torch.float32,
        torch.float64,
    )
    assert batch.to("cpu", torch.float32).device.type == "cpu"
    assert len(batch) == 2
    assert repr(batch) == "Pose([2, 3], torch.float64, cpu)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu() -> None:
    batch = poses(3).cuda()
    assert (batch @ batch.inv()).magnitude().angle_deg.max() < 1e-6
    assert batch.cpu().device.type == "cpu"


def test_jacobian_and_retraction_agree_with_autograd() -> None:
    pose, points = poses(), torch.randn(6, 3, dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda d: pose.retract(d) * points, zero)
    assert torch.allclose(pose.J_transform(pose * points), expected)


def test_gradients_reach_a_pose() -> None:
    pose = poses(2).detach().requires_grad_()
    (pose.inv() * torch.randn(2, 4, 3, dtype=torch.float64)).square().sum().backward()
    assert pose.data.grad is not None and pose.data.grad.abs().min() > 0


@pytest.mark.parametrize("angle_deg", [0.0, 1e-3, 0.5, 90.0, 179.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitude(angle_deg: float, dtype: torch.dtype) -> None:
    axis = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64) / 3
    pose = Pose.from_aa(axis * np.radians(angle_deg), torch.tensor([3.0, 0.0, 4.0])).to(dtype)
    angle, distance = pose.magnitude()
    assert angle.item() == pytest.approx(angle_deg, rel=1e-4, abs=1e-7)
    assert distance.item() == pytest.approx(5.0)


def test_colmap_quaternions() -> None:
    T = make_pose(so3_exp([0.3, -1.2, 0.4]), [1.0, 2.0, 3.0])
    x, y, z, w = matrix_to_quaternion(T[:3, :3])
    found = Pose.from_colmap([w, x, y, z], [1, 2, 3])
    assert np.allclose(found.matrix_numpy(), T)
    assert found.magnitude().angle_deg.item() == pytest.approx(rotation_angle_deg(T[:3, :3]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="12 numbers"):
        Pose(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="takes R"):
        Pose.from_Rt(torch.eye(4), torch.zeros(3))
