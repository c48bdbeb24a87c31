# SPDX-License-Identifier: Apache-2.0
"""A map told in another frame: its head, its views and its extent moved together."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.kfnet.experts import heads_of, moved, together
from kfloc_ros.mapping.merge import transformed
from kfloc_ros.mapping.scene_map import SceneMap

Box = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Smallest and largest corner."""


def in_frame(scene_map: SceneMap, T: Matrix, frame_id: str) -> SceneMap:
    """A map in another frame: each point p becomes T p, for its head, too."""
    if np.array_equal(T, np.eye(4)):
        return replace(scene_map, frame_id=frame_id)
    return replace(
        scene_map,
        frame_id=frame_id,
        head=together([moved(head, T) for head in heads_of(scene_map.head)]).eval(),
        kfnet=None if scene_map.kfnet is None else scene_map.kfnet.moved(T),
        references=transformed(scene_map.references, T),
        bounds_m=_box(scene_map.bounds_m, T),
    )


def _box(bounds_m: Box, T: Matrix) -> Box:
    corners = np.array(list(itertools.product(*zip(*bounds_m, strict=True)))) @ T[:3, :3].T + T[:3, 3]
    low, high = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])
