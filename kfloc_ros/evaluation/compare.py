# SPDX-License-Identifier: Apache-2.0
"""Comparison of two result folders, and requirements on a run, written as ``latency_ms.p95<=100``, for use in CI."""

from __future__ import annotations

import csv
import difflib
import io
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.errors import ConfigError, SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.page import document, escape, table
from kfloc_ros.evaluation.summary import RunInfo, summarize
from kfloc_ros.files import read_json, read_text
from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix
from kfloc_ros.messages.poses import read_tum
from kfloc_ros.types import Matrix

FIGURES: tuple[tuple[str, str, float, str, int], ...] = (
    ("frames", "frames", 1, "", 0),
    ("localized", "localized", 1, "", 1),
    ("median_translation_m", "median position error", 100, "cm", -1),
    ("median_rotation_deg", "median rotation error", 1, "deg", -1),
    ("recall.1cm_1deg", "within 1 cm, 1 deg", 100, "%", 1),
    ("recall.2cm_2deg", "within 2 cm, 2 deg", 100, "%", 1),
    ("recall.5cm_5deg", "within 5 cm, 5 deg", 100, "%", 1),
    ("recall.25cm_2deg", "within 25 cm, 2 deg", 100, "%", 1),
    ("streaming.availability", "availability", 100, "%", 1),
    ("streaming.time_to_first_pose_s", "time to first pose", 1, "s", -1),
    ("streaming.false_ok", "false OK", 100, "%", -1),
    ("streaming.recovery_s.p50", "recovery p50", 1, "s", -1),
    ("streaming.recovery_s.p95", "recovery p95", 1, "s", -1),
    ("consistency.nees_median", "NEES median (5.35 is right)", 1, "", 0),
    ("latency_ms.p50", "latency p50", 1, "ms", -1),
    ("latency_ms.p95", "latency p95", 1, "ms", -1),
    ("throughput_hz", "throughput", 1, "Hz", 1),
    ("dropped", "dropped", 1, "", -1),
)
"""Path in summary.json, name, factor and unit for display, and sense: more is better (1), worse (-1) or neither (0)."""


MAX_SUMMARY_BYTES = 10_000_000
DESCRIPTION_KEYS = ("kind", "source", "poses", "split", "frame_selection", "map", "kfloc_version", "hardware")


@dataclass(frozen=True)
class Row:
    """Figure of two runs, as text."""

    name: str
    first: str
    second: str
    change: str
    verdict: int
    """1: the second run is better; -1: worse; 0: equal, or neither."""


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the content of ``summary.json`` of a result folder.

    Raises:
        SourceError: the file is missing or damaged.
    """
    path = folder / "summary.json" if folder.is_dir() else folder
    try:
        content = read_json(path, MAX_SUMMARY_BYTES)
    except FileNotFoundError:
        raise SourceError(
            f"'{folder}' has no summary.json; it is not a result folder, or its run did not end."
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"'{path}' is not a summary of this package.")
    return content


@dataclass(frozen=True)
class Common:
    """Two runs, reduced to the frames that both have."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    note: str
    """Sentence on the frames that were compared; empty if both runs have the same frames."""


NOT_OF_COMMON_FRAMES = ("throughput_hz", "dropped", "consistency", "coarse", "played")
"""Entries of a summary that cannot be computed for a part of the frames."""
SAME_TRUTH_M = 0.5
"""Distance between the truths of two runs from which on a stamp does not stand for the same frame."""


def on_common_frames(folders: tuple[Path, Path]) -> Common:
    """Return the summaries of two result folders, computed over their common frames if the frames differ.

    Frames are the same if their stamps are, and the truths, where both have one, are less than 0.5 m apart.

    Raises:
        SourceError: a folder has no results, or the runs have no frame in common.
    """
    summaries = [read_summary(folder) for folder in folders]
    if not all((folder / "frames.csv").is_file() for folder in folders):
        return Common(summaries[0], summaries[1], "")
    records = [read_records(folder) for folder in folders]
    stamps = [{record.stamp_ns: record for record in run} for run in records]
    common = stamps[0].keys() & stamps[1].keys()
    apart = [
        float(np.linalg.norm(a.truth[:3, 3] - b.truth[:3, 3]))
        for stamp in common
        if (a := stamps[0][stamp]).truth is not None and (b := stamps[1][stamp]).truth is not None
    ]
    if not common or (apart and np.median(apart) > SAME_TRUTH_M):
        raise SourceError(
            f"'{folders[0]}' and '{folders[1]}' have no frame in common, so they cannot be compared: "
            f"{summaries[0].get('source')} and {summaries[1].get('source')}."
        )
    if len(common) == len(stamps[0]) == len(stamps[1]):
        return Common(summaries[0], summaries[1], "")
    parts = []
    for summary, run in zip(summaries, records, strict=True):
        chosen = [record for record in run if record.stamp_ns in common]
        info = RunInfo(
            summary.get("kind", ""), "", "", "", "", None, None, {}, len(chosen), len(chosen), 0, duration_s=math.nan
        )
        figures = summarize(chosen, info).to_dict()
        kept = {key: value for key, value in figures.items() if key in summary and key not in NOT_OF_COMMON_FRAMES}
        told = {key: summary.get(key) for key in (*DESCRIPTION_KEYS, "options")}
        parts.append({**kept, **told})
    note = (
        f"The runs have different frames, {len(stamps[0])} and {len(stamps[1])}: all figures are of the {len(common)} "
        "that both have."
    )
    return Common(parts[0], parts[1], note)


def read_records(folder: Path) -> list[FrameRecord]:
    """Return the records of a result folder from ``frames.csv`` and ``groundtruth.tum``; covariances are left out.

    Raises:
        SourceError: a file is missing or damaged.
    """
    path = folder / "frames.csv"
    try:
        truth = read_tum(folder / "groundtruth.tum") if (folder / "groundtruth.tum").is_file() else {}
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
        return [_record(row, truth) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise SourceError(f"'{path}' is damaged: {error}. Run the command again.") from error


def _record(row: Mapping[str, str], truth: Mapping[int, Matrix]) -> FrameRecord:
    pose = [float(row[name]) for name in ("tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw") if row[name]]
    stamp_ns = int(row["stamp_ns"])
    return FrameRecord(
        int(row["index"]),
        stamp_ns,
        truth.get(stamp_ns),
        make_pose(quaternion_to_matrix(pose[3:]), pose[:3]) if len(pose) == 7 else None,
        state=row["state"],
        reason=row["reason"],
        latency_ms=float(row["latency_ms"]) if row["latency_ms"] else None,
        processed=row["processed"] == "1",
    )


def compare_rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """Return a row for every figure that one of the two runs has."""
    a, b = figures_of(first), figures_of(second)
    rows = []
    for path, name, factor, unit, sense in FIGURES:
        left, right = a.get(path), b.get(path)
        if left is None and right is None:
            continue
        change = math.nan if left is None or right is None else (right - left) * factor
        verdict = 0 if not change or math.isnan(change) else sense * (1 if change > 0 else -1)
        shown = "-" if math.isnan(change) else f"{change:+.4g} {unit}".rstrip()
        rows.append(Row(name, _shown(left, factor, unit), _shown(right, factor, unit), shown, verdict))
    return rows


def with_changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the second run, and ``change.FIGURE``, second minus first, where both have one."""
    a, b = figures_of(first), figures_of(second)
    changes = {}
    for path in a.keys() & b.keys():
        left, right = a[path], b[path]
        changes[f"change.{path}"] = None if left is None or right is None else right - left
    return {**b, **changes}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return other differences that make figures incomparable: map, source, truth, hardware, options."""
    found = []
    for key in (*DESCRIPTION_KEYS, "options"):
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k) and not isinstance(a.get(k), Mapping)]
            found += [f"{key}.{k}: {a.get(k)} / {b.get(k)}" for k in parts]
        elif a != b:
            found.append(f"{key}: {a} / {b}")
    return found


def compare_page(names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any], note: str = "") -> str:
    """Return the comparison as one HTML page, with a note on top."""
    css = {1: "good", -1: "bad", 0: ""}
    rows = [
        (escape(r.name), escape(r.first), escape(r.second), f'<span class="{css[r.verdict]}">{escape(r.change)}</span>')
        for r in compare_rows(first, second)
    ]
    a, b = (escape(name) for name in names)
    others = "".join(f"<li>{escape(text)}</li>" for text in differences(first, second)) or "<li>nothing</li>"
    head = [f"<h1>{a} and {b}</h1>", *([f'<p class="bad">{escape(note)}</p>'] if note else [])]
    parts = [*head, table(rows, ("", a, b, "change"), raw=True)]
    return document(f"{names[0]} and {names[1]}", [*parts, "<h2>What else differs</h2>", f"<ul>{others}</ul>"])


def _shown(value: float | None, factor: float, unit: str) -> str:
    return "-" if value is None else f"{value * factor:.4g} {unit}".rstrip()


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Requirement:
    """Limit of one figure of ``summary.json``, named by its path."""

    path: str
    relation: str
    limit: float

    def failure(self, figures: Mapping[str, Any]) -> str:
        """Return the reason why figures do not meet the limit, or an empty string; a null figure does not meet it.

        Raises:
            ConfigError: there is no such figure.
        """
        value = figure(figures, self.path)
        if value is None:
            return f"{self.path} has no value, but must be {self.relation} {self.limit:g}."
        if _OPERATORS[self.relation](value, self.limit):
            return ""
        return f"{self.path} is {value:.6g}, but must be {self.relation} {self.limit:g}."


def parse_requirement(text: str) -> Requirement:
    """Read ``recall.5cm_5deg>=0.95``.

    Raises:
        ConfigError: the text does not have this form.
    """
    match = _FORM.fullmatch(text)
    try:
        if match is not None:
            return Requirement(match[1], match[2], float(match[3]))
    except ValueError:
        pass
    raise ConfigError(f"A requirement is written FIGURE<=NUMBER, such as latency_ms.p95<=100, not '{text}'.")


def figures_of(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return every number of a summary by its path; null figures are None."""
    found: dict[str, float | None] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            found |= figures_of(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            found[prefix + key] = float(value)
        elif value is None or isinstance(value, int | float):
            found[prefix + key] = value
    return found


def figure(summary: Mapping[str, Any], path: str) -> float | None:
    """Return one number of a summary.

    Raises:
        ConfigError: there is no such figure; the message names similar ones.
    """
    figures = figures_of(summary)
    if path not in figures:
        near = difflib.get_close_matches(path, figures, n=3, cutoff=0.3)
        raise ConfigError(f"The summary has no figure '{path}'; similar: {', '.join(near) or 'none'}.")
    return figures[path]
