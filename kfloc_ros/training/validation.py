# SPDX-License-Identifier: Apache-2.0
"""Validation during training: a part of a source that is kept out of it, and the best weights so far."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfloc_ros.errors import WeightsError
from kfloc_ros.frames import FrameSource, Selection

BEST_FILE = "best.json"


@dataclass(frozen=True, eq=False)
class Parts:
    """A source in two."""

    training: FrameSource
    held_out: FrameSource | None
    """None where it would have fewer than two frames."""


def hold_out(source: FrameSource, share: float) -> Parts:
    """Keep the last ``share`` of the frames with poses out of training.

    They lie together, so that hardly one of them has a neighbour among the others.
    """
    if share <= 0:
        return Parts(source, None)
    posed = [k for k in range(len(source)) if source.pose(k) is not None]
    count = round(share * len(posed))
    if count < 2 or len(posed) - count < 2:
        return Parts(source, None)
    return Parts(Selection(source, posed[:-count]), Selection(source, posed[-count:]))


def mean_figures(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of figures over batches, under ``validation/``; a figure that is nowhere finite stays NaN."""
    means = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if math.isfinite(part.get(key, math.nan))]
        means[f"validation/{key}"] = sum(values) / len(values) if values else math.nan
    return means


@dataclass
class Best:
    """The lowest loss so far, and the step it was reached at; kept beside the weights.

    A training that is continued may find a best of a later step than its own: that of the run that was killed. Since
    it makes the same steps again and arrives at the same loss there, that best is right.
    """

    folder: Path
    loss: float = math.inf
    step: int = -1

    @classmethod
    def of(cls, folder: Path) -> Best:
        """Of a folder of a training, which may hold none.

        Raises:
            WeightsError: the file is damaged.
        """
        path = folder / BEST_FILE
        if not path.is_file():
            return cls(folder)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, float(values["loss"]), int(values["step"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"'{path}' is damaged ({error}); remove it, and the best is looked for anew.") from error

    def offer(self, loss: float, step: int, files: Mapping[Path, str], write: Callable[[Path, str], None]) -> bool:
        """Keep the weights if their loss is the lowest; say if it is.

        Args:
            loss: of the weights as they are now.
            step: of the training.
            files: that receive the weights, and which module's each does.
            write: writes a module's weights to a path.
        """
        if not loss < self.loss:
            return False
        for path, name in files.items():
            temporary = path.with_name(f".{path.name}.new")
            write(temporary, name)
            os.replace(temporary, path)
        self.loss, self.step = loss, step
        note = self.folder / f".{BEST_FILE}.new"
        note.write_text(json.dumps({"loss": loss, "step": step}) + "\n", encoding="utf-8")
        os.replace(note, self.folder / BEST_FILE)
        return True
