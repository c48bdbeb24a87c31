# SPDX-License-Identifier: Apache-2.0
"""What is shown in the map frame lies where it should and has its image's colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.clouds import Cloud, fill_cloud, read_cloud
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.clouds import camera_symbols, cell_cloud, map_cloud


def coordinates(rows: int = 4, columns: int = 6) -> SceneCoordinates:
    mean = torch.arange(3.0 * rows * columns).reshape(3, rows, columns)
    variance = torch.full((rows, columns), 0.04)
    valid = torch.ones(rows, columns, dtype=torch.bool)
    valid[1, 2] = False
    return SceneCoordinates(mean, variance, valid, stride=8)


def test_a_cell_has_its_point_its_sigma_and_the_colour_of_its_pixel() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    cloud = cell_cloud(coordinates(), image)
    assert cloud.points.shape == (4, 6, 3) and cloud.sigma_m is not None
    assert np.array_equal(cloud.points[3, 5], [23.0, 47.0, 71.0])
    assert cloud.sigma_m[3, 5] == pytest.approx(0.2)
    # the centre of cell (3, 5) is the pixel (u, v) = (43.5, 27.5)
    assert any(np.array_equal(cloud.colours[3, 5], image[v, u]) for v in (27, 28) for u in (43, 44))
    assert np.isnan(cloud.points[1, 2]).all() and np.isnan(cloud.sigma_m[1, 2])


def test_the_cloud_of_a_map_is_its_points_and_no_more_than_asked_for(room_map: Path) -> None:
    scene_map = SceneMap.load(room_map)
    everything = sum(len(view) for view in scene_map.references.views)
    assert len(map_cloud(scene_map).points) == everything
    thinned = map_cloud(scene_map, limit=1000)
    assert 500 <= len(thinned.points) <= 1000 and len(thinned.colours) == len(thinned.points)
    low, high = (np.array(corner) for corner in scene_map.bounds_m)
    inside = ((thinned.points > low - 0.1) & (thinned.points < high + 0.1)).all(axis=1)
    assert inside.mean() > 0.95
    assert len(np.unique(thinned.colours, axis=0)) > 50  # heights differ, and so do their colours


def test_camera_symbols_open_towards_where_the_camera_looks() -> None:
    camera = Camera(320, 240, 200.0, 200.0, 159.5, 119.5)
    T = make_pose(so3_exp([0.3, -0.8, 0.2]), np.array([1.0, 2.0, 3.0]))
    lines = camera_symbols(np.stack([np.eye(4), T]), camera, 0.5)
    assert lines.shape == (2, 8, 2, 3)
    assert np.allclose(lines[1, :4, 0], T[:3, 3])  # the first four lines leave the centre
    ends = lines[1].reshape(-1, 3) @ inverse_pose(T)[:3, :3].T + inverse_pose(T)[:3, 3]
    assert set(np.round(ends[:, 2], 9)) == {0.0, 0.5}
    corner = ends[np.argmax(ends[:, 0] + ends[:, 1])]
    assert np.allclose(corner, [0.5 * 160 / 200, 0.5 * 120 / 200, 0.5])


def test_a_cloud_message_is_organised_and_reads_back() -> None:
    rng = np.random.default_rng(1)
    cloud = Cloud(
        rng.normal(size=(3, 5, 3)).astype(np.float32),
        rng.integers(0, 256, (3, 5, 3), dtype=np.uint8),
        rng.random((3, 5)).astype(np.float32),
    )
    message = fill_cloud(SimpleNamespace(), cloud, SimpleNamespace)
    assert (message.height, message.width, message.point_step, message.row_step) == (3, 5, 20, 100)
    assert [field.name for field in message.fields] == ["x", "y", "z", "rgb", "sigma"] and message.is_dense
    again = read_cloud(message)
    assert np.array_equal(again.points, cloud.points) and np.array_equal(again.colours, cloud.colours)
    assert again.sigma_m is not None and np.array_equal(again.sigma_m, cloud.sigma_m)


def test_a_cloud_without_sigma_is_one_row_and_says_that_points_are_missing() -> None:
    cloud = Cloud(np.full((7, 3), np.nan, np.float32), np.zeros((7, 3), np.uint8))
    message = fill_cloud(SimpleNamespace(), cloud, SimpleNamespace)
    assert (message.height, message.width, message.point_step, message.is_dense) == (1, 7, 16, False)
    assert read_cloud(message).sigma_m is None


@pytest.mark.parametrize("damage", [{"data": b""}, {"fields": []}, {"height": 2**31}, {"point_step": 8}])
def test_a_damaged_cloud_message_is_refused(damage: dict[str, object]) -> None:
    cloud = Cloud(np.zeros((7, 3), np.float32), np.zeros((7, 3), np.uint8))
    message = fill_cloud(SimpleNamespace(), cloud, SimpleNamespace)
    for name, value in damage.items():
        setattr(message, name, value)
    with pytest.raises(FrameError, match="point cloud"):
        read_cloud(message)
