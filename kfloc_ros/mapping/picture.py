# SPDX-License-Identifier: Apache-2.0
"""Pictures of a map from above: its points, reference views and extent, or the expected accuracy of localization.

A place is drawn on one floor plan, each submap with its border and its name.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.maps.place import AnyMap, MapInfo, each_map
from kfloc_ros.maps.scene_map import SceneMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from dataclasses import dataclass

import torch

from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp
from kfloc_ros.pixloc.cost import project, projection_jacobian
from kfloc_ros.pixloc.references import ReferencePoints, view_distances

MAX_POINTS = 60_000
AXES = "xyz"
WIDTH_IN, MIN_HEIGHT_IN, MAX_HEIGHT_IN = 9.0, 4.0, 14.0
Points = NDArray[np.float64]


def up_axis(scene_map: MapInfo) -> tuple[int, float]:
    """Return the vertical axis of the map frame (0 to 2) and its sign, from the upward direction of the images."""
    upwards = -scene_map.references.T_map_camera[:, :3, 1].mean(axis=0)
    axis = int(np.abs(upwards).argmax())
    return axis, float(np.sign(upwards[axis]) or 1.0)


def floor_axes(axis: int, sign: float) -> tuple[int, int]:
    """Return the axes of the map frame drawn to the right and upwards, such that the picture is not mirrored."""
    right, ahead = (k for k in ((0, 1, 2) if sign * (-1) ** axis > 0 else (2, 1, 0)) if k != axis)
    return right, ahead


def picture_from_above(known: AnyMap) -> bytes:
    """Return a PNG: points coloured by height, an arrow per reference view, the mapped box dashed, axes in metres.

    Raises:
        MapError: a submap cannot be read.
    """
    plan = FloorPlan(known)
    axis, sign = plan.up
    points, height = plan.points, plan.sign * plan.points[:, axis]
    order = np.argsort(height)
    shades = plan.axes.scatter(
        points[order, plan.right],
        points[order, plan.ahead],
        c=height[order],
        s=1.0,
        cmap="viridis",
        linewidths=0,
        vmin=float(np.quantile(height, 0.02)),
        vmax=float(np.quantile(height, 0.98)),
        rasterized=True,
    )
    T = known.references.T_map_camera
    plan.axes.quiver(
        T[:, plan.right, 3], T[:, plan.ahead, 3], T[:, plan.right, 2], T[:, plan.ahead, 2],
        color="#d84315", angles="xy", scale_units="xy", scale=5.0, width=0.0018, label="reference views",
    )  # fmt: skip
    plan.draw_borders()
    size = " x ".join(f"{s:.1f}" for s in plan.size)
    plan.axes.set_title(f"{known.name} from above: {plan.parts}{len(T)} reference views, {size} m")
    plan.axes.grid(alpha=0.25)
    plan.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plan.figure.colorbar(shades, ax=plan.axes, label=f"height, {'' if sign > 0 else '-'}{AXES[axis]} [m]", shrink=0.8)
    return plan.png()


def picture_of_coverage(known: AnyMap, coverages: Sequence[Coverage]) -> bytes:
    """Return a PNG: expected position error over the floor, fainter where fewer directions are covered.

    Args:
        known: map or place.
        coverages: coverage of the map, or of each submap; where they overlap, that with more covered directions is
            shown.

    Raises:
        MapError: a submap cannot be read.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    plan = FloorPlan(known)
    points = plan.points
    plan.axes.scatter(points[:, plan.right], points[:, plan.ahead], s=0.5, c="#bbbbbb", linewidths=0, rasterized=True)
    share = np.concatenate([item.share for item in coverages])
    error_cm = 100 * np.concatenate([item.error_m for item in coverages])
    places_m = np.concatenate([item.places_m for item in coverages])
    step_m = np.concatenate([np.full(len(item.share), item.step_m) for item in coverages])
    covered = np.flatnonzero(share > 0)
    covered = covered[np.argsort(share[covered], kind="stable")]
    worst_cm = max(5.0, float(np.quantile(error_cm[covered], 0.9))) if len(covered) else 5.0
    shades = ScalarMappable(Normalize(0.0, worst_cm), colormaps["RdYlGn_r"])
    colours = shades.to_rgba(error_cm[covered])
    colours[:, 3] = 0.25 + 0.75 * share[covered]
    squares = [
        Rectangle((float(x - step / 2), float(y - step / 2)), step, step)
        for (x, y), step in zip(places_m[covered][:, [plan.right, plan.ahead]], step_m[covered].tolist(), strict=True)
    ]
    plan.axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))
    along_cm = [(part.references.T_map_camera, 100 * path_errors_m(part)) for _, part in each_map(known)]
    T = np.concatenate([poses for poses, _ in along_cm])
    plan.axes.scatter(
        T[:, plan.right, 3], T[:, plan.ahead, 3], c=shades.to_rgba(np.concatenate([error for _, error in along_cm])),
        s=14, edgecolors="black", linewidths=0.4, label="recorded path (reference views)", zorder=3,
    )  # fmt: skip
    plan.draw_borders()
    plan.axes.set_title(f"{known.name}: expected accuracy (fainter: in fewer directions)")
    plan.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plan.figure.colorbar(shades, ax=plan.axes, label="expected position error [cm]", shrink=0.8)
    return plan.png()


class FloorPlan:
    """Floor plan of a map or a place, to scale."""

    def __init__(self, known: AnyMap) -> None:
        from matplotlib.figure import Figure

        self.up = up_axis(known)
        self.sign = self.up[1]
        self.right, self.ahead = flat = floor_axes(*self.up)
        single = isinstance(known, SceneMap)
        self.boxes = [("extent" if single else "submaps", "", known.bounds_m)]
        if not isinstance(known, SceneMap):
            self.boxes = [("submaps", submap.name, submap.bounds_m) for submap in known.submaps]
        self.parts = "" if single else f"{len(self.boxes)} submaps, "
        self.points = _some_points(known, MAX_POINTS // len(self.boxes))
        low, high = (np.array(corner)[list(flat)] for corner in known.bounds_m)
        self.size = np.maximum(high - low, 0.1)
        centres = known.references.T_map_camera[:, list(flat), 3]
        start = np.minimum(low, centres.min(axis=0)) - 0.05 * self.size
        end = np.maximum(high, centres.max(axis=0)) + 0.05 * self.size
        height = float(np.clip(WIDTH_IN * self.size[1] / self.size[0], MIN_HEIGHT_IN, MAX_HEIGHT_IN))
        self.figure: Figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set(xlim=(start[0], end[0]), ylim=(start[1], end[1]), aspect="equal")
        self.axes.set(xlabel=f"{AXES[self.right]} [m]", ylabel=f"{AXES[self.ahead]} [m]")

    def draw_borders(self) -> None:
        """Draw the box of the map dashed, or of each submap with its name in the upper left corner, and a scale bar."""
        from matplotlib.patches import Rectangle

        self._draw_scale()
        for number, (label, name, bounds_m) in enumerate(self.boxes):
            (x, y), (x1, y1) = (np.array(corner)[[self.right, self.ahead]] for corner in bounds_m)
            style: dict[str, Any] = {
                "fill": False,
                "linestyle": "--",
                "color": "#444444" if not name else f"C{number % 10}",
            }
            self.axes.add_patch(Rectangle((x, y), x1 - x, y1 - y, label="" if number else label, **style))
            if name:
                box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
                self.axes.text(x, y1, f" {name}", color=style["color"], va="top", fontweight="bold", bbox=box)

    def _draw_scale(self) -> None:
        """Draw a bar of a round length, about a fifth of the picture, in the lower left corner."""
        (left, right), (bottom, top) = self.axes.get_xlim(), self.axes.get_ylim()
        length = max(step for power in range(-3, 5) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
                     if step <= max(0.25 * (right - left), 0.001))  # fmt: skip
        x, y = left + 0.03 * (right - left), bottom + 0.03 * (top - bottom)
        self.axes.plot([x, x + length], [y, y], color="black", linewidth=3, solid_capstyle="butt", zorder=5)
        self.axes.annotate(f"{length:g} m", (x, y), (0, 4), textcoords="offset points", fontsize=9, zorder=5)

    def png(self) -> bytes:
        """Return the picture as PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        data = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(data)
        return data.getvalue()


def _some_points(known: AnyMap, most: int) -> Points:
    """Return at most this many points (N, 3), evenly from the map or from each submap."""
    chosen = []
    for _, scene_map in each_map(known):
        points = np.concatenate([view.points.cpu().double().numpy() for view in scene_map.references.views])
        chosen.append(points[:: -(-len(points) // max(most, 1))])
    return np.concatenate(chosen)


REACH_M = 0.6
"""Distance beyond which views are out of the alignment's reach (1 deg counts as 0.02 m)."""
NUM_REFERENCES = 3
MIN_POINTS = 60
POINT_ERROR_PX = 2.4
"""Error of a point's position in the image as if points had independent errors, which neighbours do not have; it is
multiplied by the root of the map's ``refined_covariance_scale``.
"""
GROWTH_PER_M = 8.0
"""Growth of the error with the distance to the nearest view."""
METRES_PER_DEG = 0.02
HEADINGS = 8
MAX_CELLS = 2500


@dataclass(frozen=True, eq=False)
class Coverage:
    """Expected accuracy on a grid over the floor plan."""

    places_m: NDArray[np.float64]
    """(N, 3) camera centres, drawn at the usual height of the recording."""
    step_m: float
    share: NDArray[np.float64]
    """(N,) share of the directions, all around, in which a pose is expected."""
    error_m: NDArray[np.float64]
    """(N,) expected position error: the median over these directions; NaN where there are none."""


def expected_error_m(scene_map: SceneMap, T_map_camera: Matrix, without: int | None = None) -> float:
    """Return the expected position error of a pose (4, 4) in metres; NaN where no pose is expected.

    Args:
        scene_map: the map.
        T_map_camera: the pose.
        without: position of a reference view to leave out.
    """
    references = scene_map.references
    distances = view_distances(references.T_map_camera, T_map_camera)
    if without is not None:
        distances[without] = np.inf
    nearest = np.argsort(distances, kind="stable")[:NUM_REFERENCES]
    if distances[nearest[0]] > REACH_M:
        return float("nan")
    points = ReferencePoints.concatenate([references.views[k] for k in nearest]).points
    camera = scene_map.camera
    T_camera_map = torch.from_numpy(inverse_pose(T_map_camera))
    uv, P, in_front = project(points.double(), T_camera_map, camera, 1.0)
    inside = in_front & (uv >= 0).all(dim=1) & (uv[:, 0] < camera.width) & (uv[:, 1] < camera.height)
    if int(inside.sum()) < MIN_POINTS:
        return float("nan")
    J = projection_jacobian(P[inside], camera, 1.0).reshape(-1, 6).numpy()
    variance_px2 = POINT_ERROR_PX**2 * scene_map.calibration.refined_covariance_scale
    covariance = variance_px2 * np.linalg.pinv(J.T @ J, hermitian=True)
    return float(np.sqrt(np.trace(covariance[:3, :3])) * (1 + GROWTH_PER_M * distances[nearest[0]]))


def floor_coverage(scene_map: SceneMap, up_axis: int, up_sign: float, step_m: float = 0.1) -> Coverage:
    """Return the coverage of the floor plan around the reference views.

    At each place and heading, the camera has the height and the tilt of the reference view that is nearest to it there,
    turned about the vertical: a recording that looks down is judged as such.

    Args:
        scene_map: the map.
        up_axis: vertical axis of the map frame.
        up_sign: 1 if the axis points up, -1 if down.
        step_m: step of the grid; larger for a large place.
    """
    references = scene_map.references.T_map_camera
    centres = references[:, :3, 3]
    flat = [k for k in range(3) if k != up_axis]
    low, high = centres[:, flat].min(axis=0) - REACH_M, centres[:, flat].max(axis=0) + REACH_M
    step_m = max(step_m, float(np.sqrt(np.prod(high - low) / MAX_CELLS)))
    grid = np.stack(np.meshgrid(*(np.arange(a, b + step_m, step_m) for a, b in zip(low, high, strict=True))), axis=-1)
    places = np.full((grid.size // 2, 3), np.median(centres[:, up_axis]))
    places[:, flat] = grid.reshape(-1, 2)
    apart = np.linalg.norm(places[:, None, flat] - centres[None][:, :, flat], axis=2)
    headings = np.array([heading_rad(T, up_axis, up_sign) for T in references])
    errors = np.full((len(places), HEADINGS), np.nan)
    for place in np.flatnonzero(apart.min(axis=1) < REACH_M):
        for k in range(HEADINGS):
            turn = 2 * np.pi * k / HEADINGS - headings
            turn = np.angle(np.exp(1j * turn))
            view = int((apart[place] + METRES_PER_DEG * np.degrees(np.abs(turn))).argmin())
            T = turned_about_vertical(references[view], turn[view], up_axis, up_sign)
            T[flat, 3] = places[place, flat]
            errors[place, k] = expected_error_m(scene_map, T)
    found = np.isfinite(errors)
    median = np.array([np.median(row[ok]) if ok.any() else np.nan for row, ok in zip(errors, found, strict=True)])
    return Coverage(places, step_m, found.mean(axis=1), median)


def path_errors_m(scene_map: SceneMap) -> NDArray[np.float64]:
    """Return the expected error (N,) at each reference view's pose by the other views, as on the path between them."""
    return np.array([expected_error_m(scene_map, T, k) for k, T in enumerate(scene_map.references.T_map_camera)])


def heading_rad(T_map_camera: Matrix, up_axis: int, up_sign: float) -> float:
    """Return the heading of a camera about the vertical; of one that looks straight down, of its image's top."""
    first, second = _floor_directions(up_axis, up_sign)
    ahead = T_map_camera[:3, 2]
    if np.hypot(ahead @ first, ahead @ second) < 1e-3:
        ahead = -T_map_camera[:3, 1]
    return float(np.arctan2(ahead @ second, ahead @ first))


def turned_about_vertical(T_map_camera: Matrix, angle_rad: float, up_axis: int, up_sign: float) -> Matrix:
    """Return a pose (4, 4) turned in its place about the vertical, towards larger headings."""
    first, second = _floor_directions(up_axis, up_sign)
    return make_pose(so3_exp(angle_rad * np.cross(first, second)) @ T_map_camera[:3, :3], T_map_camera[:3, 3])


def _floor_directions(up_axis: int, up_sign: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the directions of the headings 0 and 90 degrees."""
    down, first = np.zeros(3), np.zeros(3)
    down[up_axis] = -up_sign
    first[(up_axis + 1) % 3] = 1.0
    return first, np.cross(down, first)
