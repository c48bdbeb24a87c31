# SPDX-License-Identifier: Apache-2.0
"""The forecast of where a map will localize: near its views, in their directions, worse farther off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.picture import expected_error_m, floor_axes, floor_coverage, level_pose, up_axis
from kfloc_ros.maps.scene_map import SceneMap


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


def test_the_error_grows_with_the_distance_to_the_views_until_none_is_near(scene_map) -> None:
    T = scene_map.references.T_map_camera[0]
    errors = [expected_error_m(scene_map, T @ make_pose(np.eye(3), [0.0, y, 0.0])) for y in (0.0, -0.15, -0.4)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5
    assert np.isnan(expected_error_m(scene_map, T @ make_pose(np.eye(3), [0.0, -2.0, 0.0])))
    assert np.isnan(expected_error_m(scene_map, T @ make_pose(so3_exp([0.0, np.pi, 0.0]), np.zeros(3))))


def test_a_map_whose_poses_err_more_expects_more(scene_map) -> None:
    T = scene_map.references.T_map_camera[3]
    scale = scene_map.calibration.refined_covariance_scale
    doubtful = replace(scene_map, calibration=replace(scene_map.calibration, refined_covariance_scale=4 * scale))
    assert expected_error_m(doubtful, T) == pytest.approx(2 * expected_error_m(scene_map, T))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_level_camera_is_upright_and_looks_along_the_floor(axis: int, sign: float) -> None:
    T = level_pose(np.array([1.0, 2.0, 3.0]), 0.7, axis, sign)
    R = T[:3, :3]
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(R) == pytest.approx(1.0)
    assert R[axis, 1] == -sign and abs(R[axis, 2]) < 1e-12
    right, ahead = floor_axes(axis, sign)
    assert np.cross(np.eye(3)[right], np.eye(3)[ahead])[axis] == sign  # seen from above, and no mirror image


def test_the_floor_is_covered_where_the_camera_was(scene_map) -> None:
    coverage = floor_coverage(scene_map, *up_axis(scene_map))
    centre = scene_map.references.T_map_camera[:, :3, 3].mean(axis=0)
    nearest = np.linalg.norm(coverage.places_m - centre, axis=1).argmin()
    assert 0 < coverage.share[nearest] < 0.5  # the room's camera looks in one direction
    assert coverage.error_m[nearest] < 0.05
    assert np.isnan(coverage.error_m[coverage.share == 0]).all()


def test_the_picture_is_drawn_from_the_command_line(room_map: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "coverage.png"
    assert main(["map", "view", str(room_map), "--accuracy", "--out", str(out)]) == 0
    assert "are covered" in capsys.readouterr().out
    image = cv2.imread(str(out))
    assert min(image.shape[:2]) > 300 and image.std() > 10
