# SPDX-License-Identifier: Apache-2.0
"""``kfloc sources``: every kind with an example, short help elsewhere. ``kfloc check``: exit codes, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kfloc_ros.cli import main as cli
from kfloc_ros.cli.arguments import check_first
from kfloc_ros.cli.sources import EXAMPLES
from kfloc_ros.datasets import SOURCE_KINDS
from kfloc_ros.errors import SourceError
from kfloc_ros.mapping import source_check
from kfloc_ros.mapping.source_check import Finding, SourceCheck

WRONG = Finding("inverted", "error", "The poses map from the world to the camera.", "poses=world_to_camera")
DOUBTFUL = Finding("depth_unit", "warning", "Depth is 10 % too small.", "depth_scale=1.1", 1.1)


def test_every_kind_is_listed_with_its_files_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sources"]) == 0
    listing = capsys.readouterr().out
    assert set(EXAMPLES) == set(SOURCE_KINDS)
    words = " ".join(listing.split())
    for kind, text in SOURCE_KINDS.items():
        assert f"{kind}:PATH" in words and " ".join(text.split()) in words
        assert EXAMPLES[kind].strip("'").startswith(f"{kind}:") and f"example: {EXAMPLES[kind]}" in words


def test_one_kind_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sources", "tum"]) == 0
    listing = capsys.readouterr().out
    assert "rgb.txt" in listing and "7scenes" not in listing
    assert cli.main(["sources", "tumm"]) == 2


@pytest.mark.parametrize("command", ["localize", "map build", "bag make", "labels", "coordinates", "show cells"])
def test_the_help_of_a_command_names_the_kinds_and_does_not_describe_them(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "`kfloc sources`" in text and all(kind in text for kind in SOURCE_KINDS)
    assert not any(description[:60] in text for description in SOURCE_KINDS.values())


def test_a_wrong_source_names_the_likely_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kitchen" / "seq-01").mkdir(parents=True)
    (tmp_path / "kitchen" / "seq-01" / "image_list.txt").touch()

    def error_of(source: str) -> str:
        assert cli.main(["localize", source, "--map", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "Did you mean '7scenes:x'?" in error_of("7scene:x")
    assert "kinds: 7scenes" in error_of("qqq:x")
    assert f"Did you mean '{tmp_path / 'kitchen'}'?" in error_of(str(tmp_path / "kichen"))
    assert f"Did you mean '{tmp_path / 'kitchen' / 'seq-01'}'?" in error_of(str(tmp_path / "kitchen"))
    assert "Did you mean" not in error_of(str(tmp_path / "zzzzzzz"))


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
    assert cli.main(["check", "sim:map-quick", "--json", str(tmp_path / "check.json")]) == 1
    out = capsys.readouterr().out
    assert "error: The poses map" in out and "'?poses=world_to_camera&depth_scale=1.1'" in out
    told = json.loads((tmp_path / "check.json").read_text())
    assert [finding["kind"] for finding in told["findings"]] == ["inverted", "depth_unit"]


def test_warnings_give_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer(monkeypatch, DOUBTFUL)
    assert cli.main(["check", "sim:map-quick"]) == 0
    assert "warning: Depth" in capsys.readouterr().out
    answer(monkeypatch)
    assert cli.main(["check", "sim:map-quick"]) == 0
    assert "No mistake was found" in capsys.readouterr().out


def test_a_build_stops_at_an_error_and_only_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(monkeypatch, WRONG)
    assert cli.main(["map", "build", "sim:map-quick", "--out", str(tmp_path / "map")]) == 2
    err = capsys.readouterr().err
    assert "?poses=world_to_camera" in err and "--no-check" in err and not (tmp_path / "map").exists()
    asked = answer(monkeypatch, DOUBTFUL)
    check_first(object(), skip=False)  # type: ignore[arg-type]
    assert "Warning: Depth" in capsys.readouterr().err
    check_first(object(), skip=True)  # type: ignore[arg-type]
    assert len(asked) == 1
    with pytest.raises(SourceError):
        answer(monkeypatch, WRONG)
        check_first(object(), skip=False)  # type: ignore[arg-type]
