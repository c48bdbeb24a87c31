# SPDX-License-Identifier: Apache-2.0
"""Offline run: features computed ahead change no result, and errors come when it is their turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.offline import localize_frames
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, TrackingState


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


class Frames:
    """Source of the frames given; it ends with an error if one is given."""

    def __init__(self, frames: list[Frame], error: Exception | None = None) -> None:
        self.camera, self._frames, self._error = frames[0].camera, frames, error

    def __iter__(self) -> Iterator[Frame]:
        yield from self._frames
        if self._error is not None:
            raise self._error


def run(scene_map: SceneMap, source: Any, *, ahead: bool, **options: Any) -> list[Any]:
    return list(localize_frames(Localizer(scene_map, LocalizerConfig(device="cpu", **options)), source, ahead=ahead))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{}, {"tracking": True}, {"camera_check": "correct"}])
def test_features_computed_ahead_change_no_bit(
    scene_map: SceneMap, room, options: dict[str, Any], threads: int
) -> None:
    frames = [room[i] for i in range(6)]
    plain, quick = (run(scene_map, Frames(frames), ahead=ahead, **options) for ahead in (False, True))
    assert [item.frame.index for item in quick] == [frame.index for frame in frames]
    for a, b in zip(plain, quick, strict=True):
        assert np.array_equal(a.estimate.T_map_camera, b.estimate.T_map_camera)
        assert np.array_equal(a.estimate.covariance, b.estimate.covariance)
        assert set(a.estimate.timings_ms) == set(b.estimate.timings_ms)
        assert b.latency_ms >= b.estimate.timings_ms["backbone"] > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("ahead", [False, True])
def test_a_refused_frame_is_lost_and_a_broken_source_ends_after_the_frames_before(
    scene_map: SceneMap, room, ahead: bool
) -> None:
    frames = [room[0], replace(room[1], image=room[1].image.astype(np.float32)), room[2]]
    found = []
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    with pytest.raises(SourceError, match="image 3"):
        for item in localize_frames(localizer, Frames(frames, SourceError("image 3 is cut off")), ahead=ahead):
            found.append(item)
    assert [item.estimate.state for item in found] == [
        TrackingState.TRACKING, TrackingState.LOST, TrackingState.TRACKING
    ]  # fmt: skip
    assert "float32" in found[1].estimate.reason and found[1].localization is None
