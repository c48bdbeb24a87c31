# SPDX-License-Identifier: Apache-2.0
"""From a recording to records and counters, worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.evaluation.offline import record_of
from kfloc_ros.evaluation.results import frames_csv
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.replay.evaluate import active_seconds, replay_counts, replay_records
from kfloc_ros.replay.recording import Played, PoseSeen, Recording, StatusSeen
from kfloc_ros.types import Frame, PoseEstimate, TrackingState

MS = 1_000_000
POSE = make_pose(so3_exp([0.1, 0.2, 0.3]), [1.0, 2.0, 3.0])


def seen(stamp_ns: int, received_ns: int) -> PoseSeen:
    covariance = np.arange(36.0)
    return PoseSeen(
        stamp_ns, received_ns, "map", tuple(POSE[:3, 3]), tuple(matrix_to_quaternion(POSE[:3, :3])), tuple(covariance)
    )


def recording() -> Recording:
    """Four images at 10 Hz: one answered with a pose, one overtaken, one lost, one answered without a pose."""
    second = 1000 * MS
    return Recording(
        played=[Played(i * 100 * MS, second + i * 100 * MS) for i in range(4)],
        poses=[seen(0, second + 150 * MS)],
        coarse=[seen(0, second + 120 * MS)],
        status=[
            StatusSeen(
                0,
                second + 151 * MS,
                {"state": "TRACKING", "reason": "", "backbone_ms": "31.5", "received": "1", "tracked": "true"},
            ),
            StatusSeen(
                300 * MS,
                second + 500 * MS,
                {"state": "LOST", "reason": "too dark", "inliers": "12", "nis": "nan", "latency_ms": "9"},
            ),
        ],
        transforms={"map -> camera": 1},
        diagnostics={"localizer: localization": {"received": "3", "last_fault": ""}},
    )


def test_every_image_played_has_a_record() -> None:
    records = replay_records(recording(), {0: POSE}, {0: 40, 100 * MS: 41, 200 * MS: 42, 300 * MS: 43})
    assert [record.index for record in records] == [40, 41, 42, 43]
    assert [record.processed for record in records] == [True, False, False, True]
    first, overtaken, _, dark = records
    np.testing.assert_allclose(first.estimate, POSE, atol=1e-12)
    assert first.covariance is not None and first.covariance[0, 5] == 5.0 and first.covariance[5, 0] == 30.0
    assert first.timings_ms == {"backbone": 31.5}
    assert first.truth is POSE and dark.truth is None
    assert dark.estimate is None and dark.state == "LOST" and dark.reason == "too dark"
    assert dark.stats == {"inlier_count": 12.0}
    assert overtaken.reason
    assert first.tracked and not dark.tracked and not overtaken.tracked


def test_frames_csv_has_the_columns_of_an_offline_run() -> None:
    frame = Frame(np.zeros((2, 2, 3), np.uint8), Camera(2, 2, 1.0, 1.0, 0.5, 0.5), 0, 0)
    estimate = PoseEstimate(0, TrackingState.LOST, "too dark", timings_ms={"backbone": 31.5})
    offline = frames_csv([record_of(frame, estimate, latency_ms=40.0, rectify_ms=1.0)]).splitlines()
    replayed = frames_csv(replay_records(recording(), {}, {})).splitlines()
    assert replayed[0] == offline[0]
    rows = list(csv.DictReader(replayed))
    assert rows[3]["inlier_count"] == "12.0" and rows[0]["backbone_ms"] == "31.5" and rows[0]["inlier_count"] == ""


def test_latency_runs_from_publication_to_the_pose_or_else_the_status() -> None:
    records = replay_records(recording(), {}, {})
    assert records[0].latency_ms == pytest.approx(150.0)
    assert records[3].latency_ms == pytest.approx(200.0)
    assert records[1].latency_ms is None


def test_the_counters_add_up() -> None:
    data = recording()
    counts = replay_counts(data, replay_records(data, {}, {}))
    assert (counts.played, counts.received, counts.processed, counts.dropped, counts.lost) == (4, 3, 2, 1, 1)
    assert counts.tf == 1


def test_nodes_that_never_spoke_processed_nothing() -> None:
    data = Recording(played=[Played(0, 0)])
    counts = replay_counts(data, replay_records(data, {}, {}))
    assert (counts.received, counts.processed, counts.dropped) == (1, 0, 1)


def test_pauses_of_the_recording_are_not_working_time() -> None:
    data = Recording(played=[Played(t * MS, 0) for t in (0, 100, 200, 9000, 9100)])
    assert active_seconds(data, rate=1.0) == pytest.approx(0.3)
    assert active_seconds(data, rate=2.0) == pytest.approx(0.15)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    recording().save(path)
    assert Recording.load(path) == recording()


def test_a_bag_that_loops_has_its_answers_apart() -> None:
    data = Recording(
        played=[Played(0, 1000), Played(100, 2000), Played(0, 3000), Played(100, 4000)],
        status=[StatusSeen(t, at, {"state": s}) for t, at, s in ((0, 1500, "A"), (0, 3500, "B"), (100, 4500, "C"))],
    )
    records = replay_records(data, {}, {0: 7, 100: 8})
    assert [(r.index, r.processed, r.state) for r in records if r.processed] == [
        (7, True, "A"), (7, True, "B"), (8, True, "C"),
    ]  # fmt: skip
    assert [r.processed for r in records] == [True, False, True, True]
