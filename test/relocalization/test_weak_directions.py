# SPDX-License-Identifier: Apache-2.0
"""Matches fix a pose by themselves, and what an alignment leaves open."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.relocalization.evidence import MIN_MATCHES, pose_by_matches, with_matches
from kfloc_ros.types import Alignment

CAMERA = Camera(640, 480, 500.0, 500.0, 319.5, 239.5)
TRUTH = make_pose(so3_exp([0.1, -0.4, 0.2]), [1000.0, -3.0, 7.0])


@pytest.fixture
def matches() -> tuple[np.ndarray, np.ndarray]:
    """Of 400 points three quarters with wrong pixels, the others with noise of two pixels."""
    rng = np.random.default_rng(3)
    pixels = rng.uniform([0, 0], [640, 480], (400, 2))
    depth = rng.uniform(2.0, 5.0, 400)
    rays = np.stack([(pixels[:, 0] - CAMERA.cx) / CAMERA.fx, (pixels[:, 1] - CAMERA.cy) / CAMERA.fy, np.ones(400)], 1)
    points = (rays * depth[:, None]) @ TRUTH[:3, :3].T + TRUTH[:3, 3]
    noisy = pixels + rng.normal(0.0, 2.0, pixels.shape)
    noisy[100:] = rng.uniform([0, 0], [640, 480], (300, 2))
    return noisy, points


def moved(x_m: float, turn_deg: float = 0.0) -> Matrix:
    return TRUTH @ make_pose(so3_exp([0.0, np.radians(turn_deg), 0.0]), [x_m, 0.0, 0.0])


def apart(T: Matrix) -> tuple[float, float]:
    return float(np.linalg.norm(T[:3, 3] - TRUTH[:3, 3])), rotation_angle_deg(T[:3, :3].T @ TRUTH[:3, :3])


def aligned(T: Matrix, sigma: np.ndarray) -> Alignment:
    """With standard deviations of (x, y, z, rotations) along the axes of the camera."""
    A = np.kron(np.eye(2), T[:3, :3])
    return Alignment(True, "", T, A @ np.diag(sigma**2) @ A.T, 0.3, 0.2, 0.9, 8, (0,))


def test_a_pose_near_the_right_one_is_drawn_there_through_wrong_matches(matches: tuple[np.ndarray, np.ndarray]) -> None:
    found = pose_by_matches(*matches, CAMERA, moved(0.05, 0.5))
    assert found is not None
    away_m, away_deg = apart(found)
    assert away_m < 0.02 and away_deg < 0.3


def test_too_few_matches_give_no_pose(matches: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, points = (part[: MIN_MATCHES - 1] for part in matches)
    assert pose_by_matches(pixels, points, CAMERA, TRUTH) is None
    alignment = aligned(TRUTH, np.full(6, 0.1))
    assert with_matches(alignment, pixels, points, CAMERA) is alignment


def test_matches_move_an_alignment_only_where_it_is_open(matches: tuple[np.ndarray, np.ndarray]) -> None:
    off = moved(0.06)
    fixed = with_matches(aligned(off, np.full(6, 1e-3)), *matches, CAMERA)
    assert apart(fixed.T_map_camera)[0] > 0.055
    weak = np.array([0.2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    start = aligned(off, weak)
    drawn = with_matches(start, *matches, CAMERA)
    assert apart(drawn.T_map_camera)[0] < 0.03 and drawn.final_cost == start.final_cost
    across = inverse_pose(off) @ drawn.T_map_camera
    assert np.abs(across[1:3, 3]).max() < 5e-3
    x = TRUTH[:3, 0]
    assert x @ drawn.covariance[:3, :3] @ x < 0.25 * x @ start.covariance[:3, :3] @ x
    assert np.linalg.eigvalsh(drawn.covariance).min() > 0


def test_an_alignment_without_a_covariance_stays(matches: tuple[np.ndarray, np.ndarray]) -> None:
    nothing = Alignment(True, "", TRUTH, None, 0.3, 0.2, 0.9, 8, (0,))
    assert with_matches(nothing, *matches, CAMERA) is nothing
