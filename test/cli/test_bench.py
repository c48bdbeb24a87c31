# SPDX-License-Identifier: Apache-2.0
"""``kfloc bench``: what is measured, and the text that is posted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfloc_ros.cli import main as cli
from kfloc_ros.cli.bench import as_text, bench
from kfloc_ros.maps.scene_map import SceneMap


def test_times_ratios_and_errors_of_the_same_frames_are_told(
    room_map: Path, room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    frames = [room[i] for i in range(5)]
    report = bench(SceneMap.load(room_map), frames, [1], "cpu") | {"source": "sim:test", "map": "room"}
    assert set(report["rows"]) == {"1 threads, default", "1 threads, tracking"}
    for row in report["rows"].values():
        assert row["frames"] == 5 and row["frame_p95_ms"] >= row["frame_ms"] > 0
        assert row["ratio"] == pytest.approx(row["frame_ms"] / row["backbone_float32_ms"])
        assert row["within_percent"]["5 cm, 5 deg"] == 100.0 and row["median_cm"] < 1.0
        assert {"backbone", "refine"} <= set(row["stages_ms"]) and row["memory_mib"] > 50
    text = as_text(json.loads(json.dumps(report)))
    assert "processor: " in text and "| 1 threads, tracking |" in text and "measured now" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith(("| run", "| 1 threads, default | "))}
    assert len(widths) == 2  # of the two tables
    assert (tmp_path / "kfloc_ros" / "runtimes.json").is_file()


def test_numbers_that_measure_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--count", "1"]) == 2
    assert "--count must be at least 2" in capsys.readouterr().err
