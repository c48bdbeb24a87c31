# SPDX-License-Identifier: Apache-2.0
"""Poses on the ground plane, their covariance, and poses that contradict the plane."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.covariance import planar_map_to_odom, planar_pose, yaw
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.types import Matrix

SIGMAS = np.array([0.01, 0.02, 0.03, 0.01, 0.02, 0.005])


def upright(x: float, y: float, z: float, turn_deg: float) -> Matrix:
    return make_pose(so3_exp([0.0, 0.0, np.radians(turn_deg)]), [x, y, z])


def covariance(seed: int = 0) -> Matrix:
    """A covariance with the standard deviations ``SIGMAS`` and cross terms."""
    mixed = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    correlation = mixed @ np.diag([0.5, 0.7, 0.9, 1.1, 1.3, 1.5]) @ mixed.T
    scale = SIGMAS / np.sqrt(np.diagonal(correlation))
    return np.asarray(scale[:, None] * correlation * scale)


@pytest.mark.parametrize("turn_deg", [0.0, 30.0, 179.0, -120.0])
def test_an_upright_pose_stays_and_its_covariance_is_marginal(turn_deg: float) -> None:
    T = upright(1.0, -2.0, 0.3, turn_deg)
    planar = planar_pose(T, covariance(), 0.3)
    assert np.allclose(planar.T_map_base, T) and planar.fault == ""
    kept = [0, 1, 5]
    assert np.allclose(planar.covariance[np.ix_(kept, kept)], covariance()[np.ix_(kept, kept)])
    assert (np.linalg.eigvalsh(planar.covariance) > 0).all()
    assert not planar.covariance[np.ix_(kept, [2, 3, 4])].any()


def test_tilt_and_height_go_and_yaw_stays() -> None:
    turn = so3_exp([0.0, 0.0, 0.7])
    T = make_pose(so3_exp([0.02, -0.03, 0.0]) @ turn, [1.0, 2.0, 0.04])
    planar = planar_pose(T, covariance())
    assert planar.fault == ""
    assert planar.T_map_base[2, 3] == 0.0 and np.allclose(planar.T_map_base[:3, 2], [0, 0, 1])
    assert yaw(planar.T_map_base) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    ("T", "said"),
    [
        (upright(0, 0, 0.5, 20.0), "0.50 m above the ground plane"),
        (upright(0, 0, -0.5, 20.0), "0.50 m below"),
        (make_pose(so3_exp([0.3, 0.0, 0.0]), [0, 0, 0]), "tilted by 17.2 deg"),
        (make_pose(so3_exp([np.pi, 0.0, 0.0]), [0, 0, 0]), "tilted by 180.0 deg"),
    ],
)
def test_a_pose_off_the_plane_is_told_and_is_less_certain(T: Matrix, said: str) -> None:
    planar = planar_pose(T, covariance())
    assert said in planar.fault and "ground_height" in planar.fault
    assert planar.covariance[0, 0] > 5 * covariance()[0, 0]
    assert np.isfinite(planar.T_map_base).all() and np.isfinite(planar.covariance).all()


def test_a_large_covariance_explains_a_pose_off_the_plane() -> None:
    T = upright(0, 0, 0.5, 20.0)
    assert planar_pose(T, 100.0 * covariance()).fault == ""


def test_noise_of_the_covariance_is_off_the_plane_once_in_a_thousand() -> None:
    rng = np.random.default_rng(3)
    count = 0
    for error in rng.multivariate_normal(np.zeros(6), covariance(), 3000):
        T = make_pose(so3_exp(error[3:]) @ so3_exp([0, 0, 1.0]), error[:3])
        count += planar_pose(T, covariance()).fault != ""
    assert count <= 6


@pytest.mark.parametrize("tilt_rad", [0.0, 0.05])
def test_map_to_odom_is_flat_and_leads_to_the_pose(tilt_rad: float) -> None:
    T_odom_base = make_pose(so3_exp([tilt_rad, 0, 0]) @ so3_exp([0, 0, 2.0]), [20.0, -5.0, 0.1])
    T_map_base = upright(3.0, 4.0, 0.2, 80.0)
    T_map_odom = planar_map_to_odom(T_map_base, T_odom_base)
    assert np.allclose(T_map_odom[:3, 2], [0, 0, 1])
    found = T_map_odom @ T_odom_base
    assert np.allclose(found[:3, 3], T_map_base[:3, 3])
    assert yaw(found) == pytest.approx(yaw(T_map_base))
    if tilt_rad == 0.0:
        assert np.allclose(T_map_odom, T_map_base @ inverse_pose(T_odom_base))
