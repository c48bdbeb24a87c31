# SPDX-License-Identifier: Apache-2.0
"""The forecast of where a map will localize: near its views, in their directions, worse farther off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.build import _check_sane, weaknesses
from kfloc_ros.mapping.calibration import neighbours
from kfloc_ros.mapping.picture import (
    expected_error_m,
    floor_axes,
    floor_coverage,
    heading_rad,
    path_errors_m,
    turned_about_vertical,
    up_axis,
)
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap, in_frame
from kfloc_ros.pixloc.references import ReferenceViews


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


def test_the_floor_is_covered_where_the_camera_was(scene_map) -> None:
    coverage = floor_coverage(scene_map, *up_axis(scene_map))
    centre = scene_map.references.T_map_camera[:, :3, 3].mean(axis=0)
    nearest = np.linalg.norm(coverage.places_m - centre, axis=1).argmin()
    assert 0 < coverage.share[nearest] < 0.5  # the room's camera looks in one direction
    assert coverage.error_m[nearest] < 0.05
    assert np.isnan(coverage.error_m[coverage.share == 0]).all()


def test_a_recording_that_looks_down_is_covered_as_well(scene_map) -> None:
    """The same map in a frame in which the floor is tilted, so that all its cameras look down by 35 degrees."""
    axis, sign = up_axis(scene_map)
    level = floor_coverage(scene_map, axis, sign)
    T = scene_map.references.T_map_camera
    tilt = make_pose(so3_exp(-np.radians(35) * T[:, :3, 0].mean(axis=0)), np.zeros(3))
    down = in_frame(scene_map, tilt, "map")
    assert np.degrees(np.arcsin((down.references.T_map_camera[:, :3, 2] * sign)[:, axis])).mean() < -25
    assert up_axis(down) == (axis, sign)
    tilted = floor_coverage(down, axis, sign)
    covered = [(c.share > 0).sum() * c.step_m**2 for c in (level, tilted)]
    assert covered[1] > 0.6 * covered[0]
    assert np.nanmedian(tilted.error_m) == pytest.approx(np.nanmedian(level.error_m), rel=0.5)


def test_on_the_recorded_path_the_forecast_is_that_of_the_other_views(scene_map) -> None:
    errors = path_errors_m(scene_map)
    T = scene_map.references.T_map_camera
    assert len(errors) == len(T) and np.isfinite(errors).mean() > 0.9
    assert np.nanmedian(errors) > np.nanmedian([expected_error_m(scene_map, pose) for pose in T])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_picture_from_above_is_not_mirrored(axis: int, sign: float) -> None:
    right, ahead = floor_axes(axis, sign)
    assert np.cross(np.eye(3)[right], np.eye(3)[ahead])[axis] == sign


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_turn_about_the_vertical_adds_to_the_heading_and_keeps_the_tilt(axis: int) -> None:
    T = make_pose(so3_exp([-0.5, 0.4, 0.1]), np.zeros(3))
    turned = turned_about_vertical(T, 0.9, axis, -1.0)
    change = heading_rad(turned, axis, -1.0) - heading_rad(T, axis, -1.0)
    assert (change - 0.9 + np.pi) % (2 * np.pi) - np.pi == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(turned[axis, :3], T[axis, :3], atol=1e-12)


def test_maps_of_few_or_alike_views_are_said_to_be_weak(scene_map) -> None:
    references = scene_map.references
    assert weaknesses(scene_map) == []
    drifting = replace(scene_map, calibration=replace(scene_map.calibration, own_error_rad=0.015))
    assert "disagree: " in weaknesses(drifting)[0] and "0.9 deg" in weaknesses(drifting)[0]

    def part(count: int, poses: np.ndarray) -> SceneMap:
        return replace(scene_map, references=ReferenceViews(references.ids[:count], poses, references.views[:count]))

    assert "only 1 reference view:" in weaknesses(part(1, references.T_map_camera[:1]))[0]
    alike = np.tile(references.T_map_camera[0], (12, 1, 1))
    alike[:, 0, 3] += np.linspace(0, 0.1, 12)
    assert "All 12 reference views are alike: within 10 cm" in weaknesses(part(12, alike))[0]


def test_a_map_that_contradicts_itself_is_refused() -> None:
    _check_sane(Calibration(refined_covariance_scale=44.0))
    with pytest.raises(MapError, match=r"29 times as large .* depth in another unit"):
        _check_sane(Calibration(refined_covariance_scale=834.0))


def test_views_of_two_recordings_are_no_neighbours() -> None:
    def held(index: int, recording: int) -> HeldOut:
        view = View(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)), Camera(1, 1, 1.0, 1.0, 0.0, 0.0), np.eye(4), index)
        return HeldOut(view, 0, 0, recording)

    views = [held(3, 0), held(4, 0), held(6, 0), held(7, 1), held(12, 1), held(11, 1)]
    assert neighbours(views) == [1, 2]


def test_the_picture_is_drawn_from_the_command_line(room_map: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "coverage.png"
    assert main(["map", "view", str(room_map), "--accuracy", "--out", str(out)]) == 0
    assert "are covered" in capsys.readouterr().out
    image = cv2.imread(str(out))
    assert min(image.shape[:2]) > 300 and image.std() > 10
