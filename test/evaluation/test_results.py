# SPDX-License-Identifier: Apache-2.0
"""The result folder: schema of summary.json, TUM files, CSV, report and pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.device import describe_hardware
from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import frames_csv, write_results
from kfloc_ros.evaluation.summary import RunInfo, summarize
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.messages.tum import read_tum, tum_text


def pose(i: int, shift_m: float = 0.0) -> np.ndarray:
    return make_pose(so3_exp([0.0, 0.1 * i, 0.02]), [0.1 * i + shift_m, 0.2, -0.3])


def make_records(count: int = 8) -> list[FrameRecord]:
    """Frame 3 fails, frame 5 has no truth, the rest are 4 mm off and 3 cm coarse."""
    records = []
    for i in range(count):
        failed = i == 3
        records.append(
            FrameRecord(
                index=i,
                stamp_ns=1_700_000_000_000_000_000 + i * 33_333_333 + (i > 4) * 10**9,
                truth=None if i == 5 else pose(i),
                estimate=None if failed else pose(i, 0.004),
                coarse=pose(i, 0.03),
                state="LOST" if failed else "TRACKING",
                reason="too few inliers, 3 | 12" if failed else "",
                covariance=None if failed else np.diag([1e-5] * 3 + [1e-6] * 3),
                stats={"inlier_count": 100.0 + i, "nis_mean": float("nan")},
                timings_ms={"backbone": 30.0 + i, "total": 90.0} | ({} if failed else {"refine": 50.0}),
                latency_ms=100.0 + i,
            )
        )
    return records


def make_run(**changes) -> RunInfo:
    values = {
        "kind": "localize",
        "command": "kfloc localize ...",
        "map": "maps/x",
        "source": "7scenes:x",
        "poses": "sfm",
        "split": "blocks50:test",
        "frames": None,
        "hardware": describe_hardware(),
        "received": 8,
        "processed": 8,
        "dropped": 0,
        "duration_s": 2.0,
    }
    return RunInfo(**(values | changes))


def reject_constant(name: str) -> float:
    raise AssertionError(f"summary.json holds {name}")


def test_summary_json_has_the_agreed_keys_and_is_strict_json(tmp_path: Path) -> None:
    write_results(tmp_path, make_records(), make_run(), plots=False)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=reject_constant)
    for key in ("throughput_hz", "received", "processed", "dropped", "hardware", "map", "command", "source", "split"):
        assert summary[key] is not None, key
    assert summary["frames"] == 8
    assert summary["frames_without_truth"] == 1
    assert summary["localized"] == 7
    assert summary["median_translation_m"] == pytest.approx(0.004)
    assert set(summary["recall"]) == {"1cm_1deg", "2cm_2deg", "5cm_5deg", "25cm_2deg"}
    assert summary["recall"]["1cm_1deg"] == pytest.approx(6 / 7)
    assert summary["coarse"]["recall"]["2cm_2deg"] == 0.0
    assert summary["coarse"]["recall"]["5cm_5deg"] == 1.0
    assert set(summary["latency_ms"]) == {"p50", "p95", "p99"}
    assert summary["stage_ms"]["refine"] == 50.0
    assert list(summary["stage_ms"])[-1] == "total"
    assert summary["throughput_hz"] == 4.0
    assert summary["hardware"]["cores"] >= 1


def test_figures_that_do_not_exist_are_null(tmp_path: Path) -> None:
    records = [FrameRecord(0, 0, pose(0)), FrameRecord(1, 1, pose(1))]
    write_results(tmp_path, records, make_run(duration_s=0.0), plots=False)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=reject_constant)
    assert summary["median_translation_m"] is None
    assert summary["median_rotation_deg"] == 180.0
    assert summary["latency_ms"]["p95"] is None
    assert summary["throughput_hz"] is None


def test_replay_judges_processed_frames_and_reports_all_played() -> None:
    records = make_records()
    records[0] = FrameRecord(0, records[0].stamp_ns, pose(0), processed=False)
    summary = summarize(records, make_run(kind="replay", processed=7, dropped=1))
    assert summary.frames == 7
    assert summary.accuracy.recall["1cm_1deg"] == pytest.approx(5 / 6)
    assert summary.played is not None
    assert summary.played.frames == 7  # one of the eight has no truth
    assert summary.played.recall["1cm_1deg"] == pytest.approx(5 / 7)


def test_tracking_but_wrong_counts_confident_errors_only() -> None:
    wrong = FrameRecord(0, 0, pose(0), pose(0, 0.3), state="TRACKING")
    admitted = FrameRecord(1, 1, pose(1), pose(1, 0.3), state="DEGRADED")
    assert summarize([wrong, admitted], make_run()).tracking_but_wrong == 1


def test_tum_round_trip_keeps_nanoseconds_and_poses(tmp_path: Path) -> None:
    records = make_records()
    path = tmp_path / "trajectory.tum"
    path.write_text(tum_text((r.stamp_ns, r.estimate) for r in records))
    back = read_tum(path)
    assert list(back) == [r.stamp_ns for r in records if r.estimate is not None]
    for record in records:
        if record.estimate is not None:
            np.testing.assert_allclose(back[record.stamp_ns], record.estimate, atol=1e-8)


def test_a_damaged_tum_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.tum"
    path.write_text("1.0 0 0 0 0 0 0 1\n2.0 0 0 zero 0 0 0 1\n")
    with pytest.raises(SourceError, match="Line 2"):
        read_tum(path)


def test_csv_has_one_line_a_frame_and_blank_where_nothing_is_known() -> None:
    rows = list(csv.DictReader(frames_csv(make_records()).splitlines()))
    assert len(rows) == 8
    assert rows[3]["tx_m"] == "" and rows[3]["refine_ms"] == "" and rows[3]["state"] == "LOST"
    assert float(rows[0]["translation_error_m"]) == pytest.approx(0.004)
    assert rows[5]["translation_error_m"] == ""
    assert rows[0]["nis_mean"] == ""


def test_the_folder_is_complete_and_leaves_no_partial_files(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write_results(out, make_records(), make_run())
    names = {path.name for path in out.iterdir()}
    pictures = {"trajectory.png", "error.png", "recall.png", "latency.png"}
    reports = {"report.md", "report.html"}
    assert names == pictures | reports | {"summary.json", "frames.csv", "trajectory.tum", "groundtruth.tum"}
    report = (out / "report.md").read_text()
    assert all(f"]({name})" in report for name in pictures)
    assert "too few inliers, 3 / 12" in report


def test_no_truth_and_no_pose_still_give_a_folder(tmp_path: Path) -> None:
    write_results(tmp_path, [FrameRecord(0, 0, None)], make_run(received=1, processed=1))
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "recall.png").exists()
