# SPDX-License-Identifier: Apache-2.0
"""Calibration of poses on views of the recording: the camera's fit, displacements, and errors away from all images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping import pose_calibration
from kfloc_ros.mapping.pose_calibration import LEFT_OUT_M, SHIFT_LIMITS, camera_fit_scale, usual_shift_chi2
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.references import ReferenceViews, view_distances
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Matrix


def test_cameras_that_scatter_are_believed_less() -> None:
    lengths = np.random.default_rng(0).chisquare(6, 400)
    assert camera_fit_scale(3.0 * lengths) == pytest.approx(3.0, rel=0.2)
    assert camera_fit_scale(np.append(lengths, 40.0 * lengths[:80])) > 3.0, "right cameras in the tail stay right"
    assert camera_fit_scale([]) == Calibration().camera_fit_scale


def test_displacements_that_right_poses_have_in_a_map_are_usual_there() -> None:
    assert usual_shift_chi2([]) == usual_shift_chi2([1.0] * 20) == SHIFT_LIMITS[0], "noise alone"
    assert usual_shift_chi2([3.0] * 20) == 3.0
    assert usual_shift_chi2([30.0] * 20) == SHIFT_LIMITS[1], "something moves in all of them"


@pytest.fixture(scope="module")
def room_views(room: FrameSource) -> list[View]:
    views = []
    for position in (4, 12):
        frame = room[position]
        assert frame.depth_m is not None and frame.T_map_camera is not None
        views.append(View(frame.image, frame.depth_m, frame.camera, frame.T_map_camera, frame.index))
    return views


def test_errors_away_from_the_mapped_views_are_those_with_references_checked_away_from_them(
    room_map: Any, room_views: list[View], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene_map, used = SceneMap.load(room_map), []

    def away_from(T_map_camera: Matrix, least_m: float) -> ReferenceViews | None:
        used.append((T_map_camera, least_m))
        return scene_map.references if least_m < LEFT_OUT_M[-1] else None

    aligned_with = []

    def aligned(others: ReferenceViews, *rest: object) -> list[Any]:
        aligned_with.append(others)
        return []

    monkeypatch.setattr(pose_calibration, "_aligned_with", aligned)
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings())
    checked: Any = SimpleNamespace(spread=room_views, away_from=away_from)
    pose_calibration._aligned_away(refiner, [], "cpu", checked, lambda share: None)
    assert [least_m for _, least_m in used] == [*LEFT_OUT_M, *LEFT_OUT_M], (
        "all views over the recording, held out or not"
    )
    assert [T is view.T_map_camera for (T, _), view in zip(used[::3], room_views, strict=True)] == [True, True]
    assert len(aligned_with) == 4, "none where nothing is left"


def test_without_evidence_the_nearest_references_are_left_out(room_map: Any, room_views: list[View]) -> None:
    scene_map = SceneMap.load(room_map)
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings())
    found, _ = pose_calibration._aligned_away(refiner, room_views, "cpu", None, lambda share: None)
    nearest = [view_distances(scene_map.references.T_map_camera, view.T_map_camera).min() for view in room_views]
    assert max(nearest) < LEFT_OUT_M[0] and found
    assert min(alignment.distance_m for _, alignment, _ in found) >= 0.9 * LEFT_OUT_M[0]
