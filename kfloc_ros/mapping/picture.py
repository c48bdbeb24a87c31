# SPDX-License-Identifier: Apache-2.0
"""A map from above, as a picture: its points, the reference views, its extent, or where it will localize.

A place of several is drawn on one floor plan, each submap with its border and its name.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.mapping.coverage import Coverage
from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.mapping.place import AnyMap, each_map
from kfloc_ros.mapping.scene_map import SceneMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 60_000
AXES = "xyz"
WIDTH_IN, MIN_HEIGHT_IN, MAX_HEIGHT_IN = 9.0, 4.0, 14.0
Points = NDArray[np.float64]


def up_axis(scene_map: MapOutline) -> tuple[int, float]:
    """Axis of the map frame (0 to 2) that points up or down, and its sign: where the views' images have their top."""
    upwards = -scene_map.references.T_map_camera[:, :3, 1].mean(axis=0)
    axis = int(np.abs(upwards).argmax())
    return axis, float(np.sign(upwards[axis]) or 1.0)


def floor_axes(axis: int, sign: float) -> tuple[int, int]:
    """Axes of the map frame to draw to the right and upwards, so that the picture is no mirror image."""
    right, ahead = (k for k in ((0, 1, 2) if sign * (-1) ** axis > 0 else (2, 1, 0)) if k != axis)
    return right, ahead


def picture_from_above(known: AnyMap) -> bytes:
    """PNG: points coloured by height, an arrow for every reference view, the mapped box dashed, axes in metres.

    Raises:
        MapError: a submap cannot be read.
    """
    plan = _FloorPlan(known)
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
    """PNG: expected position error over the floor, fainter where fewer directions are covered.

    Args:
        known: the map, or the place.
        coverages: of the map, or of each submap; where they overlap, what more directions cover is seen.

    Raises:
        MapError: a submap cannot be read.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    plan = _FloorPlan(known)
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
    T = known.references.T_map_camera
    plan.axes.plot(
        T[:, plan.right, 3], T[:, plan.ahead, 3], ".", color="#1a237e", markersize=2.0, label="reference views"
    )
    plan.draw_borders()
    plan.axes.set_title(f"{known.name}: where it will localize (fainter: in fewer directions)")
    plan.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plan.figure.colorbar(shades, ax=plan.axes, label="expected position error [cm]", shrink=0.8)
    return plan.png()


class _FloorPlan:
    """The empty floor plan of a map or a place, to scale, and what there is to be drawn on it."""

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
        """The box of the map dashed, or of each submap with its name in the upper left corner."""
        from matplotlib.patches import Rectangle

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

    def png(self) -> bytes:
        """The picture."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        data = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(data)
        return data.getvalue()


def _some_points(known: AnyMap, most: int) -> Points:
    """(N, 3) at most so many points of the map, or of each submap, from all over it."""
    chosen = []
    for _, scene_map in each_map(known):
        points = np.concatenate([view.points.cpu().double().numpy() for view in scene_map.references.views])
        chosen.append(points[:: -(-len(points) // max(most, 1))])
    return np.concatenate(chosen)
