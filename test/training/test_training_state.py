# SPDX-License-Identifier: Apache-2.0
"""The log of a training: one JSON object a line, and TensorBoard's files where its writer can be imported."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from kfloc_ros.training.state import LOG_FILE, TrainingLog


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, list[tuple](), False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def lines(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_without_tensorboard_figures_go_to_the_json_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    with TrainingLog(tmp_path, 0) as log:
        log.add(50, {"loss": -1.25, "share": math.nan})
    assert lines(tmp_path) == [{"step": 50, "loss": -1.25, "share": None}]
    assert [path.name for path in tmp_path.iterdir()] == [LOG_FILE]


def test_with_tensorboard_a_continued_training_takes_back_what_the_killed_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    with TrainingLog(tmp_path, 0) as log:
        for step in (50, 100):
            log.add(step, {"loss": 1.0, "share": math.nan})
    with TrainingLog(tmp_path, 50) as log:
        log.add(100, {"loss": 2.0})
    first, second = Writer.made
    assert first.scalars == [("loss", 1.0, 50), ("loss", 1.0, 100)] and first.closed and second.closed
    assert (first.folder, first.purge_step, second.purge_step) == (str(tmp_path), None, 51)
    assert second.scalars == [("loss", 2.0, 100)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(50, 1.0), (100, 2.0)]
