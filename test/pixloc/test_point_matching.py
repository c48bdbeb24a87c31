# SPDX-License-Identifier: Apache-2.0
"""Tests of matches of reference points near a pose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import has_numba, torch_only
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.pixloc.camera_fit import PRIOR_SIGMA
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.optimizer import fitted, fitted_step_by_step, match_equations
from kfloc_ros.pixloc.point_matching import (
    PointMatches,
    best_cells,
    fit_pose,
    fit_pose_and_camera,
    fitted_with_camera_step_by_step,
    search_points,
)

CAMERA = Camera(320, 256, 260.0, 260.0, 159.5, 127.5)
rng = np.random.default_rng(3)


def level(channels: int, stride: int, seed: int) -> FeatureImage:
    """Smooth random unit features, so that neighbours look alike and places between cells mean something."""
    generator = torch.Generator().manual_seed(seed)
    height, width = CAMERA.height // stride, CAMERA.width // stride
    rough = torch.randn(1, channels, height // 2, width // 2, generator=generator)
    smooth = F.interpolate(rough, (height, width), mode="bicubic", align_corners=True)[0]
    return FeatureImage.from_maps(F.normalize(smooth, dim=0), torch.ones(height, width), stride)


def scene(count: int = 300) -> tuple[torch.Tensor, np.ndarray]:
    """Points in front of a camera, and its pose."""
    T_camera_map = make_pose(so3_exp(np.array([0.02, -0.03, 0.01])), np.array([0.05, 0.02, -0.03]))
    at = rng.uniform([20, 20], [300, 236], (count, 2))
    depth = rng.uniform(1.0, 4.0, count)
    camera_points = np.column_stack(
        [(at[:, 0] - CAMERA.cx) / CAMERA.fx * depth, (at[:, 1] - CAMERA.cy) / CAMERA.fy * depth, depth]
    )
    T = inverse_pose(T_camera_map)
    return torch.from_numpy(camera_points @ T[:3, :3].T + T[:3, 3]).float(), T_camera_map


def features_at(image: FeatureImage, points: torch.Tensor, T_camera_map: np.ndarray) -> torch.Tensor:
    uv, _, _ = project(points, torch.from_numpy(T_camera_map).float(), CAMERA, image.stride)
    rows, _ = image.sample(uv)
    return F.normalize(rows[:, : image.channels], dim=1)


def off_by(T: np.ndarray, metres: float, degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees) * np.array([0.6, 0.0, 0.8])
    return make_pose(so3_exp(turn), np.array([metres, 0.0, 0.0])) @ T


def error(T: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    between = inverse_pose(truth) @ T
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


@pytest.mark.parametrize("changed_share", [0.0, 0.5])
def test_points_find_themselves_though_half_of_the_content_has_changed(changed_share: float) -> None:
    images = (level(64, 8, 1), level(24, 4, 2))
    points, truth = scene()
    changed = torch.from_numpy(rng.random(len(points)) < changed_share)
    other = (level(64, 8, 3), level(24, 4, 4))
    features = [
        torch.where(changed[:, None], features_at(o, points, truth), features_at(image, points, truth))
        for image, o in zip(images, other, strict=True)
    ]
    start = off_by(truth, 0.05, 1.5)
    matches = search_points(images, points, features, torch.ones(len(points)), start, CAMERA)
    fitted = fit_pose(matches, points, start, CAMERA)
    assert fitted is not None
    metres, degrees = error(fitted.T_camera_local, truth)
    assert metres < 0.01
    assert degrees < 0.3
    assert fitted.support > 3.0
    assert float(fitted.agreement[~changed].median()) > 0.8


def test_an_unrelated_image_gives_no_support() -> None:
    points, truth = scene()
    features = [features_at(image, points, truth) for image in (level(64, 8, 1), level(24, 4, 2))]
    matches = search_points(
        (level(64, 8, 5), level(24, 4, 6)), points, features, torch.ones(len(points)), truth, CAMERA
    )
    fitted = fit_pose(matches, points, truth, CAMERA)
    assert fitted is None or fitted.support < 3.0


def test_too_few_matches_give_no_pose() -> None:
    points, truth = scene(20)
    matches = PointMatches(torch.zeros(20, 2), torch.ones(20))
    assert fit_pose(matches, points, truth, CAMERA) is None


@pytest.mark.skipif(not has_numba(), reason="Numba is not installed; there is nothing to compare")
def test_compiled_loops_equal_torch() -> None:
    image, points = level(64, 8, 7), scene(100)
    wanted = features_at(image, *points)
    at = torch.from_numpy(rng.uniform(-3, 45, (100, 2))).float()
    fast = best_cells(image, wanted, at, 3)
    with torch_only():
        slow = best_cells(image, wanted, at, 3)
    for a, b in zip(fast, slow, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)
    images, T = (image, level(64, 4, 8)), off_by(points[1], 0.05, 1.0)
    given = images, points[0].float(), (wanted, features_at(images[1], *points)), torch.rand(100), T, CAMERA
    compiled = search_points(*given)
    with torch_only():
        expected = search_points(*given)
    found = expected.weights > 0
    assert torch.equal(compiled.weights > 0, found) and 10 < int(found.sum()) <= 100
    assert torch.allclose(compiled.weights, expected.weights, atol=1e-4)
    assert torch.allclose(compiled.pixels[found], expected.pixels[found], atol=1e-2)


@pytest.mark.skipif(not has_numba(), reason="Numba is not installed; there is nothing to compare")
def test_compiled_fits_equal_those_step_by_step() -> None:
    points, truth = scene()
    pixels, _, _ = project(points, torch.from_numpy(truth).float(), CAMERA, 1.0)
    X, start = points.double().numpy(), off_by(truth, 0.05, 2.0)
    seen, weights = pixels.double().numpy() + rng.normal(0.0, 2.0, (len(X), 2)), rng.uniform(0.5, 1.0, len(X))
    squared, expected_squared = np.zeros(len(X)), np.zeros(len(X))
    T = fitted(seen, X, weights, start, CAMERA, squared)
    expected = fitted_step_by_step(seen, X, weights, start, CAMERA, expected_squared)
    assert np.allclose(T, expected, atol=1e-9) and np.allclose(squared, expected_squared, atol=1e-6)
    matches = PointMatches(torch.from_numpy(seen), torch.from_numpy(weights))
    fast = fit_pose_and_camera(matches, points, start, CAMERA, PRIOR_SIGMA)
    few = fitted_with_camera_step_by_step(seen, X, weights, start, CAMERA, PRIOR_SIGMA)
    assert fast is not None and few is not None and len(X) <= 300
    assert np.allclose(fast[0], few[0], atol=1e-9) and np.allclose(fast[1], few[1], atol=1e-8)


def test_points_that_do_not_fix_a_pose_give_none() -> None:
    X = np.repeat([[0.0, 0.0, -1.0]], 40, axis=0)  # all behind the camera
    pixels, weights = np.full((40, 2), np.nan), np.ones(40)
    assert fitted(pixels, X * [1.0, 1.0, -1.0], weights, np.eye(4), CAMERA, np.zeros(40)) is None
    T = fitted(np.zeros((40, 2)), X, weights, np.eye(4), CAMERA, np.zeros(40))
    assert T is None or np.allclose(T, np.eye(4))


def test_equations_are_the_gradient_of_the_robust_cost() -> None:
    points, T = scene(50)
    X, weights = points.double().numpy(), rng.uniform(0.5, 1.0, 50)
    pixels = rng.uniform(0, 250, (50, 2))
    squared = np.zeros(50)

    def cost(delta: np.ndarray) -> float:
        match_equations(pixels, X, weights, make_pose(so3_exp(delta[3:]), delta[:3]) @ T, CAMERA, 40.0, squared)
        return float((weights * squared / (1 + squared / 40.0**2)).sum()) / 2

    _, g = match_equations(pixels, X, weights, T, CAMERA, 40.0, squared)
    numeric = np.array([(cost(1e-5 * e) - cost(-1e-5 * e)) / 2e-5 for e in np.eye(6)])
    assert np.allclose(g, numeric, rtol=1e-3, atol=1e-2 * np.abs(numeric).max())


def test_a_camera_that_displaces_points_by_tens_of_pixels_is_found_with_the_pose() -> None:
    points, truth = scene()
    zoomed = replace(CAMERA, fx=1.15 * CAMERA.fx, fy=1.15 * CAMERA.fy, cx=CAMERA.cx + 6.0)
    pixels, _, _ = project(points, torch.from_numpy(truth).float(), zoomed, 1.0)
    pixels += torch.from_numpy(rng.normal(0.0, 1.0, pixels.shape)).float()
    pixels[::5] += 40.0  # a fifth is wrong
    matches = PointMatches(pixels, torch.ones(len(points)))
    start = off_by(truth, 0.1, 1.0)
    found = fit_pose_and_camera(matches, points, start, CAMERA, PRIOR_SIGMA)
    assert found is not None
    T, offsets = found
    assert offsets[0] == pytest.approx(np.log(1.15), abs=0.02) and offsets[2] == pytest.approx(6.0, abs=4.0)
    assert error(T, truth)[0] < 0.5 * error(start, truth)[0]
    few = PointMatches(pixels[:40], torch.ones(40))
    assert fit_pose_and_camera(few, points[:40], start, CAMERA, PRIOR_SIGMA) is None
