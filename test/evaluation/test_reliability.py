# SPDX-License-Identifier: Apache-2.0
"""Reliability: confidences and covariances against errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.evaluation.metrics import auroc, reliability
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.types import TrackingState


def record(k: int, error_m: float, confidence: float, sigma_m: float = 0.01) -> FrameRecord:
    return FrameRecord(
        k,
        k * 10**8,
        np.eye(4),
        estimate=make_pose(np.eye(3), np.array([error_m, 0.0, 0.0])),
        state=TrackingState.TRACKING.value,
        covariance=np.eye(6) * sigma_m**2,
        stats={"confidence": confidence},
    )


def test_confidences_that_are_shares_of_right_poses_are_calibrated() -> None:
    records = [record(k, 0.5 if k % 4 == 0 else 0.01, 0.75) for k in range(40)]
    result = reliability(records)
    assert result is not None and result.right_share == 0.75
    assert result.calibration_error == pytest.approx(0.0)
    assert result.confidence_auroc == pytest.approx(0.5)
    assert result.catastrophic_share == 0.25
    assert [(b.low, b.frames) for b in result.bins] == [(0.7, 40)]


def test_a_confidence_that_tells_wrong_poses_keeps_the_right_ones() -> None:
    records = [record(k, 0.01, 0.9 + 0.001 * k) for k in range(30)] + [record(k, 1.0, 0.2, 0.5) for k in range(10)]
    result = reliability(records)
    assert result is not None
    assert result.confidence_auroc == 1.0 and result.sigma_auroc == 1.0
    kept = dict(result.risk_coverage)
    assert kept[0.5] == 0.0 and kept[1.0] == pytest.approx(0.25)
    assert result.risk_coverage_area + result.precision_area == pytest.approx(1.0)


def test_the_area_under_the_curve_counts_equal_scores_half() -> None:
    scores = np.array([0.1, 0.5, 0.5, 0.9])
    assert auroc(scores, np.array([False, True, False, True])) == pytest.approx(3.5 / 4)
    assert auroc(scores, np.ones(4, dtype=bool)) is None


def test_records_without_confidence_have_no_reliability_and_others_reach_the_report(tmp_path: Path) -> None:
    assert reliability([FrameRecord(0, 0, np.eye(4), estimate=np.eye(4))]) is None
    run = RunInfo("localize", "c", "m", "s", "file", None, None, {}, 8, 8, 0, 1.0)
    records = [record(k, 0.01 if k else 1.0, 0.9 if k else 0.3) for k in range(8)]
    write_results(tmp_path, records, run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reliability"]["confidence_auroc"] == 1.0
    assert "## Confidence" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "reliability.png").is_file()
    assert (tmp_path / "frames.csv").read_text().splitlines()[0].count("confidence") == 1
