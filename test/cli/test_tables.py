# SPDX-License-Identifier: Apache-2.0
"""Progress in a log file: whole lines, now and then."""

from __future__ import annotations

import pytest

from kfloc_ros.cli import tables
from kfloc_ros.cli.tables import LogLines, StageBars, progress_bar


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(50), unit="frame")) == list(range(50))
    assert capsys.readouterr().err == ""


def test_long_work_leaves_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    lines = LogLines()
    for second in range(0, 61, 5):
        now[0] = 100.0 + second
        lines.write(f"\r{second} %")
    assert capsys.readouterr().err == "20 %\n40 %\n60 %\n"


def test_stages_are_named_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    bars = StageBars()
    for share in (0.0, 0.5, 1.0):
        bars("read", share, "view 3 of 9")
    bars("train", 0.2)
    bars("done", 1.0)
    said = capsys.readouterr().err
    assert said.splitlines() == ["reading views ...", "training head ..."] and "\r" not in said
