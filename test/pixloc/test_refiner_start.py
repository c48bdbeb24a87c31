# SPDX-License-Identifier: Apache-2.0
"""Alignment from starts that are off by about the width of a search window."""

from __future__ import annotations

import numpy as np
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings


def test_points_find_themselves_from_starts_a_window_away(room, room_map) -> None:
    scene_map = SceneMap.load(room_map)
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings(max_cost=1.0))
    backbone, rng = Backbone(device=torch.device("cpu")), np.random.default_rng(0)
    for k in range(6):
        frame = room.view(make_pose(so3_exp(np.array([0.0, 0.1 * k - 0.2, 0.0])), [0.1 * k - 0.2, 0.0, -0.6]), k)
        features = backbone.extract(frame.image)
        for px in (20, 30, 40):
            axis = rng.normal(size=3) * [1, 1, 0]
            turn = px / scene_map.camera.fx * axis / np.linalg.norm(axis)
            end = refiner.align(features, [frame.T_map_camera @ make_pose(so3_exp(turn), np.zeros(3))])
            assert end.success and end.T_map_camera is not None and end.support > 6.0
            assert np.linalg.norm((end.T_map_camera - frame.T_map_camera)[:3, 3]) < 0.1
