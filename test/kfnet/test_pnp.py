# SPDX-License-Identifier: Apache-2.0
"""PnP on scene-coordinate maps: right on noisy ones, honest about hopeless ones, covariance against Monte Carlo."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance, move_covariance, pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.kfnet import kernels, pnp
from kfloc_ros.kfnet.pnp import PnpSettings, _ray_equations, _ray_tangents, agreeing_share, solve_pnp
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.types import SceneCoordinates

CAMERA = Camera(640, 480, 525.0, 525.0, 320.0, 240.0)
TRUTH = make_pose(so3_exp([0.4, -0.3, 0.2]), [1.0, -2.0, 0.5])


def room(sigma_m: float, seed: int, outliers: float = 0.0) -> SceneCoordinates:
    """A curved wall, 2 to 4 m away, as seen from TRUTH, with noise and gross outliers."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:60, 0:80]
    z = 3.0 + np.sin(cols / 9.0) * 0.7 + np.cos(rows / 7.0) * 0.3
    u, v = cols * 8 + 3.5, rows * 8 + 3.5
    P = np.stack([(u - CAMERA.cx) / CAMERA.fx * z, (v - CAMERA.cy) / CAMERA.fy * z, z], axis=-1).reshape(-1, 3)
    X = P @ TRUTH[:3, :3].T + TRUTH[:3, 3] + rng.normal(size=P.shape) * sigma_m
    bad = rng.random(len(X)) < outliers
    X[bad] += rng.normal(size=(int(bad.sum()), 3)) * 2.0
    mean = torch.from_numpy(X.T.reshape(3, 60, 80).astype(np.float32))
    variance = torch.full((60, 80), max(sigma_m, 1e-3) ** 2)
    return SceneCoordinates(mean, variance, torch.ones(60, 80, dtype=torch.bool), 8)


@pytest.fixture(params=["PoseLib", "OpenCV"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that RANSAC is of: OpenCV where PoseLib has no wheel."""
    if request.param == "OpenCV":
        monkeypatch.setattr(pnp, "poselib", None)
    elif pnp.poselib is None:
        pytest.skip("PoseLib has no wheel for this machine")
    return str(request.param)


def test_noisy_map_with_outliers(solver: str) -> None:
    result = solve_pnp(room(0.03, 0, outliers=0.4), CAMERA, PnpSettings())
    assert result.success
    error = pose_tangent_error(result.T_map_camera, TRUTH)
    assert np.linalg.norm(error[:3]) < 0.01
    assert np.degrees(np.linalg.norm(error[3:])) < 0.2
    assert 0.4 < result.inlier_ratio < 0.8


def test_points_without_a_pose_give_no_inliers_and_no_error(solver: str) -> None:
    pixels = np.random.default_rng(0).uniform(0, 480, (12, 2))
    for points in (np.zeros((12, 3)), np.outer(np.arange(12.0), [0.0, 0.1, 0.2]), np.ones((3, 3))):
        _, inliers = pnp.absolute_pose(pixels[: len(points)], points, CAMERA, 2.0, max_iterations=100)
        assert inliers.shape == (len(points),) and inliers.sum() < 6


def test_hopeless_maps_are_refused_with_a_reason(solver: str) -> None:
    noise = solve_pnp(room(1.5, 0), CAMERA, PnpSettings(max_sigma_m=10.0))
    assert not noise.success
    assert "inliers" in noise.reason
    assert noise.T_map_camera is None
    unsure = solve_pnp(room(1.0, 0), CAMERA, PnpSettings(max_sigma_m=0.5))
    assert not unsure.success
    assert "certain" in unsure.reason


def test_sure_cells_outweigh_unsure_ones() -> None:
    """A third of the cells is biased by 3 cm, no outliers, and says so: weighting keeps the bias out of the pose."""
    cells = room(0.003, 0)
    cells.mean[:, 40:] += 0.03
    honest = cells.variance.clone()
    honest[40:] = 0.03**2
    weighted = solve_pnp(SceneCoordinates(cells.mean, honest, cells.valid, 8), CAMERA, PnpSettings(max_cells=4800))
    naive = solve_pnp(cells, CAMERA, PnpSettings(max_cells=4800))
    error = [np.linalg.norm(pose_tangent_error(r.T_map_camera, TRUTH)[:3]) for r in (weighted, naive)]
    assert error[0] < 0.7 * error[1]


@pytest.mark.thorough
def test_covariance_agrees_with_monte_carlo() -> None:
    settings = PnpSettings(pixel_sigma_px=0.1, max_cells=4800, max_error_px=40.0)  # far above the noise of 9 px
    errors, covariances = [], []
    for seed in range(60):
        result = solve_pnp(room(0.05, seed), CAMERA, settings)
        errors.append(pose_tangent_error(result.T_map_camera, TRUTH))
        covariances.append(result.covariance)
    nees = [e @ np.linalg.solve(C, e) for e, C in zip(errors, covariances, strict=True)]
    assert np.mean(nees) == pytest.approx(6.0, rel=0.6)  # the Cauchy weights make it somewhat cautious
    spread = np.std(np.stack(errors), axis=0)
    claimed = np.sqrt(np.mean([np.diag(C) for C in covariances], axis=0))
    assert claimed == pytest.approx(spread, rel=0.6)


def test_map_frame_covariance_agrees_with_sampling() -> None:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(6, 6))
    camera = (A @ A.T + np.eye(6)) * 1e-6
    T_camera_map = inverse_pose(TRUTH)
    covariance = map_frame_covariance(np.linalg.inv(camera), T_camera_map)
    assert covariance is not None
    samples = []
    for delta in rng.multivariate_normal(np.zeros(6), camera, size=4000):
        moved = make_pose(so3_exp(delta[3:]), delta[:3]) @ T_camera_map
        samples.append(pose_tangent_error(TRUTH, inverse_pose(moved)))
    assert np.cov(np.array(samples).T) == pytest.approx(covariance, abs=0.1 * np.abs(covariance).max())


def test_a_lever_arm_turns_rotation_into_translation() -> None:
    covariance = np.diag([0, 0, 0, 0.01**2, 0.01**2, 0.01**2]).astype(float)
    T_camera_body = make_pose(np.eye(3), [0, 0, -2.0])
    moved = move_covariance(covariance, np.eye(4), T_camera_body)
    assert np.sqrt(np.diag(moved)) == pytest.approx([0.02, 0.02, 0, 0.01, 0.01, 0.01])


def test_singular_information_gives_no_covariance() -> None:
    assert map_frame_covariance(np.diag([1.0, 1, 1, 1, 1, 0]), np.eye(4)) is None
    assert map_frame_covariance(np.full((6, 6), np.nan), np.eye(4)) is None


def test_most_cells_near_an_expected_pose_give_the_pose_of_ransac() -> None:
    cells = room(0.03, 0, outliers=0.2)
    near = left_update(TRUTH, np.array([0.05, -0.03, 0.04, 0.03, -0.02, 0.04]))
    searched, followed = (solve_pnp(cells, CAMERA, PnpSettings(), expected=T) for T in (None, near))
    assert followed.success and abs(followed.inlier_ratio - searched.inlier_ratio) < 0.02
    apart = pose_tangent_error(followed.T_map_camera, searched.T_map_camera)
    assert np.linalg.norm(apart[:3]) < 1e-3 and np.degrees(np.linalg.norm(apart[3:])) < 0.02


def test_moved_content_does_not_keep_the_other_cells_from_their_pose() -> None:
    cells, settings = room(0.03, 0, outliers=0.0), PnpSettings()
    cells.mean[0, :, :16] += 0.25  # a fifth of the image has moved, and pulls the first fit away
    near = inverse_pose(left_update(TRUTH, np.array([0.05, -0.03, 0.04, 0.03, -0.02, 0.04])))
    chosen = pnp.choose_cells(cells, settings)
    first, _ = pnp._refine(near, chosen, CAMERA, replace(settings, pixel_sigma_px=settings.max_error_px))
    assert pnp._agreeing(chosen, CAMERA, first, settings).mean() < pnp.MAJORITY
    found, searched = pnp._majority(chosen, CAMERA, settings, near), solve_pnp(cells, CAMERA, settings)
    assert found is not None and abs(float(found[1].mean()) - searched.inlier_ratio) < 0.02
    assert np.abs(pose_tangent_error(inverse_pose(found[0]), searched.T_map_camera)[:3]).max() < 0.01


def test_a_part_of_the_cells_gives_the_pose_of_all(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = room(0.03, 0, outliers=0.7)
    by_part = solve_pnp(cells, CAMERA, PnpSettings())
    monkeypatch.setattr(pnp, "RANSAC_CELLS", PnpSettings().max_cells)
    by_all = solve_pnp(cells, CAMERA, PnpSettings())
    assert abs(by_part.inlier_ratio - by_all.inlier_ratio) < 0.02
    apart = pose_tangent_error(by_part.T_map_camera, by_all.T_map_camera)
    error = apart @ np.linalg.solve(by_all.covariance, apart)  # a few cells at the threshold differ
    assert error < 9.0


@pytest.mark.parametrize("outliers", [0.2, 0.6])
def test_a_wrong_expected_pose_or_a_minority_is_left_to_ransac(outliers: float) -> None:
    cells = room(0.03, 0, outliers=outliers)
    elsewhere = make_pose(so3_exp([0.0, 2.5, 0.0]), [4.0, 1.0, 0.0]) @ TRUTH
    searched, misled = (solve_pnp(cells, CAMERA, PnpSettings(), expected=T) for T in (None, elsewhere))
    assert misled.T_map_camera == pytest.approx(searched.T_map_camera, abs=1e-9)
    assert misled.inlier_count == searched.inlier_count


def test_a_camera_that_is_followed_needs_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = [], pnp.absolute_pose

    def noted(*args, max_iterations: int, **options):
        given.append(max_iterations)
        return real(*args, max_iterations=max_iterations, **options)

    monkeypatch.setattr(pnp, "absolute_pose", noted)
    cells = room(0.03, 0, outliers=0.65)
    elsewhere = make_pose(so3_exp([0.0, 2.5, 0.0]), [4.0, 1.0, 0.0]) @ TRUTH
    searched, followed = (solve_pnp(cells, CAMERA, PnpSettings(), expected=T) for T in (None, elsewhere))
    assert given == [pnp.ITERATIONS, pnp.FEWER_ITERATIONS] and given[1] < given[0]
    assert followed.success and abs(followed.inlier_ratio - searched.inlier_ratio) < 0.02


def test_a_chessboard_of_cells_is_chosen_from_as_strictly_as_all() -> None:
    cells = room(0.03, 0, outliers=0.4)
    cells.variance[:, 40:] *= 100.0  # half of the cells are certain, and all of those are taken, or half of them
    board = (torch.arange(60)[:, None] + torch.arange(80)) % 2 == 0
    settings = PnpSettings(max_cells=2400)
    share = agreeing_share(cells, CAMERA, TRUTH, settings)
    half = agreeing_share(replace(cells, valid=board), CAMERA, TRUTH, settings)
    assert half == pytest.approx(share, abs=0.03) and 0.5 < share < 0.7


def test_compiled_normal_equations_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    points, sigma = rng.normal([0.0, 0.0, 1.0], 1.0, (80, 3)), 0.01 + 0.1 * rng.random(80)  # some behind the camera
    tangents = _ray_tangents(rng.random((80, 2)) * [640, 480], CAMERA)
    given = points, tangents, sigma, make_pose(so3_exp([0.1, 0.2, 0.0]), [0.1, 0.0, 0.2]), 0.004
    for compiled, expected in zip(kernels.ray_equations(*given), _ray_equations(*given), strict=True):
        assert np.allclose(compiled, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.skipif(not pnp.has_numba(), reason="Numba is not installed; there is nothing to compare")
def test_the_compiled_refinement_agrees_with_numpy() -> None:
    cells = pnp.choose_cells(room(0.03, 0, outliers=0.1), PnpSettings())
    start = make_pose(so3_exp([0.0, 0.02, 0.01]), [0.02, 0.0, -0.03]) @ inverse_pose(TRUTH)
    T, H = pnp._refine(start, cells, CAMERA, PnpSettings())
    expected_T, expected_H = pnp._refined_step_by_step(start, cells, CAMERA, PnpSettings())
    assert np.allclose(T, expected_T, atol=1e-9)
    assert np.allclose(H, expected_H, rtol=1e-6, atol=1e-6 * np.abs(expected_H).max())
