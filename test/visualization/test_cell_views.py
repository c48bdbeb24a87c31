# SPDX-License-Identifier: Apache-2.0
"""The live pictures of a real filter's frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.visualization.cells import FLOW_CELL_PX, NO_VALUE, NOISE_CELL_PX, flow_view, noise_view


@pytest.fixture(scope="module")
def results(room: Any, room_map: Path) -> list[CoarseResult]:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    return [localizer.coarse_half(room[k]) for k in (4, 5)]


def test_the_first_frame_has_no_flow_and_no_process_noise(results: list[CoarseResult]) -> None:
    assert flow_view(results[0]) is None
    noise = noise_view(results[0])
    assert noise is not None
    rows, columns = 32, 40
    assert noise.shape[1] == 3 * columns * NOISE_CELL_PX and noise.shape[0] > rows * NOISE_CELL_PX
    process = noise[-rows * NOISE_CELL_PX :, columns * NOISE_CELL_PX : 2 * columns * NOISE_CELL_PX]
    assert (process == NO_VALUE).all()


def test_the_second_frame_has_everything(results: list[CoarseResult]) -> None:
    flow, noise = flow_view(results[1]), noise_view(results[1])
    assert flow is not None and flow.shape == (32 * FLOW_CELL_PX, 40 * FLOW_CELL_PX, 3)
    assert flow.std() > 10
    assert noise is not None
    measurement, process, posterior = (noise[:, k : k + noise.shape[1] // 3] for k in _thirds(noise.shape[1]))
    assert process[40:].std() > 5
    # the filter makes cells surer: darker on the scale
    assert posterior[40:].mean() < measurement[40:].mean()


def test_a_result_from_another_process_has_no_pictures(results: list[CoarseResult]) -> None:
    bare = replace(results[1], filtered=None, measurement=None)
    assert flow_view(bare) is None and noise_view(bare) is None


def _thirds(width: int) -> list[int]:
    return [0, width // 3, 2 * width // 3]
