# SPDX-License-Identifier: Apache-2.0
"""Depth found from motion is that of the scene, where it is believed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.motion_depth import (
    MotionDepth,
    MotionDepthSettings,
    choose_neighbours,
    draw_points,
    settings_by_matches,
    spread_cells,
)
from kfloc_ros.mapping.plane_sweep import PlaneSweepSettings, PlaneSweepView, cell_rays, plane_sweep_depth
from kfloc_ros.types import Frame, Matrix

CAMERA = Camera(256, 192, 220.0, 220.0, 127.5, 95.5)
WALL_M = 2.0


def wall_pixels(T_map_camera: Matrix, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays (N, 3) of a camera meet the wall z = WALL_M: x and y (N, 2), and the depth along the axis (N,)."""
    directions = rays @ T_map_camera[:3, :3].T
    depth = (WALL_M - T_map_camera[2, 3]) / directions[:, 2]
    return (T_map_camera[:3, 3] + depth[:, None] * directions)[:, :2], depth


class Wall(FrameSource):
    """Views of a flat wall with blotches of many sizes; ``unit`` is a metre in the unit of the poses."""

    name = "wall"
    camera = CAMERA

    def __init__(self, poses: Sequence[Matrix | None], points: np.ndarray | None = None, unit: float = 1.0) -> None:
        rng = np.random.default_rng(3)
        self._poses, self._points, self._unit = poses, points, unit
        layers = [
            cv2.resize(rng.uniform(0, 1, (n, n)), (1024, 1024), interpolation=cv2.INTER_CUBIC) for n in (16, 64, 200)
        ]
        self._paint = np.clip(sum(layers) / 3 * 255, 0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self._poses)

    def indices(self) -> Sequence[int]:
        return range(len(self._poses))

    def visible_points(self, position: int) -> np.ndarray | None:
        return self._points

    def __getitem__(self, position: int) -> Frame:
        T = self._poses[position]
        u, v = np.meshgrid(np.arange(CAMERA.width), np.arange(CAMERA.height))
        rays = np.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones(u.shape)], axis=-1)
        xy, _ = wall_pixels(np.eye(4) if T is None else T, rays.reshape(-1, 3))
        where = ((xy / 4.0 + 0.5) * 1024).reshape(CAMERA.height, CAMERA.width, 2).astype(np.float32)
        grey = cv2.remap(self._paint, where[..., 0], where[..., 1], cv2.INTER_LINEAR)
        told = None if T is None else make_pose(T[:3, :3], self._unit * T[:3, 3])
        return Frame(np.repeat(grey[..., None], 3, axis=2), CAMERA, position, position, T_map_camera=told)


def walk(count: int = 5) -> list[Matrix | None]:
    return [make_pose(so3_exp([0, 0.02 * k, 0]), [0.15 * k, 0.1 * (k % 2), 0.03 * k]) for k in range(count)]


def errors(frame: Frame) -> tuple[np.ndarray, float]:
    """Relative errors where depth is believed, and the share of cells where it is."""
    assert frame.depth_m is not None and frame.T_map_camera is not None
    h, w = CAMERA.height // 8, CAMERA.width // 8
    _, true = wall_pixels(frame.T_map_camera, cell_rays(h, w, CAMERA).numpy().astype(np.float64))
    found = frame.depth_m[3::8, 3::8].reshape(-1)
    known = found > 0
    return np.abs(found[known] - true[known]) / true[known], float(known.mean())


def test_depth_of_a_wall_is_found() -> None:
    frame = MotionDepth(Wall(walk()))[2]
    relative, share = errors(frame)
    assert share > 0.3
    assert np.median(relative) < 0.03
    assert np.quantile(relative, 0.75) < 0.08


@pytest.mark.parametrize("unit", [0.05, 12.0])
def test_places_of_any_size_and_poses_of_any_unit_have_depth(unit: float) -> None:
    frame = MotionDepth(Wall(walk(), unit=unit))[2]
    assert frame.depth_m is not None and frame.T_map_camera is not None
    metres = replace(
        frame,
        depth_m=(frame.depth_m / unit).astype(np.float32),
        T_map_camera=make_pose(frame.T_map_camera[:3, :3], frame.T_map_camera[:3, 3] / unit),
    )
    relative, share = errors(metres)
    assert share > 0.3
    assert np.median(relative) < 0.03


def test_the_range_stays_where_no_matches_tell_it() -> None:
    source = Wall([make_pose(np.eye(3), [5.0 * k, 0.0, 0.0]) for k in range(5)])
    assert settings_by_matches(source, MotionDepthSettings()) == MotionDepthSettings()


def test_points_of_a_reconstruction_give_the_range_whatever_the_scale_is() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-0.5, 1.0, (200, 2)), np.full(200, WALL_M)])
    far_off = MotionDepthSettings(near_m=20.0, far_m=100.0, usual_m=2.0)
    relative, share = errors(MotionDepth(Wall(walk(), points), far_off)[2])
    assert share > 0.3
    assert np.median(relative) < 0.03


def test_views_without_pose_or_without_neighbours_have_no_depth() -> None:
    poses = walk(4)
    far_away = make_pose(np.eye(3), [50.0, 0.0, 0.0])
    source = MotionDepth(Wall([*poses, None, far_away]))
    assert source[4].T_map_camera is None and source[4].depth_m is None
    assert source[5].depth_m is None
    points = np.column_stack([np.linspace(49.5, 50.5, 20), np.zeros(20), np.full(20, WALL_M)])
    alone = MotionDepth(Wall([*poses, far_away], points))[4].depth_m
    assert alone is not None and set(np.unique(alone)) == {0.0, np.float32(WALL_M)}
    with pytest.raises(SourceError, match="three views"):
        MotionDepth(Wall([poses[0], None, None]))


def test_nothing_is_believed_without_texture() -> None:
    blank = F.normalize(torch.ones(64, 12, 16), dim=0)
    views = [PlaneSweepView(blank, torch.from_numpy(T)) for T in walk(3) if T is not None]
    assert not plane_sweep_depth(
        views[1], [views[0], views[2]], Camera(128, 96, 110, 110, 63.5, 47.5), PlaneSweepSettings(0.5, 8)
    ).any()


def test_neighbours_have_a_baseline_and_are_not_all_in_one_place() -> None:
    poses = {k: make_pose(np.eye(3), [0.02 * k, 0, 0]) for k in range(60)}
    chosen = choose_neighbours(0, poses, usual_m=2.0)
    places = np.array([poses[k][0, 3] for k in chosen])
    assert len(chosen) >= 4
    assert places.min() > 0.08 and places.max() < 0.6
    assert np.diff(np.sort(places)).min() > 0.07
    turned = {0: np.eye(4), 1: make_pose(so3_exp([0, 1.0, 0]), [0.3, 0, 0])}
    assert choose_neighbours(0, turned, usual_m=2.0) == []


def test_cells_are_spread_along_surfaces_and_not_across_their_borders() -> None:
    cells = np.full((12, 16), 2.0, np.float32)
    cells[:, 8:] = 4.0
    cells[5, 3] = 0.0
    depth = spread_cells(cells, (96, 128))
    assert set(np.unique(depth)) == {0.0, 2.0, 4.0}
    assert depth[20, 40] == 2.0 and depth[20, 100] == 4.0
    assert depth[44, 28] == 0.0
    assert depth[20, 64] == 0.0


def test_points_are_drawn_nearest_last() -> None:
    depth = np.zeros((192, 256), np.float32)
    draw_points(depth, np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, -1.0], [9.0, 0.0, 1.0]]), CAMERA)
    assert set(np.unique(depth)) == {0.0, 1.0}
