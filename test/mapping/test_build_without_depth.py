# SPDX-License-Identifier: Apache-2.0
"""A map from colour images and poses alone is as good to localize in as its purpose asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textured_room import build_room_map

from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.motion_depth import MotionDepth, with_depth

pytestmark = pytest.mark.slow


def test_a_map_without_depth_localizes(room: Any, tmp_path: Path) -> None:
    source = with_depth(room, hide=True, device="cpu")
    assert isinstance(source, MotionDepth)
    scene_map = build_room_map(tmp_path / "room", source)
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    errors: list[float] = []
    for time_steps in np.arange(5.5, 35.0, 3.0):
        frame = replace(room.at(float(time_steps), int(time_steps)), depth_m=None)
        estimate = localizer.process(replace(frame, T_map_camera=None)).estimate
        T, true = estimate.T_map_camera, frame.T_map_camera
        assert true is not None
        errors.append(np.inf if T is None else float(np.linalg.norm(T[:3, 3] - true[:3, 3])))
    assert np.median(errors) < 0.03


def test_a_source_with_depth_is_left_as_it_is(room: Any) -> None:
    assert with_depth(room, device="cpu") is room
