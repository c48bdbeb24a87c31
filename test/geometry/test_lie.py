# SPDX-License-Identifier: Apache-2.0
"""SO(3) maps: inverse of each other, differentiable, right at the hard angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.geometry.lie import (
    inverse_pose,
    is_farther,
    make_pose,
    matrix_to_quaternion,
    quaternion_to_matrix,
    skew,
    so3_exp,
    so3_log,
)
from kfloc_ros.geometry.tensors import so3_exp_torch


@pytest.mark.parametrize("angle", [0.0, 1e-10, 1e-5, 0.3, 2.0, np.pi - 1e-7])
def test_log_inverts_exp(angle: float) -> None:
    axis = np.array([0.36, -0.48, 0.8])
    assert so3_log(so3_exp(angle * axis)) == pytest.approx(angle * axis, abs=1e-7)


def test_exp_gives_rotations_and_agrees_with_torch() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-9, 1e-3, 1.0, 3.0):
        v = rng.normal(size=3) * scale
        R = so3_exp(v)
        assert pytest.approx(np.eye(3), abs=1e-12) == R @ R.T
        assert np.linalg.det(R) == pytest.approx(1.0)
        assert so3_exp_torch(torch.from_numpy(v)).numpy() == pytest.approx(R, abs=1e-12)


def test_torch_exp_has_a_gradient_at_zero() -> None:
    J = torch.autograd.functional.jacobian(so3_exp_torch, torch.zeros(3, dtype=torch.float64))
    for axis in range(3):
        assert J[..., axis].numpy() == pytest.approx(skew(np.eye(3)[axis]))


def test_quaternions_round_trip_for_every_largest_component() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        q = rng.normal(size=4) * rng.choice([0.01, 1.0], size=4)
        q /= np.linalg.norm(q) * np.sign(q[3])
        assert matrix_to_quaternion(quaternion_to_matrix(q)) == pytest.approx(q, abs=1e-9)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0], [np.nan, 0, 0, 1]])
def test_impossible_quaternions_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and non-zero"):
        quaternion_to_matrix(bad)


def test_inverse_pose() -> None:
    T = make_pose(so3_exp([0.3, -0.2, 1.0]), [1.0, 2.0, 3.0])
    assert inverse_pose(T) @ T == pytest.approx(np.eye(4), abs=1e-12)


@pytest.mark.parametrize(
    ("moved_m", "turned_deg", "farther"), [(0.2, 4.0, False), (0.3, 0.0, True), (0.0, 6.0, True), (0.0, 0.0, False)]
)
def test_poses_are_farther_apart_if_position_or_orientation_is(
    moved_m: float, turned_deg: float, farther: bool
) -> None:
    a = make_pose(so3_exp([0.3, -0.2, 1.0]), [1.0, 2.0, 3.0])
    b = make_pose(a[:3, :3] @ so3_exp([0.0, np.radians(turned_deg), 0.0]), a[:3, 3] + [0.0, moved_m, 0.0])
    assert is_farther(a, b, 0.25, 5.0) is farther
    assert is_farther(b, a, 0.25, 5.0) is farther
