# SPDX-License-Identifier: Apache-2.0
"""Collection of poor frames: with confirmed poses only, bounded, and a source that `kfloc map update` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from textured_room import Room

from kfloc_ros.cli.main import main
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation import collection
from kfloc_ros.evaluation.collection import Collection
from kfloc_ros.geometry.lie import inverse_pose, make_pose
from kfloc_ros.types import Alignment, Frame, Matrix, PoseEstimate, TrackingState

ALIGNED = Alignment(True, "", np.eye(4), np.eye(6), 0.2, 0.1, 1.0, 3, (0,))
STEP_NS = 100_000_000


def frame_at(number: int) -> Frame:
    frame = Room(40).at(3.0 * number, number)
    return replace(frame, stamp_ns=10**9 + number * STEP_NS)


def estimate_of(frame: Frame, confidence: float | None = 0.95, T: Matrix | None = None) -> PoseEstimate:
    if confidence is None:
        return PoseEstimate(frame.stamp_ns, TrackingState.LOST, "lost")
    pose = frame.T_map_camera if T is None else T
    return PoseEstimate(
        frame.stamp_ns, TrackingState.TRACKING, "", pose, np.eye(6), alignment=ALIGNED, confidence=confidence
    )


def moved(T: Matrix, metres: float) -> Matrix:
    return T @ make_pose(np.eye(3), [metres, 0.0, 0.0])


def test_poor_frames_between_certain_ones_become_a_source(tmp_path: Path) -> None:
    collecting = Collection(tmp_path / "lacking")
    frames = [frame_at(k) for k in range(8)]
    for k, frame in enumerate(frames):
        collecting.offer(frame, estimate_of(frame, 0.5 if k in (2, 5) else 0.95))
    assert collecting.count == 2 and "2 poor frames" in collecting.text
    source = open_source(str(tmp_path / "lacking"))
    by_stamp = {source.stamp_ns(k): source[k] for k in range(len(source))}
    assert set(by_stamp) >= {frames[2].stamp_ns, frames[5].stamp_ns}
    for frame in frames:
        if frame.stamp_ns in by_stamp:
            written = by_stamp[frame.stamp_ns]
            assert (written.image == frame.image).all() and written.camera == frame.camera
            assert written.depth_m is not None and np.abs(written.depth_m - frame.depth_m).max() < 2e-4
            assert np.abs(written.T_map_camera - frame.T_map_camera).max() < 1e-6


def test_a_pose_that_the_frames_around_it_contradict_is_not_collected(tmp_path: Path) -> None:
    collecting = Collection(tmp_path / "c")
    for k in range(12):
        frame = frame_at(k)
        wrong = 4 <= k < 10  # for longer than a path is trusted
        T = moved(frame.T_map_camera, 0.5) if wrong else None
        collecting.offer(frame, estimate_of(frame, 0.5 if wrong else 0.95, T))
    assert collecting.count == 0 and not (tmp_path / "c").exists()
    assert "No poor frame" in collecting.text


@pytest.mark.parametrize(("gap", "count"), [(2, 2), (7, 0)])
def test_frames_without_a_pose_are_bridged_over_short_gaps_only(tmp_path: Path, gap: int, count: int) -> None:
    collecting = Collection(tmp_path / "c")
    frames = [frame_at(k) for k in range(3 + gap)]
    for k, frame in enumerate(frames):
        collecting.offer(frame, estimate_of(frame, None if 1 <= k <= gap else 0.95))
    assert collecting.count == count


def test_odometry_bridges_a_long_gap_if_it_arrives_at_the_next_certain_pose(tmp_path: Path) -> None:
    for drift_m, count in ((0.0, 7), (0.3, 0)):
        collecting = Collection(tmp_path / f"{drift_m}")
        frames, last = [frame_at(k) for k in range(9)], None
        for k, frame in enumerate(frames):
            truth = frame.T_map_camera
            assert truth is not None
            predicted = None if last is None else last @ inverse_pose(frames[0].T_map_camera) @ moved(truth, drift_m)
            collecting.offer(frame, estimate_of(frame, None if 1 <= k <= 7 else 0.95), predicted)
            last = truth if k == 0 else last
        assert collecting.count == count


def test_time_that_jumps_confirms_nothing(tmp_path: Path) -> None:
    collecting = Collection(tmp_path / "c")
    for number, confidence in ((5, 0.95), (6, 0.5), (1, 0.95), (2, 0.5), (60, 0.95)):
        frame = frame_at(number)
        collecting.offer(frame, estimate_of(frame, confidence))
    assert collecting.count == 0


def test_the_folder_stays_within_its_limit_and_is_continued(tmp_path: Path) -> None:
    def collect(folder: Path, first: int, max_mb: float = 500.0) -> Collection:
        collecting = Collection(folder, max_mb=max_mb)
        for k in range(first, first + 9):
            frame = frame_at(k)
            collecting.offer(frame, estimate_of(frame, 0.5 if k % 2 else 0.95))
        return collecting

    small = collect(tmp_path / "small", 0, max_mb=0.3)
    size = sum(path.stat().st_size for path in (tmp_path / "small").rglob("*") if path.is_file())
    assert small.problem and size < 0.31e6 and small.count >= 1
    folder = tmp_path / "c"
    first = collect(folder, 0)
    length = len(open_source(str(folder)))
    collect(folder, 20)
    assert first.count and len(open_source(str(folder))) > length
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("hello")
    with pytest.raises(SourceError, match="no collection"):
        Collection(tmp_path / "other")


def test_localize_collects_what_the_map_lacks(room_map: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    recording = Collection(tmp_path / "recording")
    for k in range(9):
        frame = replace(Room(40).at(1.5 * k, k), stamp_ns=10**9 + k * STEP_NS)
        recording.offer(frame, estimate_of(frame, 0.5 if k % 2 else 0.95))
    words = ["localize", str(tmp_path / "recording"), "--map", str(room_map), "--device", "cpu", "--quiet"]
    lacking = ["--collect", str(tmp_path / "lacking")]
    assert main([*words, "--out", str(tmp_path / "a"), *lacking]) == 0
    assert "No poor frame" in capsys.readouterr().err and not (tmp_path / "lacking").exists()
    monkeypatch.setattr(collection, "POOR_CONFIDENCE", 0.97)  # between the confidences of this recording
    monkeypatch.setattr(collection, "CERTAIN_CONFIDENCE", 0.97)
    assert main([*words, "--out", str(tmp_path / "b"), *lacking]) == 0
    told = capsys.readouterr().err
    assert ("collected in" in told) == (tmp_path / "lacking" / "rgb.txt").is_file()
    assert main([*words, "--out", str(tmp_path / "c"), *lacking, "--jobs", "2"]) == 2
    assert "omit --jobs" in capsys.readouterr().err
