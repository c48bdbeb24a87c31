# SPDX-License-Identifier: Apache-2.0
"""What commands print: aligned tables, descriptions of maps, and progress as bars or as lines of a log file."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from kfloc_ros.evaluation.summary import Summary
    from kfloc_ros.mapping.build import BuildProgress


def format_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Return left-aligned columns, two spaces apart, with a rule under the header."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if header:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def summary_table(summary: Summary) -> str:
    """Return the accuracy and timing tables of a run."""
    from kfloc_ros.evaluation.report import accuracy_rows, timing_rows, transform_text

    rows = accuracy_rows(summary)
    if not summary.accuracy.frames:
        return _table_without_truth(summary)
    scope = "processed frames" if summary.run.kind == "replay" else "frames"
    accuracy = format_table(
        rows, header=(f"{summary.run.source}, ground truth: {summary.run.poses}", "final pose", "coarse")
    )
    lines = [accuracy, "", format_table(timing_rows(summary))]
    if summary.played is not None:
        lines += [
            "",
            f"Recall is over {scope}; report.md has the recall over all {summary.played.frames} played frames.",
        ]
    if summary.run.transform is not None:
        lines.append(f"map -> camera on TF at the images' times: median {transform_text(summary.run.transform)}.")
    return "\n".join(lines)


def _table_without_truth(summary: Summary) -> str:
    from kfloc_ros.evaluation.report import timing_rows

    left_out = [("left out, unusable", str(summary.run.left_out))] if summary.run.left_out else []
    played = [("played", str(summary.frames_played))] if summary.played is not None else []
    rows = [*played, ("frames", str(summary.frames)), ("with a pose", str(summary.localized)), *left_out]
    return "\n".join(
        [
            f"{summary.run.source} has no ground truth: no error is known."
            if summary.run.processed
            else "No image was processed: no error is known.",
            format_table([*rows, *timing_rows(summary)]),
        ]
    )


def describe(scene_map: Any) -> str:
    """Return a description of a map as aligned lines."""
    from kfloc_ros.kfnet.scoordnet import heads_of

    camera, c = scene_map.camera, scene_map.calibration
    low, high = scene_map.bounds_m
    points, sessions = sum(len(view) for view in scene_map.references.views), _sessions(scene_map.references.sessions)
    size = " x ".join(f"{b - a:.1f}" for a, b in zip(low, high, strict=True))
    rows = {
        "map": f"{scene_map.name} ({scene_map.path}, {scene_map.size_bytes() / 1e6:.1f} MB)",
        "frame": scene_map.frame_id,
        "family": scene_map.family + (", converted weights" if scene_map.kfnet and scene_map.kfnet.converted else ""),
        "camera": (
            f"{camera.width}x{camera.height}, f {camera.fx:.1f} {camera.fy:.1f}, c {camera.cx:.1f} {camera.cy:.1f} px"
        ),
        "extent": f"{size} m",
        "references": f"{len(scene_map.references.ids)} views, {points} points{sessions}",
        "heads": f"{len(heads_of(scene_map.head))}, of {scene_map.head.blocks} blocks of {scene_map.head.width}",
        "calibration": (
            f"variance x{c.measurement_variance_scale:.2f}, flow temperature {c.flow_temperature:g}, process "
            f"x{c.process_scale:.2f}, alignment cost <= {c.max_alignment_cost:.3f}, inlier ratio >= "
            f"{c.min_inlier_ratio:.2f}"
        ),
        "own error": f"{100 * c.own_error_m:.1f} cm, {math.degrees(c.own_error_rad):.2f} deg on each axis (sigma)",
        **_flow(c.learned_process_scale),
        **_rough_views(c.roughness),
        **{key.replace("_", " "): str(value) for key, value in scene_map.provenance.items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def _sessions(sessions: Sequence[int]) -> str:
    """Return the number of views of each session as text; empty if there is one."""
    counts = [f"{sessions.count(k)}" for k in sorted(set(sessions))]
    return f"; of {len(counts)} sessions: {', '.join(counts)} views" if len(counts) > 1 else ""


def _flow(learned_process_scale: float | None) -> dict[str, str]:
    """Row on a map that cannot use the flow network."""
    if learned_process_scale is not None:
        return {}
    return {"flow": "cost volume alone: the process noise was not calibrated for the network; build the map again"}


def _rough_views(scale: Any) -> dict[str, str]:
    """Return the growth of variances away from the mapped views as text; empty if there is none."""
    if scale is None:
        return {}
    return {"rough views": f"variance x (roughness / {100 * scale.usual_m:.1f} cm) ^ {scale.power:.2f}"}


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
