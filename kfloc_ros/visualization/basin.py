# SPDX-License-Identifier: Apache-2.0
"""Basin of convergence of an alignment: share of starts at given offsets that converge to the reference pose."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.visualization.alignment import moved, offset_between

NEAR_M, NEAR_DEG = 0.02, 1.0
"""Errors below which an alignment has converged to the reference pose."""


@dataclass(frozen=True)
class Trial:
    """Alignment started at an offset from the reference pose."""

    frame: int
    offset_m: float
    offset_deg: float
    error_m: float
    """Final distance from the reference pose in metres; infinite if the alignment was impossible."""
    error_deg: float
    accepted: bool
    """The refiner accepted the result."""

    @property
    def converged(self) -> bool:
        return self.error_m <= NEAR_M and self.error_deg <= NEAR_DEG


@dataclass(frozen=True, eq=False)
class Basin:
    """Statistics of the trials over a grid of offsets."""

    offsets_m: tuple[float, ...]
    offsets_deg: tuple[float, ...]
    converged: NDArray[np.float64]
    """(R, T) share that converged."""
    error_cm: NDArray[np.float64]
    """(R, T) median final error."""
    falsely_accepted: int
    """Number of alignments that converged elsewhere and were accepted."""


def reference_pose(refiner: Refiner, features: BackboneFeatures, start: Matrix) -> Matrix | None:
    """Return the result of an alignment from a good pose, or None if it is refused: the reference pose."""
    alignment = refiner.align(features, [start])
    return alignment.T_map_camera if alignment.success else None


def trials(
    refiner: Refiner,
    features: BackboneFeatures,
    frame: int,
    goal: Matrix,
    offsets_m: Sequence[float],
    offsets_deg: Sequence[float],
    starts: int,
    rng: np.random.Generator,
) -> Iterator[Trial]:
    """Yield alignments from poses around a goal: ``starts`` for every combination of offsets, in random directions."""
    for degrees in offsets_deg:
        for metres in offsets_m:
            for _ in range(starts):
                direction, axis = (_unit(rng) for _ in range(2))
                alignment = refiner.align(features, [moved(goal, metres, degrees, direction, axis)])
                if alignment.T_map_camera is None:
                    yield Trial(frame, metres, degrees, float("inf"), float("inf"), False)
                    continue
                away = offset_between(alignment.T_map_camera, goal)
                yield Trial(frame, metres, degrees, away.metres, away.degrees, alignment.success)


def summarize(results: Sequence[Trial]) -> Basin:
    """Return shares and medians over all frames.

    Raises:
        DrawingError: there are no trials.
    """
    if not results:
        raise DrawingError(
            "No frame could be aligned from the source's own pose, so there is no reference pose for the basin; "
            "select frames inside the map."
        )
    metres = tuple(sorted({trial.offset_m for trial in results}))
    degrees = tuple(sorted({trial.offset_deg for trial in results}))
    converged = np.zeros((len(degrees), len(metres)))
    error_cm = np.zeros_like(converged)
    for r, turn in enumerate(degrees):
        for c, offset in enumerate(metres):
            at = [t for t in results if (t.offset_m, t.offset_deg) == (offset, turn)]
            converged[r, c] = np.mean([t.converged for t in at])
            error_cm[r, c] = 100 * np.median([t.error_m for t in at])
    return Basin(metres, degrees, converged, error_cm, sum(t.accepted and not t.converged for t in results))


def basin_picture(title: str, basin: Basin) -> NDArray[np.uint8]:
    """Return two coloured tables, (H, W, 3): the share that converged, and the median final error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    share, error = figure.subplots(1, 2)
    finite = np.where(np.isfinite(basin.error_cm), np.clip(basin.error_cm, 0.05, 200.0), 200.0)
    for axes, values, texts, palette, norm, label in (
        (share, 100 * basin.converged, [[f"{100 * v:.0f}" for v in row] for row in basin.converged], "RdYlGn",
         Normalize(0, 100), f"converges to within {100 * NEAR_M:g} cm and {NEAR_DEG:g} deg [%]"),
        (error, finite, [[_short(v) for v in row] for row in basin.error_cm], "viridis_r",
         LogNorm(0.05, 200.0), "median final distance [cm]"),
    ):  # fmt: skip
        picture = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", origin="lower")
        axes.set_xticks(range(len(basin.offsets_m)), [f"{100 * v:g}" for v in basin.offsets_m])
        axes.set_yticks(range(len(basin.offsets_deg)), [f"{v:g}" for v in basin.offsets_deg])
        axes.set(xlabel="offset of the start [cm]", ylabel="rotation of the start [deg]")
        axes.set_title(label, fontsize=10)
        for r, row in enumerate(texts):
            for c, text in enumerate(row):
                red, green, blue, _ = picture.cmap(picture.norm(values[r, c]))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                axes.text(c, r, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        figure.colorbar(picture, ax=axes, pad=0.015)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def write_trials(path: Path, results: Sequence[Trial]) -> None:
    """Write one line per trial as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Trial)])
        writer.writeheader()
        writer.writerows(asdict(trial) for trial in results)


def _unit(rng: np.random.Generator) -> list[float]:
    v = rng.normal(size=3)
    return [float(x) for x in v / np.linalg.norm(v)]


def _short(centimetres: float) -> str:
    if not np.isfinite(centimetres):
        return "-"
    return "< 0.1" if centimetres < 0.1 else f"{centimetres:.1f}" if centimetres < 10 else f"{centimetres:.0f}"
