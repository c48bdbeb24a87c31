# SPDX-License-Identifier: Apache-2.0
"""``kfloc check`` and the check at the start of a build: exit codes, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfloc_ros.cli import check as command
from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.mapping import source_check
from kfloc_ros.mapping.source_check import Finding, SourceCheck

WRONG = Finding("inverted", "error", "The poses map from the world to the camera.", "poses=world_to_camera")
DOUBTFUL = Finding("depth_unit", "warning", "Depth is 10 % too small.", "depth_scale=1.1", 1.1)


def answer(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> list[object]:
    asked: list[object] = []

    def check(source: object, **options: object) -> SourceCheck:
        asked.append(source)
        return SourceCheck("office", findings, {"pairs": 20})

    monkeypatch.setattr(source_check, "check_source", check)
    return asked


def test_errors_give_exit_code_1_and_the_words_to_add(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(monkeypatch, WRONG, DOUBTFUL)
    assert main(["check", "sim:map-quick", "--json", str(tmp_path / "check.json")]) == 1
    out = capsys.readouterr().out
    assert "error: The poses map" in out and "'?poses=world_to_camera&depth_scale=1.1'" in out
    told = json.loads((tmp_path / "check.json").read_text())
    assert [finding["kind"] for finding in told["findings"]] == ["inverted", "depth_unit"]


def test_warnings_give_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer(monkeypatch, DOUBTFUL)
    assert main(["check", "sim:map-quick"]) == 0
    assert "warning: Depth" in capsys.readouterr().out
    answer(monkeypatch)
    assert main(["check", "sim:map-quick"]) == 0
    assert "No mistake was found" in capsys.readouterr().out


def test_a_build_stops_at_an_error_and_only_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(monkeypatch, WRONG)
    assert main(["map", "build", "sim:map-quick", "--out", str(tmp_path / "map")]) == 2
    err = capsys.readouterr().err
    assert "?poses=world_to_camera" in err and "--no-check" in err and not (tmp_path / "map").exists()
    asked = answer(monkeypatch, DOUBTFUL)
    command.check_first(object(), skip=False)  # type: ignore[arg-type]
    assert "Warning: Depth" in capsys.readouterr().err
    command.check_first(object(), skip=True)  # type: ignore[arg-type]
    assert len(asked) == 1
    with pytest.raises(SourceError):
        answer(monkeypatch, WRONG)
        command.check_first(object(), skip=False)  # type: ignore[arg-type]
