# SPDX-License-Identifier: Apache-2.0
"""What the stages let onlookers see agrees with what they report, and goes into recordings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.errors import DrawingError
from kfloc_ros.frames import Selection
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.visualization.alignment import moved, offset_between
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import log_alignment, log_filter
from kfloc_ros.visualization.stream import View, watch


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


@pytest.fixture(scope="module")
def localizer(scene_map: SceneMap) -> Localizer:
    return Localizer(scene_map, LocalizerConfig(device="cpu"))


@pytest.fixture(scope="module")
def seen(room: Any, localizer: Localizer) -> list[View]:
    return list(watch(localizer, Selection(room, [4, 5])))


def test_the_filters_cells_agree_with_its_report(seen: list[View]) -> None:
    first, second = (s.coarse for s in seen)
    assert first.filtered is not None and first.filtered.prior is None and first.filtered.nis is None
    assert second.filtered is not None and second.measurement is not None
    prior, nis, flow = second.filtered.prior, second.filtered.nis, second.filtered.flow
    assert prior is not None and nis is not None and flow is not None and prior.process_variance is not None
    both = prior.valid & second.measurement.valid
    assert float(nis[both].mean()) == pytest.approx(second.filter.nis_mean, rel=1e-4)
    assert bool((prior.variance > prior.process_variance).all()) and bool((prior.process_variance > 0).all())
    assert second.scene_coordinates is second.filtered.posterior


def test_steps_lead_from_the_start_to_the_result_and_each_lowers_the_cost(
    seen: list[View], localizer: Localizer
) -> None:
    goal = seen[1].estimate.T_map_camera  # type: ignore[union-attr]
    assert goal is not None
    start = moved(goal, 0.03, 1.0)
    alignment = localizer.refiner.align(seen[1].coarse.features, [start])
    assert alignment.T_map_camera is not None
    np.testing.assert_allclose(alignment.steps[0].T_map_camera, start, atol=1e-9)
    np.testing.assert_allclose(alignment.steps[-1].T_map_camera, alignment.T_map_camera, atol=1e-12)
    assert alignment.steps[0].cost == alignment.initial_cost
    assert alignment.steps[-1].cost <= alignment.final_cost  # of the points that agree
    for stride in (8, 4):
        costs = [step.cost for step in alignment.steps if step.stride == stride]
        assert costs and all(a > b for a, b in itertools.pairwise(costs))
    away = offset_between(alignment.steps[0].T_map_camera, goal)
    assert away.metres == pytest.approx(0.03) and away.degrees == pytest.approx(1.0)


def test_frames_and_alignments_are_recorded(
    seen: list[View], scene_map: SceneMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is not installed: pip install rerun-sdk")
    path = tmp_path / "sub" / "a.rrd"
    with Recording("frames", path=path, up=(1, -1.0), pictures=("map/camera/image",), curves=("cost",)) as recording:
        for item in seen:
            log_filter(recording, item, 7.8)
        estimate = seen[1].estimate
        assert estimate is not None and estimate.alignment is not None
        log_alignment(recording, seen[1].frame, seen[1].coarse.features, estimate.alignment, scene_map)
    data = path.read_bytes()
    assert data.startswith(b"RRF")
    assert all(name in data for name in (b"filter/nis", b"map/used", b"cost/stride_4", b"overlay"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DrawingError, match="display"):
        Recording("frames", live=True)
