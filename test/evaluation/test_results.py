# SPDX-License-Identifier: Apache-2.0
"""The result folder: schema of summary.json, TUM files, CSV, report and pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from kfloc_ros.cli.tables import summary_table
from kfloc_ros.device import describe_hardware
from kfloc_ros.errors import ConfigError, SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.plots import draw_trajectory
from kfloc_ros.evaluation.report import accuracy_rows, verdict_lines
from kfloc_ros.evaluation.results import frames_csv, result_folder, write_results
from kfloc_ros.evaluation.summary import RunInfo, summarize
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.messages.poses import read_tum, tum_text


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
    assert set(summary["recall"]) == {"1cm_1deg", "2cm_2deg", "5cm_5deg", "10cm_1deg", "25cm_2deg", "100cm_5deg"}
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


def test_wrong_frames_are_unknown_without_truth() -> None:
    summary = summarize([FrameRecord(0, 0, None, pose(0), state="TRACKING")], make_run()).to_dict()
    assert summary["tracking_but_wrong"] is None and summary["streaming"]["confidently_wrong"] is None


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


def test_results_of_another_run_are_not_overwritten_silently(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with result_folder(out, force=False):
        assert out.is_dir()
        with pytest.raises(ConfigError, match="Another run is writing"), result_folder(out, force=True):
            raise AssertionError
    assert not out.exists()  # nothing was written
    with result_folder(out, force=False):
        write_results(out, make_records(), make_run())
    with pytest.raises(ConfigError, match="results of another run"), result_folder(out, force=False):
        raise AssertionError
    with result_folder(out, force=True):
        write_results(out, make_records(), make_run(), plots=False)
    assert not list(out.glob("*.png")) and not (out / ".running").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"), result_folder(tmp_path / "file", force=True):
        raise AssertionError


def verdict(records: list[FrameRecord], **changes) -> dict[str, str]:
    return {text: css for css, text in verdict_lines(summarize(records, make_run(**changes)))}


def test_the_verdict_of_a_replay_counts_the_frames_without_an_answer() -> None:
    records = make_records()
    for k in (0, 1, 2):
        records[k] = FrameRecord(k, records[k].stamp_ns, pose(k), processed=False)
    said = verdict(records, kind="replay", processed=5, dropped=2)
    assert any(text.startswith("42.9 % of the 7 frames played, answered or not,") for text in said)
    assert any(css == "bad" and text.startswith("3 of 8 frames played got no answer") for text, css in said.items())
    assert said["No TRACKING pose is more than 10 cm off."] == "good"
    summary = summarize(records, make_run(kind="replay", processed=5, dropped=2))
    assert accuracy_rows(summary)[0][1] == "5 answered of 8 played, 4 with truth"


def test_a_report_without_truth_has_no_rows_of_dashes(tmp_path: Path) -> None:
    records = [FrameRecord(k, k, None, pose(k), state="TRACKING") for k in range(4)]
    with result_folder(tmp_path / "out", force=False):
        write_results(tmp_path / "out", records, make_run(), plots=False)
    for name in ("report.html", "report.md"):
        said = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "There is no ground truth: 4 of 4 frames have a pose" in said and "4, 0 with truth" in said
        for row in ("median position error", "within 5 cm", "false OK", "confidently wrong", "25 cm or 5 degrees"):
            assert row not in said
        assert "Truth: none" in said or "<td>truth</td><td>none</td>" in said


def test_the_verdict_names_what_is_wrong_and_what_was_left_out(tmp_path: Path) -> None:
    wrong = [FrameRecord(k, k, pose(k), pose(k, 0.3), state="TRACKING") for k in range(4)]
    said = verdict(wrong, left_out=3, left_out_first="'a.png' is cut off.", interrupted=True)
    assert set(said.values()) == {"bad", ""}
    text = " ".join(said)
    assert "0.0 % of the 4 frames" in text and "4 TRACKING poses are more than 10 cm off" in text
    assert "3 frames of the source could not be used" in text and "'a.png' is cut off." in text
    assert "Interrupted" in text
    write_results(tmp_path, wrong, make_run(left_out=3, left_out_first="<b>"), plots=False)
    assert json.loads((tmp_path / "summary.json").read_text())["left_out"] == 3
    page = (tmp_path / "report.html").read_text()
    assert page.index('class="verdict"') < page.index("<h2>Accuracy") and "<b>" not in page


def test_a_run_without_truth_tells_poses_and_no_dashes() -> None:
    records = [FrameRecord(k, k, None, pose(k), state="TRACKING", name=f"IMG_{k}.jpg") for k in range(3)]
    text = summary_table(summarize(records, make_run()))
    assert "no ground truth" in text and "with a pose" in text and "median position error" not in text
    rows = list(csv.DictReader(frames_csv(records).splitlines()))
    assert [row["name"] for row in rows] == ["IMG_0.jpg", "IMG_1.jpg", "IMG_2.jpg"] and rows[2]["tx_m"]


def test_the_path_is_drawn_with_start_direction_and_error() -> None:
    records = make_records()
    records[1] = FrameRecord(1, records[1].stamp_ns, pose(1), processed=False)
    figure = Figure()
    assert draw_trajectory(figure, records)
    axes, bar = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "truth", "estimate", "no pose: 1", "dropped: 1", "start",
    ]  # fmt: skip
    assert bar.get_ylabel() == "position error [cm]"
    scatter = next(item for item in axes.collections if item.get_array() is not None and len(item.get_array()) == 5)
    np.testing.assert_allclose(np.asarray(scatter.get_array()), 0.4)
    arrows = next(item for item in axes.collections if isinstance(item, Quiver))
    assert (np.asarray(arrows.U) > 0.99).all()  # the camera moves along x
