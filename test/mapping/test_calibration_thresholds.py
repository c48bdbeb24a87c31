# SPDX-License-Identifier: Apache-2.0
"""The thresholds between good and wrong, and what a map of the room says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.pose_calibration import RATIO_LIMITS, _ratio_threshold
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.types import Frame, TrackingState


def test_the_inlier_ratio_lies_between_good_and_wrong() -> None:
    assert _ratio_threshold([0.5] * 20 + [0.9] * 20, [0.1] * 20) == pytest.approx(0.3)
    assert _ratio_threshold([0.5] * 20 + [0.01], [0.1] * 20) == pytest.approx(0.3)
    assert _ratio_threshold([0.95] * 20, [0.9] * 20) == RATIO_LIMITS[1]
    assert _ratio_threshold([0.5] * 3, [0.1] * 20) == Calibration().min_inlier_ratio


@pytest.mark.thorough
def test_another_room_is_lost_and_not_merely_degraded(room: object, room_map: Path) -> None:
    scene_map = SceneMap.load(room_map)
    assert RATIO_LIMITS[0] <= scene_map.calibration.min_inlier_ratio <= RATIO_LIMITS[1]
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    frames = [room[i] for i in (4, 5, 6)]  # type: ignore[index]
    assert localizer.process(frames[0]).estimate.state is TrackingState.TRACKING
    for frame in frames[1:]:
        mirrored = Frame(frame.image[:, ::-1].copy(), frame.camera, frame.stamp_ns)
        estimate = localizer.process(mirrored).estimate
        assert estimate.state is TrackingState.LOST and estimate.T_map_camera is None, estimate.reason
