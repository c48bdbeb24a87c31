# SPDX-License-Identifier: Apache-2.0
"""The table of features: every file, test and command that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kfloc_ros.cli.main import COMMANDS
from kfloc_ros.config import options_of
from kfloc_ros.pixloc.hloc.options import RunOptions
from kfloc_ros.training.kfnet_config import TrainConfig
from kfloc_ros.training.pixloc_stages import PixLocTrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parity.md"
HEADER = 2
PIXLOC = {item.name for item in options_of(PixLocTrainConfig)}
KFNET = {item.name for item in options_of(TrainConfig)}
OPTIONS = {
    "pixloc run": {"experiment", *(item.name for item in options_of(RunOptions))},
    "train pixloc": PIXLOC,
    "train scoordnet": KFNET,
    "train kfnet": KFNET,
}
"""Names that stand before ``=``, by command."""


def rows() -> list[list[str]]:
    found = []
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        found += [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[HEADER:]]
    return found


def test_the_table_is_whole() -> None:
    features = [row[0] for row in rows()]
    assert len(features) >= 130
    assert len(features) == len(set(features))
    assert {len(row) for row in rows()} == {4}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_files_tests_and_commands_of_a_feature_are_there(row: list[str]) -> None:
    _, command, files, tests = row
    for name in re.findall(r"`([^`]+)`", files):
        assert any((folder / name).is_file() for folder in (ROOT / "kfloc_ros", ROOT)), name
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    for name in named:
        assert (ROOT / "test" / name).is_file(), name
    for words in (text.split() for text in re.findall(r"`([^`]+)`", command)):
        if words[0] == "kfloc":
            assert words[1] in COMMANDS, words
            options = OPTIONS.get(" ".join(words[1:3]))
            if options is not None:
                assert {word.split("=")[0] for word in words[3:] if re.match("[a-z_]+=", word)} <= options, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
