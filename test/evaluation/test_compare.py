# SPDX-License-Identifier: Apache-2.0
"""Two runs side by side, requirements, and the page that needs nothing beside it."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import ConfigError
from kfloc_ros.evaluation.compare import parse_requirement
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo
from kfloc_ros.geometry.lie import make_pose


def make_records(fails: int = 3) -> list[FrameRecord]:
    """Eight frames, 4 mm off; one fails."""
    return [
        FrameRecord(
            index=i,
            stamp_ns=10**18 + i * 10**8,
            truth=np.eye(4),
            estimate=None if i == fails else make_pose(np.eye(3), [0.004, 0, 0]),
            state="LOST" if i == fails else "TRACKING",
            covariance=1e-5 * np.eye(6),
            latency_ms=100.0,
        )
        for i in range(8)
    ]


def make_run(source: str = "7scenes:x", split: str = "blocks50:test") -> RunInfo:
    return RunInfo(
        kind="localize", command="kfloc localize ...", map="maps/x", source=source, poses="sfm", split=split,
        frames=None, hardware={"cpu": "x"}, received=8, processed=8, dropped=0, duration_s=1.0,
    )  # fmt: skip


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[str, str]:
    write_results(tmp_path / "a", make_records(), make_run(), plots=False)
    write_results(tmp_path / "b", make_records(fails=-1), make_run(split="other"), plots=False)
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_figures_changes_and_other_differences_are_printed(
    two_runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *two_runs, "--html", str(tmp_path / "c.html")]) == 0
    said = capsys.readouterr().out
    assert "within 5 cm, 5 deg" in said and "better" in said
    assert "split: blocks50:test / other" in said
    assert "within 5 cm, 5 deg" in (tmp_path / "c.html").read_text()


def test_of_different_frames_those_are_compared_that_both_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tmp_path / name) for name in "abc"]
    write_results(tmp_path / "a", make_records(), make_run(), plots=False)
    write_results(tmp_path / "b", make_records()[4:], make_run(), plots=False)  # without the one that fails
    assert main(["compare", *folders[:2], "--html", str(tmp_path / "c.html")]) == 0
    said = capsys.readouterr().out
    assert "different frames, 8 and 4: all figures are of the 4 that both have" in said
    assert "better" not in said and "worse" not in said
    row = next(line for line in said.splitlines() if line.startswith("within 5 cm, 5 deg"))
    assert row.split()[5:] == ["100", "%", "100", "%", "+0", "%"]
    assert "all figures are of the 4" in (tmp_path / "c.html").read_text()

    elsewhere = [replace(r, truth=make_pose(np.eye(3), [9.0, 0, 0]), estimate=None) for r in make_records()]
    write_results(tmp_path / "c", elsewhere, make_run(source="7scenes:y"), plots=False)
    assert main(["compare", folders[0], folders[2]]) == 2
    assert "no frame in common" in capsys.readouterr().err
    (tmp_path / "b" / "frames.csv").write_text("index,stamp_ns\n1,x\n")
    assert main(["compare", *folders[:2]]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_summary_that_is_nested_too_deeply_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text("[" * 100_000 + "]" * 100_000)
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requirement", "code", "said"),
    [
        ("recall.5cm_5deg>=0.9", 0, ""),
        ("change.recall.5cm_5deg>=-0.02", 0, ""),
        ("recall.5cm_5deg<0.5", 1, "recall.5cm_5deg is 1, but must be < 0.5"),
        ("streaming.recovery_s.p50<1", 1, "has no value"),
        ("recall.5cm>=0.9", 2, "similar: recall.5cm_5deg"),
        ("recall.5cm_5deg=0.9", 2, "is written FIGURE<=NUMBER"),
    ],
)
def test_requirements_decide_the_exit_code(
    two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str], requirement: str, code: int, said: str
) -> None:
    assert main(["compare", *two_runs, "--require", requirement]) == code
    assert said in capsys.readouterr().err


def test_a_folder_without_results_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "has no summary.json" in capsys.readouterr().err


def test_a_requirement_must_be_a_number() -> None:
    with pytest.raises(ConfigError):
        parse_requirement("latency_ms.p95<=1.2.3")


@pytest.mark.thorough
def test_the_page_is_whole_and_shows_the_worst_frames(tmp_path: Path) -> None:
    image = np.full((60, 80, 3), 90, np.uint8)
    asked: list[int] = []

    def images_of(records: Sequence[FrameRecord]) -> dict[int, np.ndarray]:
        asked.extend(record.index for record in records)
        return {record.stamp_ns: image for record in records[:2]}

    write_results(tmp_path, make_records(), make_run(source="<script>alert(1)</script>"), images_of=images_of)
    page = (tmp_path / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 2 and all(
        source.startswith("data:image/") for source in sources
    )
    assert "href=" not in page and "<script>" not in page
    assert asked[0] == 3, "the frame without a pose is the worst"
    assert "availability" in page and "NEES median" in page
