# SPDX-License-Identifier: Apache-2.0
"""Batched poses: composition, inversion, Jacobians, and behaving like the tensor they hold."""

from __future__ import annotations

import subprocess
import sys

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


def test_the_originals_names_work_line_by_line() -> None:
    """The usage that PixLoc's readme shows, with the types that its users have: float32 poses, COLMAP's cameras."""
    from kfloc_ros.geometry import Camera, Pose

    draw = torch.Generator().manual_seed(0)
    T_A_to_B = Pose.from_Rt(np.eye(3, dtype=np.float32), np.array([0.1, 0.0, 2.0], dtype=np.float32))
    T_B_to_C = Pose.from_aa(torch.tensor([0.0, 0.1, 0.0]), torch.zeros(3))
    p3D = torch.rand(20, 3, generator=draw)
    assert T_A_to_B.to("cpu").half().dtype is torch.float16
    assert torch.allclose((T_A_to_B.half() * p3D.half()).float(), T_A_to_B * p3D, atol=5e-3)
    T_A_to_C = T_B_to_C @ T_A_to_B
    assert torch.allclose(T_A_to_C * p3D, T_B_to_C * (T_A_to_B * p3D), atol=1e-6)
    assert (T_A_to_B.double() @ T_B_to_C).dtype is torch.float64
    row = {"model": "OPENCV", "width": 640, "height": 480, "params": np.array([500, 510, 320, 240, -0.1, 0.02, 0, 0])}
    cam1 = Camera.from_colmap(row)
    cam2 = Camera.from_colmap({"model": "PINHOLE", "width": 320, "height": 240, "params": [250, 250, 160, 120]})
    both = torch.stack([cam1, cam2])
    assert isinstance(both, Camera) and both.shape == (2,)
    assert torch.stack([both, both], dim=1).shape == (2, 2)
    assert isinstance(torch.stack([T_A_to_B, T_B_to_C]), Pose)
    assert cam1.c.tolist() == [319.5, 239.5]
    p3D_c = T_A_to_C * p3D
    p2D, mask = cam1.world2image(p3D_c)
    assert p2D.shape == (20, 2) and mask.shape == (20,)
    assert torch.allclose(both.world2image(p3D_c).points[0], p2D)
    assert torch.allclose(cam1.world2image(p3D_c.double().numpy()).points, p2D, atol=1e-3)
    J, mask = cam1.J_world2image(p3D_c)
    assert J.shape == (20, 2, 3) and mask.all()
    step = 1e-3 * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    moved = cam1.world2image(p3D_c.double() + step).points - cam1.world2image(p3D_c.double()).points
    assert torch.allclose((J @ step[:, None])[..., 0], moved, atol=2e-3)
    J, mask = both.J_world2image(p3D_c.expand(2, 20, 3))
    assert J.shape == (2, 20, 2, 3) and mask.shape == (2, 20)


@pytest.mark.thorough
def test_the_names_are_there_without_loading_torch_first() -> None:
    code = "import sys, kfloc_ros.geometry; assert 'torch' not in sys.modules; from kfloc_ros.geometry import Pose"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError, match="Rotation"):
        from kfloc_ros.geometry import Rotation  # type: ignore[attr-defined]  # noqa: F401
