# SPDX-License-Identifier: Apache-2.0
"""The basin of convergence: from how far away an alignment finds back to where it ends from nearby."""

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
"""An alignment has found back if it ends this near to the right pose."""


@dataclass(frozen=True)
class Trial:
    """One alignment that was started away from the right pose."""

    frame: int
    offset_m: float
    offset_deg: float
    error_m: float
    """From the right pose at the end; infinite if it could not be aligned at all."""
    error_deg: float
    accepted: bool
    """The refiner took it for good."""

    @property
    def returned(self) -> bool:
        return self.error_m <= NEAR_M and self.error_deg <= NEAR_DEG


@dataclass(frozen=True, eq=False)
class Basin:
    """The trials summed up over a grid of offsets."""

    offsets_m: tuple[float, ...]
    offsets_deg: tuple[float, ...]
    returned: NDArray[np.float64]
    """(R, T) share that found back."""
    error_cm: NDArray[np.float64]
    """(R, T) median error at the end."""
    falsely_accepted: int
    """Alignments that ended elsewhere and were taken for good."""


def right_pose(refiner: Refiner, features: BackboneFeatures, start: Matrix) -> Matrix | None:
    """Where the alignment ends from a good pose, or None if it is refused."""
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
    """Align from poses around a goal: ``starts`` of every combination of offsets, in random directions."""
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


def summed_up(results: Sequence[Trial]) -> Basin:
    """Shares and medians over all frames.

    Raises:
        DrawingError: there are no trials.
    """
    if not results:
        raise DrawingError(
            "No frame could be aligned from the source's own pose, so there is nothing to measure a basin around; "
            "name frames inside the map."
        )
    metres = tuple(sorted({trial.offset_m for trial in results}))
    degrees = tuple(sorted({trial.offset_deg for trial in results}))
    returned = np.zeros((len(degrees), len(metres)))
    error_cm = np.zeros_like(returned)
    for r, turn in enumerate(degrees):
        for c, way in enumerate(metres):
            at = [t for t in results if (t.offset_m, t.offset_deg) == (way, turn)]
            returned[r, c] = np.mean([t.returned for t in at])
            error_cm[r, c] = 100 * np.median([t.error_m for t in at])
    return Basin(metres, degrees, returned, error_cm, sum(t.accepted and not t.returned for t in results))


def basin_picture(title: str, basin: Basin) -> NDArray[np.uint8]:
    """Two tables in colours, (H, W, 3): the share that found back, and the median error at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    share, error = figure.subplots(1, 2)
    finite = np.where(np.isfinite(basin.error_cm), np.clip(basin.error_cm, 0.05, 200.0), 200.0)
    for axes, values, texts, palette, norm, label in (
        (share, 100 * basin.returned, [[f"{100 * v:.0f}" for v in row] for row in basin.returned], "RdYlGn",
         Normalize(0, 100), f"ends within {100 * NEAR_M:g} cm and {NEAR_DEG:g} deg [%]"),
        (error, finite, [[_short(v) for v in row] for row in basin.error_cm], "viridis_r",
         LogNorm(0.05, 200.0), "median distance at the end [cm]"),
    ):  # fmt: skip
        picture = axes.imshow(values, cmap=palette, norm=norm, aspect="auto", origin="lower")
        axes.set_xticks(range(len(basin.offsets_m)), [f"{100 * v:g}" for v in basin.offsets_m])
        axes.set_yticks(range(len(basin.offsets_deg)), [f"{v:g}" for v in basin.offsets_deg])
        axes.set(xlabel="start moved by [cm]", ylabel="start turned by [deg]")
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
    """Write one line a trial as CSV."""
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
