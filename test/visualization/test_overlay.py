# SPDX-License-Identifier: Apache-2.0
"""The overlay tells a right pose from a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferencePoints
from kfloc_ros.types import PoseEstimate, TrackingState
from kfloc_ros.visualization.overlay import OverlayPainter, draw_overlay, reproject


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


@pytest.fixture(scope="module")
def features(room: Any) -> BackboneFeatures:
    return Backbone().extract(room[4].image)


def test_residuals_are_small_at_the_true_pose_and_large_beside_it(
    room: Any, scene_map: SceneMap, features: BackboneFeatures
) -> None:
    frame = room[4]
    T = frame.T_map_camera
    points = ReferencePoints.concatenate([scene_map.references.views[k] for k in scene_map.references.nearest(T, 3)])
    right = reproject(features, points, T, frame.camera)
    wrong = reproject(features, points, T @ make_pose(so3_exp([0.0, 0.05, 0.0]), np.zeros(3)), frame.camera)
    assert len(right.pixels) > 200
    inside = (right.pixels >= 0) & (right.pixels <= [frame.camera.width, frame.camera.height])
    assert inside.all()
    assert np.median(right.residuals) < 0.6 * np.median(wrong.residuals)


def test_a_point_is_drawn_where_the_camera_sees_it(room: Any, scene_map: SceneMap, features: BackboneFeatures) -> None:
    frame = room[4]
    T = frame.T_map_camera
    view = scene_map.references.views[scene_map.references.nearest(T, 1)[0]]
    seen = reproject(features, view, T, frame.camera)
    camera_points = (view.points.numpy() - T[:3, 3]) @ T[:3, :3]
    uv = camera_points[:, :2] / camera_points[:, 2:] * [frame.camera.fx, frame.camera.fy]
    uv += [frame.camera.cx, frame.camera.cy]
    distances = np.linalg.norm(uv[:, None] - seen.pixels[None], axis=2).min(axis=0)
    assert distances.max() < 0.01


def test_the_overlay_shows_points_and_state(room: Any, scene_map: SceneMap, features: BackboneFeatures) -> None:
    frame = room[4]
    painter = OverlayPainter(scene_map.references, scene_map.camera)
    estimate = PoseEstimate(0, TrackingState.TRACKING, "", T_map_camera=frame.T_map_camera)
    picture = painter.paint(frame.image, estimate, features)
    assert picture.shape == frame.image.shape and picture.dtype == np.uint8
    pale = draw_overlay(frame.image, estimate, None)
    drawn = (picture != pale).any(axis=2)[30:]
    assert 0.02 < drawn.mean() < 0.7
    blank = (painter.paint(frame.image, estimate) != picture).any(axis=2).mean()
    assert blank < 0.01  # features made anew are the same features


def test_without_a_pose_there_is_the_reason_and_no_point(room: Any, scene_map: SceneMap) -> None:
    painter = OverlayPainter(scene_map.references, scene_map.camera)
    estimate = PoseEstimate(0, TrackingState.LOST, "no coarse pose: äöü 3 inliers")
    picture = painter.paint(room[4].image, estimate)
    silent = painter.paint(room[4].image, replace(estimate, reason=""))
    changed = (picture != silent).any(axis=2)
    assert changed[:30].any() and not changed[30:].any()
