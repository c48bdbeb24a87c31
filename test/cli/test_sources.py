# SPDX-License-Identifier: Apache-2.0
"""``kfloc sources``: every kind with an example; short help elsewhere; errors that name the likely fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfloc_ros.cli import main as cli
from kfloc_ros.cli.sources import EXAMPLES
from kfloc_ros.datasets import SOURCE_KINDS


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
