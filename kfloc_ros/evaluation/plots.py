# SPDX-License-Identifier: Apache-2.0
"""Pictures of the result folder: path, errors, recall, latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.evaluation.metrics import Reliability, pose_error, pose_errors, recall, reliability
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = ("trajectory.png", "error.png", "recall.png", "latency.png", "reliability.png")
ARROWS = 12
"""Number of arrows that show the direction along a path."""
WORST_SHOWN_CM = 10.0
"""Error at the end of the colour scale of the path."""
GAP_S = 0.5
"""Longest gap between frames that a line joins."""

TRUTH, FINAL, COARSE = "#444444", "#1565c0", "#ef6c00"


def write_plots(out: Path, records: Sequence[FrameRecord]) -> list[str]:
    """Write the PNG files that the records allow into ``out`` and return their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = []
    drawn = (draw_trajectory, draw_error, draw_recall, draw_latency, draw_reliability)
    for name, draw in zip(PICTURES, drawn, strict=True):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        if not draw(figure, records):
            continue
        FigureCanvasAgg(figure)
        with replacing(out / name) as partial:
            figure.savefig(partial, format="png", dpi=120)
        names.append(name)
    return names


def draw_trajectory(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw truth and estimates along the map axis closest to the images' vertical; return false without poses.

    The truth has its start, its direction, and crosses and dots where frames have no pose or were dropped; estimates
    are coloured by their error.
    """
    poses = [p for r in records for p in (r.truth, r.estimate) if p is not None]
    if not poses:
        return False
    down = int(np.argmax(np.abs(np.mean([pose[:3, 1] for pose in poses], axis=0))))
    a, b = (axis for axis in range(3) if axis != down)
    axes = figure.add_subplot()
    processed = [r for r in records if r.processed]
    truth = np.array([_centre(r.truth) for r in records])
    estimates = np.array([_centre(r.estimate) for r in processed]).reshape(-1, 3)
    path = _break(records, truth)
    if np.isfinite(truth).any():
        axes.plot(path[:, a], path[:, b], color=TRUTH, linewidth=3.0, alpha=0.35, label="truth")
    path = _break(processed, estimates)
    axes.plot(path[:, a], path[:, b], color=FINAL, linewidth=0.6, alpha=0.6, label="estimate")
    error_cm = [np.nan if r.truth is None else 100 * pose_error(r.estimate, r.truth).translation_m for r in processed]
    known = np.isfinite(estimates[:, 0]) & np.isfinite(error_cm)
    if known.any():
        x, y = estimates[known][:, [a, b]].T
        shades = axes.scatter(
            x, y, c=np.array(error_cm)[known], s=9, cmap="RdYlGn_r", vmin=0.0,
            vmax=WORST_SHOWN_CM, zorder=3, linewidths=0,
        )  # fmt: skip
        figure.colorbar(shades, ax=axes, label="position error [cm]", shrink=0.8, extend="max")
    elif len(estimates):
        axes.plot(estimates[:, a], estimates[:, b], ".", color=FINAL, markersize=3)
    for label, mark, colour, chosen in (
        ("no pose", "x", "#c62828", [r.truth is not None and r.processed and r.estimate is None for r in records]),
        ("dropped", "|", "#999999", [r.truth is not None and not r.processed for r in records]),
    ):
        if any(chosen):
            axes.plot(*truth[chosen][:, [a, b]].T, mark, color=colour, markersize=5, label=f"{label}: {sum(chosen)}")
    _draw_direction(axes, truth[:, [a, b]] if np.isfinite(truth).any() else estimates[:, [a, b]])
    if np.isfinite(truth).any():
        low, high = np.nanmin(truth, axis=0), np.nanmax(truth, axis=0)
        margin = 0.25 + 0.1 * float(np.max(high - low))
        outside = int(np.any((estimates < low - margin) | (estimates > high + margin), axis=1).sum())
        axes.set_xlim(low[a] - margin, high[a] + margin)
        axes.set_ylim(low[b] - margin, high[b] + margin)
        if outside:
            axes.text(0.02, 0.02, f"{outside} estimates lie outside", transform=axes.transAxes)
    axes.set_aspect("equal", adjustable="box")
    axes.set(xlabel=f"{'xyz'[a]} [m]", ylabel=f"{'xyz'[b]} [m]", title="Camera positions from above, map frame")
    _finish(axes)
    return True


def _draw_direction(axes: Axes, path: NDArray[np.float64]) -> None:
    """Mark the start of a path (N, 2) and its direction by some arrows."""
    path = path[np.isfinite(path).all(axis=1)]
    if not len(path):
        return
    axes.plot(*path[0], "o", color="white", markeredgecolor="black", markersize=8, label="start", zorder=4)
    step = max(len(path) // ARROWS, 1)
    starts, ends = path[step // 2 : -1 : step], path[step // 2 + 1 :: step]
    ahead = ends[: len(starts)] - starts[: len(ends)]
    length = np.linalg.norm(ahead, axis=1)
    moving = length > 1e-4
    if moving.any():
        unit = ahead[moving] / length[moving, None]
        axes.quiver(
            *starts[: len(ahead)][moving].T, *unit.T, angles="xy", scale=40, width=0.004, color="black", zorder=4
        )


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


def draw_reliability(figure: Figure, records: Sequence[FrameRecord]) -> bool:
    """Draw the share of right poses over the confidence, and the share of wrong ones over the frames that are kept."""
    result = reliability([r for r in records if r.processed])
    if result is None:
        return False
    left, right = figure.subplots(1, 2)
    left.plot([0, 100], [0, 100], color="#999999", linewidth=0.7, linestyle=":")
    confidences, shares = ([100 * v for v in values] for values in zip(*_points(result), strict=True))
    left.plot(confidences, shares, color=FINAL, marker="o")
    for item, x, y in zip(result.bins, confidences, shares, strict=True):
        left.annotate(str(item.frames), (x, y), textcoords="offset points", xytext=(0, 6), fontsize=7, ha="center")
    left.set(xlabel="confidence [%]", ylabel="poses within 10 cm, 5 deg [%]", xlim=(0, 101), ylim=(0, 108))
    left.set_title("Reliability (with the number of frames)")
    left.grid(alpha=0.25)
    kept, risk = zip(*result.risk_coverage, strict=True)
    right.plot([100 * v for v in kept], [100 * v for v in risk], color=FINAL)
    right.set(xlabel="frames kept, most confident first [%]", ylabel="wrong poses among them [%]", xlim=(0, 101))
    right.set_ylim(bottom=0)
    right.set_title("Risk and coverage")
    right.grid(alpha=0.25)
    return True


def _points(result: Reliability) -> list[tuple[float, float]]:
    return [(item.mean_confidence, item.right_share) for item in result.bins]


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
