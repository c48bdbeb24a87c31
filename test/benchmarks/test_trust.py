# SPDX-License-Identifier: Apache-2.0
"""Runs of the benchmark of trust: which frames are treated, and which of their outcomes are false claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trust
from closets import CAMERA, closet

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.types import Frame, PoseEstimate, TrackingState
from studies.outcomes import Outcome, load, save, summarize
from studies.treatments import Treatment

OUTCOME = Outcome(
    "room", "noise 25", "image", "stream", 7, "TRACKING", "", True, 0.2, 1.0, 9, 0.01, 0.5, 50, 0.9, {}, 2
)


class Recording(FrameSource):
    """Grey frames with truth, in two pieces with a gap between them; the grey value is the position."""

    name = "recording"
    camera = CAMERA

    def __len__(self) -> int:
        return 40

    def indices(self) -> Sequence[int]:
        return [*range(20), *range(50, 70)]

    def __getitem__(self, position: int) -> Frame:
        image = np.full((CAMERA.height, CAMERA.width, 3), position, np.uint8)
        return Frame(image, CAMERA, 1 + position, self.indices()[position], T_map_camera=np.eye(4))


def test_runs_with_good_frames_before_have_no_gap() -> None:
    indices = Recording().indices()
    for run in trust.stream_positions(indices, 3, 8, after=10):
        assert np.diff([indices[position] for position in run]).tolist() == [1] * 17
    assert len(trust.stream_positions(indices, 3, 8, after=10)) == 3
    assert trust.stream_positions(indices, 3, 8, after=20) == []
    assert np.diff(trust.stream_positions(range(100), 1, 8)[0]).tolist() == [3] * 7


def test_only_frames_after_the_good_ones_are_treated_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Frame] = []

    class Recorder:
        camera, camera_note = CAMERA, ""

        def __init__(self, *args: object) -> None:
            pass

        def process(self, frame: Frame) -> SimpleNamespace:
            seen.append(frame)
            estimate = PoseEstimate(frame.stamp_ns, TrackingState.TRACKING, "", np.eye(4), np.eye(6))
            return SimpleNamespace(estimate=estimate)

    monkeypatch.setattr(trust, "Localizer", Recorder)
    monkeypatch.setattr(trust, "_backbone", lambda: None)
    scene = trust.Scene("room", closet(1), Recording(), (0.0, 0.0))
    treatment = Treatment(
        "brighter", "image", lambda camera: replace(camera, fx=77.0), lambda image, other, rng: image + np.uint8(100)
    )
    outcomes = list(trust.localize(scene, [np.zeros((4, 4, 3), np.uint8)], treatment, "stream", [3, 4, 5, 6], after=2))
    assert [frame.image[32, 48, 0] for frame in seen] == [3, 4, 105, 106]
    assert [frame.source_camera.fx for frame in seen if frame.source_camera] == [70.0, 70.0, 77.0, 77.0]
    assert np.diff([frame.stamp_ns for frame in seen]).tolist() == [trust.PERIOD_NS] * 3
    assert [(outcome.frame, outcome.since) for outcome in outcomes] == [(5, 0), (6, 1)]


def test_a_wrong_pose_is_a_false_claim_unless_something_is_said() -> None:
    right = replace(OUTCOME, error_m=0.01)
    assert OUTCOME.false_ok and not replace(OUTCOME, said="a zoom").false_ok and not right.false_ok
    assert replace(right, nees=51.0).false_ok and replace(right, has_pose=False).false_ok
    assert summarize([OUTCOME, right, replace(OUTCOME, group="clean")])["false_ok_share"] == 0.5


def test_outcomes_are_the_same_once_written_and_read(tmp_path: Path) -> None:
    save(path := tmp_path / "trust.json", [OUTCOME])
    assert load(path) == [OUTCOME]
    path.write_text("{}")
    with pytest.raises(SourceError, match="is not a result of this benchmark"):
        load(path)
