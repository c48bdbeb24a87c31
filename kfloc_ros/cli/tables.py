# SPDX-License-Identifier: Apache-2.0
"""Plain aligned tables for the terminal; they read the same in a log file."""

from __future__ import annotations

from collections.abc import Sequence

from kfloc_ros.evaluation.report import accuracy_rows, timing_rows, transform_text
from kfloc_ros.evaluation.summary import Summary


def format_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None) -> str:
    """Left-aligned columns, two spaces apart, with a rule under the header."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if header:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def summary_table(summary: Summary) -> str:
    """The accuracy and timing tables of a run."""
    rows = accuracy_rows(summary)
    scope = "processed frames" if summary.run.kind == "replay" else "frames"
    accuracy = format_table(rows, header=(f"{summary.run.source}, truth: {summary.run.poses}", "final pose", "coarse"))
    lines = [accuracy, "", format_table(timing_rows(summary))]
    if summary.played is not None:
        lines += ["", f"Recall is over {scope}; over all {summary.played.frames} played see report.md."]
    if summary.run.transform is not None:
        lines.append(f"map -> camera on TF at the images' times: median {transform_text(summary.run.transform)}.")
    return "\n".join(lines)
