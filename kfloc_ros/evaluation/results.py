# SPDX-License-Identifier: Apache-2.0
"""Writer of the result folder: summary.json, frames.csv, TUM files, report.md, report.html, plots.

Every file is written under a temporary name and then renamed, summary.json last, so a folder with a summary is always
complete.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.evaluation.metrics import pose_error, pose_errors, recall
from kfloc_ros.evaluation.offline import FrameRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
import csv
import io
import json
from typing import Any

from kfloc_ros.evaluation.offline import STAGES, STATISTICS
from kfloc_ros.evaluation.page import ImagesOf, page_text
from kfloc_ros.evaluation.report import report_text
from kfloc_ros.evaluation.summary import RunInfo, Summary, finite, summarize
from kfloc_ros.geometry.lie import matrix_to_quaternion
from kfloc_ros.messages.tum import tum_text
from kfloc_ros.types import Matrix

GAP_S = 0.5
"""Longest gap between frames that a line joins."""

TRUTH, FINAL, COARSE = "#444444", "#1565c0", "#ef6c00"


def write_plots(out: Path, records: Sequence[FrameRecord]) -> list[str]:
    """Write the PNG files that the records allow into ``out`` and return their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = []
    for name, draw in (
        ("trajectory.png", draw_trajectory),
        ("error.png", draw_error),
        ("recall.png", draw_recall),
        ("latency.png", draw_latency),
    ):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        if not draw(figure, records):
            continue
        FigureCanvasAgg(figure)
        partial = out / f".{name}.partial"
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, out / name)
        names.append(name)
    return names


def draw_trajectory(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw truth and estimates along the map axis closest to the images' vertical; return false without poses."""
    poses = [p for r in records for p in (r.truth, r.estimate) if p is not None]
    if not poses:
        return False
    down = int(np.argmax(np.abs(np.mean([pose[:3, 1] for pose in poses], axis=0))))
    a, b = (axis for axis in range(3) if axis != down)
    axes = figure.add_subplot()
    processed = [r for r in records if r.processed]
    for label, color, width, drawn, path in (
        ("truth", TRUTH, 3.0, records, [_centre(r.truth) for r in records]),
        ("estimate", FINAL, 1.2, processed, [_centre(r.estimate) for r in processed]),
    ):
        xyz = _break(drawn, np.array(path).reshape(-1, 3))
        style = {"alpha": 0.35} if label == "truth" else {"marker": ".", "markersize": 3}
        axes.plot(xyz[:, a], xyz[:, b], color=color, linewidth=width, label=label, **style)
    truth = np.array([_centre(r.truth) for r in records])
    if np.isfinite(truth).any():
        low, high = np.nanmin(truth, axis=0), np.nanmax(truth, axis=0)
        margin = 0.25 + 0.1 * float(np.max(high - low))
        centres = np.array([_centre(r.estimate) for r in records])
        outside = int(np.any((centres < low - margin) | (centres > high + margin), axis=1).sum())
        axes.set_xlim(low[a] - margin, high[a] + margin)
        axes.set_ylim(low[b] - margin, high[b] + margin)
        if outside:
            axes.text(0.02, 0.02, f"{outside} estimates lie outside", transform=axes.transAxes)
    axes.set_aspect("equal", adjustable="box")
    axes.set(xlabel=f"{'xyz'[a]} [m]", ylabel=f"{'xyz'[b]} [m]", title="Camera positions from above, map frame")
    _finish(axes)
    return True


def draw_error(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw position and rotation error of every frame with twice the standard deviation of the covariance."""
    dropped = [r.stamp_ns for r in records if r.truth is not None and not r.processed]
    known = [r for r in records if r.truth is not None and r.processed]
    if not known:
        return False
    seconds = (np.array([r.stamp_ns for r in known], dtype=np.float64) - known[0].stamp_ns) * 1e-9
    final = pose_errors(known)
    coarse = [pose_error(r.coarse, r.truth) for r in known if r.truth is not None]
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, unit, rows, values in (
        (upper, "cm", slice(0, 3), [[100 * e.translation_m for e in errors] for errors in (final, coarse)]),
        (lower, "deg", slice(3, 6), [[e.rotation_deg for e in errors] for errors in (final, coarse)]),
    ):
        scale = 100.0 if unit == "cm" else math.degrees(1.0)
        # The root of the summed variances is the expected length of the error vector.
        band = np.array(
            [
                np.nan if r.covariance is None else 2 * scale * math.sqrt(max(np.trace(r.covariance[rows, rows]), 0.0))
                for r in known
            ]
        )
        missing = np.array([r.estimate is None for r in known])
        rows_to_draw = np.column_stack([*values, band])
        rows_to_draw[missing, 0] = np.nan
        rows_to_draw[[r.coarse is None for r in known], 1] = np.nan
        times, lines = _break_times(known, seconds, rows_to_draw)
        axes.fill_between(times, 1e-3, lines[:, 2], color=FINAL, alpha=0.18, linewidth=0, label="2 sigma")
        axes.plot(times, lines[:, 1], ".", color=COARSE, markersize=3, label="coarse")
        axes.plot(times, lines[:, 0], color=FINAL, linewidth=1, marker=".", markersize=3, label="final")
        if missing.any():
            axes.plot(seconds[missing], np.full(missing.sum(), 0.02), "x", color="#c62828", label="no pose")
        if dropped:
            ticks = (np.array(dropped, dtype=np.float64) - known[0].stamp_ns) * 1e-9
            axes.plot(ticks, np.full(len(ticks), 0.012), "|", color="#999999", markersize=4, label="dropped")
        axes.set_yscale("log")
        axes.set_ylim(0.01, None)
        axes.set_ylabel(f"error [{unit}]")
        _finish(axes)
    upper.set_title("Error over time")
    lower.set_xlabel("time [s]")
    return True


def draw_recall(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw the share of frames within x centimetres and x degrees."""
    known = [r for r in records if r.truth is not None and r.processed]
    if not known:
        return False
    limits = np.geomspace(0.1, 50, 200)
    axes = figure.add_subplot()
    for label, color, errors in (
        ("final", FINAL, pose_errors(known)),
        ("coarse", COARSE, pose_errors(known, coarse=True)),
    ):
        axes.plot(limits, [100 * recall(errors, x / 100, x) for x in limits], color=color, label=label)
    for mark in (1, 2, 5):
        axes.axvline(mark, color="#999999", linewidth=0.7, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set(xlabel="threshold x [cm and deg]", ylabel="frames within [%]", ylim=(0, 101), title="Recall")
    _finish(axes)
    return True


def draw_latency(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw the stage times of every frame, stacked, and the distribution of the latency."""
    timed = [r for r in records if r.processed and r.latency_ms is not None]
    if not timed:
        return False
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    stages = [s for s in dict.fromkeys(key for r in timed for key in r.timings_ms) if s != "total"]
    if stages:
        stack = np.array([[r.timings_ms.get(stage, 0.0) for r in timed] for stage in stages])
        left.stackplot(np.arange(len(timed)), stack, labels=stages, alpha=0.75, linewidth=0)
    latency = np.array([r.latency_ms for r in timed], dtype=np.float64)
    left.plot(latency, color=TRUTH, linewidth=0.8, label="latency")
    left.set(xlabel="processed frame", ylabel="time [ms]", title="Stages and latency")
    left.set_ylim(0, 1.3 * float(np.percentile(latency, 99)))
    _finish(left)
    right.plot(np.sort(latency), np.linspace(0, 100, len(latency)), color=FINAL)
    for percent in (50, 95, 99):
        right.axhline(percent, color="#999999", linewidth=0.7, linestyle=":")
    right.set(xlabel="latency [ms]", ylabel="frames below [%]", ylim=(0, 101))
    right.grid(alpha=0.25)
    return True


def _centre(pose: NDArray[np.float64] | None) -> NDArray[np.float64]:
    return np.full(3, np.nan) if pose is None else pose[:3, 3]


def _gaps(records: Sequence[FrameRecord]) -> NDArray[np.intp]:
    stamps = np.array([r.stamp_ns for r in records], dtype=np.int64)
    return np.flatnonzero(np.diff(stamps) > GAP_S * 1e9) + 1


def _break(records: Sequence[FrameRecord], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows with a row of NaN at every gap in the recording."""
    return np.insert(rows, _gaps(records), np.nan, axis=0)


def _break_times(
    records: Sequence[FrameRecord], seconds: NDArray[np.float64], rows: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    gaps = _gaps(records)
    return np.insert(seconds, gaps, seconds[gaps - 1] if len(gaps) else []), np.insert(rows, gaps, np.nan, axis=0)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small", framealpha=0.7)


def write_results(
    out: Path, records: Sequence[FrameRecord], run: RunInfo, *, plots: bool = True, images_of: ImagesOf | None = None
) -> Summary:
    """Evaluate the records and write the result folder, which is created if missing.

    Args:
        out: the folder.
        records: records of the run.
        run: description of the run.
        plots: draw the pictures.
        images_of: returns the images of the worst frames for ``report.html``; None: no images.

    Raises:
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    summary = summarize(records, run)
    _write(out / "frames.csv", frames_csv(records))
    _write(out / "trajectory.tum", tum_text((r.stamp_ns, r.estimate) for r in records if r.processed))
    _write(out / "groundtruth.tum", tum_text((r.stamp_ns, r.truth) for r in records))
    pictures = write_plots(out, records) if plots else []
    _write(out / "report.md", report_text(summary, records, pictures))
    _write(out / "report.html", page_text(summary, records, out, pictures, images_of))
    _write(out / "summary.json", json.dumps(summary.to_dict(), indent=2, allow_nan=False) + "\n")
    return summary


def frames_csv(records: Sequence[FrameRecord]) -> str:
    """Return one line a frame, with the same columns for every kind of run; empty where a frame has no value."""
    stats = list(dict.fromkeys((*STATISTICS, *(key for record in records for key in record.stats))))
    stages = list(dict.fromkeys((*STAGES, *(key for record in records for key in record.timings_ms))))
    rows = [_row(record) for record in records]
    buffer = io.StringIO()
    columns = [*_row(FrameRecord(0, 0, None)), *stats, *(f"{stage}_ms" for stage in stages)]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for record, row in zip(records, rows, strict=True):
        row.update(record.stats)
        row.update({f"{stage}_ms": round(value, 3) for stage, value in record.timings_ms.items()})
        writer.writerow({key: "" if value is None else value for key, value in finite(row).items()})
    return buffer.getvalue()


def _row(record: FrameRecord) -> dict[str, Any]:
    error = None if record.truth is None else pose_error(record.estimate, record.truth)
    coarse = None if record.truth is None else pose_error(record.coarse, record.truth)
    pose = [None] * 7 if record.estimate is None else _vector(record.estimate)
    sigma = [None] * 6 if record.covariance is None else np.sqrt(np.abs(np.diag(record.covariance))).tolist()
    return {
        "index": record.index,
        "stamp_ns": record.stamp_ns,
        "processed": int(record.processed),
        "state": record.state,
        "reason": record.reason,
        "translation_error_m": None if error is None else error.translation_m,
        "rotation_error_deg": None if error is None or record.estimate is None else error.rotation_deg,
        "coarse_translation_error_m": None if coarse is None else coarse.translation_m,
        "coarse_rotation_error_deg": None if coarse is None or record.coarse is None else coarse.rotation_deg,
        "latency_ms": record.latency_ms,
        **dict(zip(("tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw"), pose, strict=True)),
        **dict(zip(("sigma_tx_m", "sigma_ty_m", "sigma_tz_m"), sigma[:3], strict=True)),
        **dict(zip(("sigma_rx_rad", "sigma_ry_rad", "sigma_rz_rad"), sigma[3:], strict=True)),
    }


def _vector(T_map_camera: Matrix) -> list[Any]:
    return [*T_map_camera[:3, 3].tolist(), *matrix_to_quaternion(T_map_camera[:3, :3]).tolist()]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
