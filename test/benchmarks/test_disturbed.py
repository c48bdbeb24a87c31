# SPDX-License-Identifier: Apache-2.0
"""Disturbed streams and their figures, on frames without content."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import frames_csv
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.types import Frame, Matrix
from studies.disturbed import Disturbance, DisturbancePlan, DisturbedSource, Slot
from studies.recovery import Answer, evaluate_disturbed, read_answers

S = 10**9


class Walk(FrameSource):
    """Two walks of 5 s at 30 Hz, each along 2 m, with a gap between; grey images with a bright left half."""

    name = "walk"
    camera = Camera(8, 6, 8.0, 8.0, 3.5, 2.5)

    def __len__(self) -> int:
        return 300

    def indices(self) -> Sequence[int]:
        return [*range(150), *range(1000, 1150)]

    def pose(self, position: int) -> Matrix | None:
        return make_pose(np.eye(3), [0.4 * position / 30, 0.0, 0.0])

    def __getitem__(self, position: int) -> Frame:
        image = np.full((6, 8, 3), 90, np.uint8)
        image[:, :4] = 200
        index = self.indices()[position]
        return Frame(image, self.camera, index * S // 30, index, T_map_camera=self.pose(position))


def test_a_stream_goes_on_evenly_and_its_motion_is_the_sources() -> None:
    stream = DisturbedSource(Walk(), DisturbancePlan(events_per_kind=2, seed=3))
    assert sorted(event.value for event in stream.events) == sorted(2 * [kind.value for kind in Disturbance])
    steps_s = np.diff([slot.stamp_ns for slot in stream.slots]) * 1e-9
    gaps = np.flatnonzero(steps_s > 0.11)
    assert len(gaps) == 2 and np.allclose(steps_s[gaps], 2.1)
    for before, after in zip(stream.slots, stream.slots[1:], strict=False):
        moved_m = np.linalg.norm(
            stream._source.pose(after.position)[:3, 3] - stream._source.pose(before.position)[:3, 3]
        )
        if after.event == before.event:
            assert moved_m < 0.05
        elif stream.events[after.event] is Disturbance.KIDNAP:
            assert moved_m > 0.7
    assert stream.slots == DisturbedSource(Walk(), DisturbancePlan(events_per_kind=2, seed=3)).slots


def test_replaced_images_show_nothing_of_the_map_and_the_others_are_the_sources() -> None:
    stream = DisturbedSource(Walk(), DisturbancePlan(events_per_kind=1))
    for number, slot in enumerate(stream.slots):
        frame, own = stream[number], stream._source[slot.position]
        assert (frame.index, frame.stamp_ns) == (number, slot.stamp_ns)
        assert np.array_equal(frame.T_map_camera, own.T_map_camera)
        assert np.array_equal(frame.image, own.image) == (slot.shown is None)
        if slot.shown is Disturbance.MIRROR:
            assert np.array_equal(frame.image, own.image[:, ::-1])


def test_a_source_without_truth_or_with_one_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "pose", lambda self, position: np.eye(4))
    with pytest.raises(SourceError, match="one place only"):
        DisturbedSource(Walk())
    monkeypatch.setattr(Walk, "pose", lambda self, position: None)
    with pytest.raises(SourceError, match="too few frames with truth"):
        DisturbedSource(Walk())


BLACK, KIDNAP = Disturbance.BLACK, Disturbance.KIDNAP
SLOTS = [
    Slot(0, 0 * S),
    Slot(0, 1 * S, BLACK, 0),
    Slot(0, 2 * S, BLACK, 0),
    Slot(0, 3 * S, None, 0),
    Slot(0, 4 * S, None, 0),
    Slot(9, 5 * S, None, 1),
    Slot(9, 6 * S, None, 1),
]


def right(state: str = "TRACKING") -> Answer:
    return Answer(True, state, 0.02, 100.0)


def test_figures_worked_out_by_hand() -> None:
    lost = Answer(True, "LOST", None, 50.0)
    answers = {
        0: right(), 1: lost, 2: right(), 3: lost, 4: right(), 5: Answer(True, "TRACKING", 0.5, 100.0),
    }  # fmt: skip
    result = evaluate_disturbed(SLOTS, (BLACK, KIDNAP), answers)
    assert (result.frames, result.processed, result.false_ok_frames) == (7, 6, 2)
    assert result.false_ok == pytest.approx(2 / 6)
    black, kidnap = result.kinds[BLACK.value], result.kinds[KIDNAP.value]
    assert (black.events, black.recovered, black.false_ok) == (1, 1, 1)
    assert black.seconds["p50"] == pytest.approx(1.1) and black.images["p50"] == 2
    assert (kidnap.recovered, kidnap.false_ok) == (0, 1) and math.isnan(kidnap.seconds["p50"])
    assert result.replaced_images == {"TRACKING": {"wrong": 1}, "LOST": {"no pose": 1}}
    assert result.good_images == {
        "TRACKING": {"right": 2, "wrong": 1}, "LOST": {"no pose": 1}, "-": {"no answer": 1},
    }  # fmt: skip


def test_answers_come_from_the_result_folder(tmp_path: Path) -> None:
    pose = make_pose(np.eye(3), [0.05, 0.0, 0.0])
    records = [
        FrameRecord(0, 0, np.eye(4), estimate=pose, state="TRACKING", latency_ms=80.0),
        FrameRecord(1, S, np.eye(4), state="LOST", latency_ms=70.0),
        FrameRecord(2, 2 * S, np.eye(4), state="LOST", processed=False),
    ]
    (tmp_path / "frames.csv").write_text(frames_csv(records))
    answers = read_answers(tmp_path / "frames.csv")
    assert answers[0] == Answer(True, "TRACKING", pytest.approx(0.05), 80.0)
    assert answers[1] == Answer(True, "LOST", None, 70.0)
    assert (answers[2].processed, answers[2].state) == (False, "")
