# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: bars in a terminal, a line now and then in a log file."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from kfloc_ros.mapping.build import BuildProgress

LINE_PERIOD_S = 20.0
"""Shortest time between two lines of progress in a log file; shorter work leaves none."""
LINE = "{desc}{percentage:3.0f} %, {unit} {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
TITLES = {
    "adjust": "adjusting poses",
    "read": "reading views",
    "train": "training head",
    "calibrate": "calibrating",
    "place": "placing",
    "compare": "comparing",
}
DONE = "done"


class LogLines(io.TextIOBase):
    """Text stream for ``tqdm`` that writes whole lines to stderr, rarely, in place of a bar that redraws itself."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def write(self, text: str, /) -> int:
        """Write a state of the bar as a line, if the last one is old enough."""
        line, now_s = text.strip("\r\n "), time.monotonic()
        if line and now_s - self._last_s >= LINE_PERIOD_S:
            self._last_s = now_s
            print(line, file=sys.stderr, flush=True)
        return len(text)


def progress_bar(iterable: Iterable[Any] | None = None, *, lines: LogLines | None = None, **options: Any) -> tqdm[Any]:
    """Return a bar of ``tqdm``; where stderr is no terminal, it writes a line now and then.

    Args:
        iterable: what is iterated; None: the caller updates the bar.
        lines: stream of the lines, shared by several bars.
        options: of ``tqdm``.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    layout = {"bar_format": LINE} if options.get("total") or hasattr(iterable, "__len__") else {}
    return tqdm(iterable, **{**options, "file": lines or LogLines(), "mininterval": 1.0, **layout})


class StageBars:
    """Progress bars, one per stage, titled by ``TITLES`` or by the stage's name."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}
        self._lines = LogLines()

    def __call__(self, stage: str, share_done: float, text: str = "") -> None:
        """Update the bar of a stage; a new stage completes the others."""
        if stage not in self._bars:
            for bar in self._bars.values():
                bar.update(bar.total - bar.n)
                bar.close()
            if stage == DONE:
                return
            title = TITLES.get(stage, stage)
            if not sys.stderr.isatty():
                print(f"{title} ...", file=sys.stderr, flush=True)
            layout = "{desc:16} {percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left{postfix}"
            if not sys.stderr.isatty():
                layout = "{desc:16} {percentage:3.0f} %, {elapsed} elapsed, {remaining} left{postfix}"
            self._bars[stage] = progress_bar(total=1.0, desc=title, lines=self._lines)
            self._bars[stage].bar_format = layout
        bar = self._bars[stage]
        bar.set_postfix_str(text, refresh=False)
        bar.update(share_done - bar.n)


class BuildBars:
    """Progress bars of a build."""

    def __init__(self) -> None:
        self._bars = StageBars()

    def __call__(self, progress: BuildProgress) -> None:
        """Update the bar of the build's current stage."""
        self._bars(progress.stage, progress.share_done, progress.text)
