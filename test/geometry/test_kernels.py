# SPDX-License-Identifier: Apache-2.0
"""Compiled step and pose update of least squares."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.kernels import moved, solve
from kfloc_ros.geometry.lie import make_pose, so3_exp


@pytest.mark.parametrize("size", [6, 9])
def test_step_solves_the_normal_equations(size: int) -> None:
    rng = np.random.default_rng(size)
    J = rng.normal(size=(20, size))
    H, g, step = J.T @ J, rng.normal(size=size), np.empty(size)
    assert solve(H.copy(), g, step)
    assert np.allclose(H @ step, -g)


def test_no_step_without_a_positive_definite_matrix() -> None:
    step = np.zeros(6)
    for bad in (np.zeros((6, 6)), np.diag([1.0, 1.0, 1.0, -1.0, 1.0, 1.0]), np.full((6, 6), np.nan)):
        assert not solve(bad, np.ones(6), step)


@pytest.mark.parametrize("turn", [[0.3, -0.2, 0.5], [1e-10, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.1, 0.0]])
def test_moved_pose_is_perturbed_from_the_left(turn: list[float]) -> None:
    T, shift = make_pose(so3_exp([0.1, 0.4, -0.7]), [1.0, -2.0, 3.0]), np.array([0.2, 0.1, -0.3])
    after = moved(T, np.concatenate([shift, turn]))
    assert np.allclose(after, make_pose(so3_exp(turn) @ T[:3, :3], so3_exp(turn) @ T[:3, 3] + shift))
