# SPDX-License-Identifier: Apache-2.0
"""Building holds a bounded amount in memory, and keeps to the time it is given."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import long_recording
import numpy as np
import pytest
import torch

from kfloc_ros.cli.arguments import duration_s
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.mapping import mapping_pass
from kfloc_ros.mapping.frame_checks import UNREADABLE
from kfloc_ros.mapping.mapping_pass import CellBuffer
from kfloc_ros.mapping.schedule import READ_SHARE, TimeBudget
from kfloc_ros.mapping.views import Cells, ReferenceCollector
from kfloc_ros.pixloc.references import ReferencePoints
from kfloc_ros.types import Frame


def numbered(first: int, count: int) -> Cells:
    number = torch.arange(first, first + count)
    return Cells((number % 2000)[:, None].expand(-1, 192).half(), number[:, None].expand(-1, 3).float())


def test_a_full_buffer_holds_an_even_choice_of_all_cells() -> None:
    buffer = CellBuffer(1000, np.random.default_rng(0))
    for view in range(20):
        buffer.add(numbered(200 * view, 200))
    cells = buffer.cells()
    assert len(buffer) == len(cells.inputs) == 1000
    number = cells.coordinates[:, 0].long()
    assert len(number.unique()) == 1000
    assert torch.equal(cells.inputs[:, 5].long(), number % 2000)  # inputs and coordinates of the same cell
    per_quarter = torch.histc(number.float(), 4, 0, 4000)
    assert (per_quarter > 200).all() and (per_quarter < 300).all()


def test_a_buffer_that_is_not_full_holds_everything() -> None:
    buffer = CellBuffer(1000, np.random.default_rng(0))
    buffer.add(numbered(0, 300))
    buffer.add(numbered(300, 300))
    assert buffer.cells().coordinates[:, 0].tolist() == list(range(600))


def peaks_bytes(*arguments: str) -> list[int]:
    """The peaks of memory that ``helpers/long_recording.py`` measures, in a process of its own."""
    script = Path(long_recording.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.thorough
def test_a_longer_recording_takes_no_more_memory() -> None:
    """Of 600 more views, the images and depths alone would be 86 MB."""
    _, first, longer = peaks_bytes("pass", "200", "200", "800")  # compiled loops are ready after the first one
    assert longer - first < 25e6


@pytest.mark.slow
def test_memory_for_a_long_recording_stays_below_4_gb() -> None:
    """Of 1,200 views of 640x480 pixels: the training buffer and the views held out are full."""
    (peak,) = peaks_bytes("build", "1200")
    assert 2e9 < peak < 4e9


def test_reference_points_stay_below_their_limit_and_cover_the_whole_way() -> None:
    collector = ReferenceCollector(0.01, 1000)
    for k in range(200):
        T = np.eye(4)
        T[0, 3] = 0.05 * k
        n = 60
        points = ReferencePoints(torch.zeros(n, 3), torch.zeros(n, 64), torch.zeros(n, 24), torch.ones(n))
        if collector.extends_coverage(T):
            collector.add(k, T, points)
    views = collector.views()
    assert sum(map(len, views.views)) <= 1000 and len(views.ids) >= 12
    gaps = np.diff(np.sort(views.T_map_camera[:, 0, 3]))
    assert gaps.max() < 1.5 and views.T_map_camera[:, 0, 3].max() > 9.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("per_view_s", "expected"), [(0.01, 1000), (0.1, 450), (0.5, 90)])
def test_views_are_left_out_evenly_until_reading_fits(per_view_s: float, expected: int) -> None:
    clock = Clock()
    time_budget = TimeBudget(100.0, 100.0, clock)
    read = []
    for position in range(1000):
        if time_budget.allows_view(1000 - position):
            read.append(position)
            clock.now += per_view_s
    assert len(read) == pytest.approx(expected, rel=0.05)
    assert clock.now <= 100.0 + 100.0 * READ_SHARE + 2 * per_view_s
    late = np.diff(read[10:])
    assert late.max() <= 2 * np.median(late) + 1 and read[-1] > 960


def test_training_gets_what_reading_and_calibration_leave() -> None:
    clock = Clock()
    time_budget = TimeBudget(100.0, 100.0, clock)
    clock.now += 45.0
    views = time_budget.calibration_views(50, backbone_pass_s=0.1)
    assert 20 <= views < 50
    assert 25.0 < time_budget.training_s(views, 0.1) < 40.0
    clock.now += 50.0
    with pytest.raises(SourceError, match="too short"):
        time_budget.training_s(views, 0.1)


def test_without_a_budget_nothing_is_left_out() -> None:
    time_budget = TimeBudget(0.0, 0.0)
    assert not time_budget.limited and all(time_budget.allows_view(n) for n in range(100, 0, -1))
    assert time_budget.calibration_views(77, 10.0) == 77


@pytest.mark.parametrize(("text", "seconds"), [("5min", 300), ("90s", 90), ("1.5h", 5400), ("42", 42)])
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "min", "-5min", "0s", "5 days", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        duration_s(text)


class Damaged(DerivedSource):
    """A source some of whose frames are damaged."""

    def __init__(self, source: FrameSource, positions: set[int], damaged: Callable[[Frame, int], Frame]) -> None:
        super().__init__(source)
        self._positions, self._damaged = positions, damaged

    def changed(self, frame: Frame, position: int) -> Frame:
        return self._damaged(frame, position) if position in self._positions else frame


def unreadable(frame: Frame, position: int) -> Frame:
    raise FrameError(f"'{position}.png' is cut off: its end is missing.")


def striped(frame: Frame, position: int) -> Frame:
    """The frame with depth in every second column, where no point can be taken."""
    assert frame.depth_m is not None
    depth_m = frame.depth_m.copy()
    depth_m[:, ::2] = 0
    return replace(frame, depth_m=depth_m)


def mapping_pass_of(source: FrameSource) -> mapping_pass.MappingPass:
    settings = mapping_pass.MappingPassSettings(0, 100, 0.04, 2_000, 0)
    budget = TimeBudget(0.0, time.monotonic())
    return mapping_pass.mapping_pass_over(
        source, long_recording.SMALL, Backbone(device="cpu"), settings, budget, lambda position: None
    )


def test_frames_that_cannot_be_read_are_left_out_of_a_map_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    recording = long_recording.LongRecording(32, long_recording.SMALL)
    found = mapping_pass_of(Damaged(recording, {3, 11}, unreadable))
    assert found.left_out[UNREADABLE] == 2 and found.used == mapping_pass_of(recording).used - 2
    assert "'3.png' is cut off" in caplog.text and "'11.png' is cut off" in caplog.text
    strict = Damaged(recording, {3}, unreadable)
    strict.strict = True
    with pytest.raises(FrameError, match=r"3\.png"):
        mapping_pass_of(strict)


def test_views_without_any_reference_point_are_no_reference_views() -> None:
    recording = long_recording.LongRecording(32, long_recording.SMALL)
    usual = mapping_pass_of(recording)
    held_out = usual.held_out[0].view.index
    mapped = usual.references.views.ids[0]
    found = mapping_pass_of(Damaged(recording, {mapped, held_out}, striped))
    assert found.used == usual.used
    assert {mapped, held_out}.isdisjoint(found.all_references.ids)
    assert all(len(view) for view in found.all_references.views)
