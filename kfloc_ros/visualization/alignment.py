# SPDX-License-Identifier: Apache-2.0
"""Pictures of an alignment: the map's points at start and end, cost and distance by step; and its basin of convergence.

The basin is the share of starts at given offsets that converge to the reference pose.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferencePoints
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment, Frame
from kfloc_ros.visualization.cells import Scale
from kfloc_ros.visualization.filter import faded
from kfloc_ros.visualization.overlay import REFERENCE_WIDTH_PX, RESIDUAL, Reprojection, draw_points, reproject
from kfloc_ros.visualization.sheet import Panel

CONFIDENCE = Scale("weight of the point", 0.01, 1.0, "viridis", logarithmic=True, ticks=(0.01, 0.03, 0.1, 0.3, 1))
LEVEL_COLOURS = {8: "#1565c0", 4: "#ef6c00"}
RADIUS_PX = 3


@dataclass(frozen=True)
class Offset:
    """Distance between two poses."""

    metres: float
    degrees: float


def offset_between(a: Matrix, b: Matrix) -> Offset:
    """Return the distance of the camera centres and the angle between the orientations of two ``T_map_camera``."""
    return Offset(float(np.linalg.norm(a[:3, 3] - b[:3, 3])), rotation_angle_deg(a[:3, :3].T @ b[:3, :3]))


def moved(
    T_map_camera: Matrix,
    metres: float,
    degrees: float,
    direction: Sequence[float] = (1.0, 0.0, 0.0),
    axis: Sequence[float] = (0.0, 1.0, 0.0),
) -> Matrix:
    """Return a pose moved along a direction and rotated about an axis, both unit vectors in the camera's frame."""
    turn = so3_exp(np.radians(degrees) * np.asarray(axis, dtype=np.float64))
    return np.asarray(T_map_camera @ make_pose(turn, metres * np.asarray(direction, dtype=np.float64)))


def reference_points(scene_map: SceneMap, ids: Sequence[int]) -> ReferencePoints:
    """Return the points of the given reference views."""
    positions = {ident: k for k, ident in enumerate(scene_map.references.ids)}
    return ReferencePoints.concatenate([scene_map.references.views[positions[ident]] for ident in ids])


def alignment_panels(
    frame: Frame, features: BackboneFeatures, alignment: Alignment, scene_map: SceneMap
) -> list[Panel]:
    """Return four panels: points over the image at start and end, by residual; and the same by weight.

    Raises:
        DrawingError: the alignment did not start.
    """
    if not alignment.steps:
        raise DrawingError(f"Frame {frame.index} was not aligned: {alignment.reason}.")
    points = reference_points(scene_map, alignment.reference_ids).to(features.fine.device)
    ends = [alignment.steps[0], alignment.steps[-1]]
    projected = [reproject(features, points, step.T_map_camera, frame.camera) for step in ends]
    panels = []
    for name, at in zip(("start", "end"), projected, strict=True):
        median = f"median residual {np.median(at.residuals):.2f}" if len(at.residuals) else "nothing in view"
        title = f"{name}: {median} of {len(at.pixels)} points in view"
        panels.append(Panel(title, by_residual(frame.image, at), RESIDUAL))
    panels += [
        Panel(f"{name}: weight in the alignment", by_confidence(frame.image, at), CONFIDENCE)
        for name, at in zip(("start", "end"), projected, strict=True)
    ]
    return panels


def by_residual(image: NDArray[np.uint8], points: Reprojection) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) with points in the colours of their residuals, the largest on top."""
    return _drawn(image, points, RESIDUAL.rgb(points.residuals), np.argsort(points.residuals))


def by_confidence(image: NDArray[np.uint8], points: Reprojection) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) with points in the colours of their weights, the largest on top."""
    return _drawn(image, points, CONFIDENCE.rgb(points.confidences), np.argsort(points.confidences))


def _drawn(
    image: NDArray[np.uint8], points: Reprojection, colours: NDArray[np.uint8], order: NDArray[np.intp]
) -> NDArray[np.uint8]:
    picture = np.ascontiguousarray(faded(image))
    radius = max(round(RADIUS_PX * image.shape[1] / REFERENCE_WIDTH_PX), 1)
    draw_points(picture, points.pixels[order], colours[order], radius)
    return picture


def steps_picture(title: str, alignment: Alignment, truth: Matrix | None = None) -> NDArray[np.uint8]:
    """Return curves over the steps, (H, W, 3): the cost at each level, and the pose's distance to the end and to the
    truth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    left, middle, right = figure.subplots(1, 3)
    steps = alignment.steps
    for stride in dict.fromkeys(step.stride for step in steps):
        at = [(k, step.cost) for k, step in enumerate(steps) if step.stride == stride]
        left.plot(*zip(*at, strict=True), "o-", color=LEVEL_COLOURS.get(stride), markersize=4, label=f"stride {stride}")
    left.set_ylim(bottom=0)
    left.set_title("cost at the pose", fontsize=10)
    goals = {"the end": (steps[-1].T_map_camera, "#1565c0")}
    if truth is not None:
        goals["the source's pose"] = (truth, "#444444")
    for name, (goal, colour) in goals.items():
        away = [offset_between(step.T_map_camera, goal) for step in steps]
        for axes, values in ((middle, [100 * o.metres for o in away]), (right, [o.degrees for o in away])):
            shown = np.where(
                np.array(values) > 1e-6, values, np.nan
            )  # the end itself cannot be drawn on a logarithmic scale
            axes.plot(range(len(steps)), shown, "o-", color=colour, markersize=4, label=f"from {name}")
    middle.set_title("distance [cm]", fontsize=10)
    right.set_title("angle [deg]", fontsize=10)
    for axes in (middle, right):
        axes.set_yscale("log")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small", framealpha=0.7)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def summary(frame: Frame, alignment: Alignment, source: str) -> str:
    """Return a one-line summary of an alignment."""
    start, end = alignment.steps[0], alignment.steps[-1]
    motion = offset_between(start.T_map_camera, end.T_map_camera)
    verdict = "accepted" if alignment.success else f"refused: {alignment.reason}"
    text = (
        f"{source}, frame {frame.index}: {alignment.iterations} iterations moved it by {100 * motion.metres:.1f} cm "
        f"and {motion.degrees:.2f} deg; {verdict}"
    )
    if frame.T_map_camera is None:
        return text
    error = offset_between(end.T_map_camera, frame.T_map_camera)
    return f"{text}; {100 * error.metres:.1f} cm, {error.degrees:.2f} deg from the source's pose"


START_COLOUR, END_COLOUR = (230, 60, 50), (70, 220, 80)


def draw_moved_points(
    image: NDArray[np.uint8], camera: Camera, points: NDArray[np.float64], T_start: Matrix, T_end: Matrix | None
) -> NDArray[np.uint8]:
    """Return the image (H, W, 3) with map points (N, 3) projected by the start pose (red) and the end pose (green).

    Args:
        image: image of the camera, with any lens.
        camera: camera of the image.
        points: points to draw, map frame.
        T_start: T_map_camera before the alignment.
        T_end: T_map_camera after it, or None if it failed.
    """
    picture = np.ascontiguousarray((0.65 * image + 0.35 * 128).astype(np.uint8))
    radius = max(round(2 * image.shape[1] / REFERENCE_WIDTH_PX), 1)
    for T, colour in ((T_start, START_COLOUR), (T_end, END_COLOUR)):
        if T is None:
            continue
        for x, y in np.rint(_visible_pixels(camera, points, T)).astype(int).tolist():
            cv2.circle(picture, (x, y), radius, colour, cv2.FILLED, cv2.LINE_AA)
    return picture


def _visible_pixels(camera: Camera, points: NDArray[np.float64], T_map_camera: Matrix) -> NDArray[np.float64]:
    """Return the pixels (M, 2) of the points in view."""
    pixels = project_points(camera, points, T_map_camera)
    return pixels[np.isfinite(pixels).all(axis=1)]


def project_points(camera: Camera, points: NDArray[np.float64], T_map_camera: Matrix) -> NDArray[np.float64]:
    """Return the pixels (N, 2) of map points (N, 3); NaN where they are out of view."""
    local = torch.from_numpy((points - T_map_camera[:3, 3]) @ T_map_camera[:3, :3])
    projection = CameraTensor.from_camera(camera).world2image(local)
    return np.where(projection.valid.numpy()[:, None], projection.points.numpy(), np.nan).astype(np.float64)


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
