# SPDX-License-Identifier: Apache-2.0
"""A map from above: its points, the reference views, and its extent, as a picture."""

from __future__ import annotations

import io

import numpy as np

from kfloc_ros.mapping.coverage import Coverage
from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.mapping.scene_map import SceneMap

MAX_POINTS = 60_000
AXES = "xyz"


def up_axis(scene_map: MapOutline) -> tuple[int, float]:
    """Axis of the map frame (0 to 2) that points up or down, and its sign: where the views' images have their top."""
    upwards = -scene_map.references.T_map_camera[:, :3, 1].mean(axis=0)
    axis = int(np.abs(upwards).argmax())
    return axis, float(np.sign(upwards[axis]) or 1.0)


def floor_axes(axis: int, sign: float) -> tuple[int, int]:
    """Axes of the map frame to draw to the right and upwards, so that the picture is no mirror image."""
    right, ahead = (k for k in ((0, 1, 2) if sign * (-1) ** axis > 0 else (2, 1, 0)) if k != axis)
    return right, ahead


def picture_from_above(scene_map: SceneMap) -> bytes:
    """PNG: points coloured by height, an arrow for every reference view, the mapped box dashed, axes in metres."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    axis, sign = up_axis(scene_map)
    right, ahead = floor_axes(axis, sign)
    points = np.concatenate([view.points.cpu().numpy() for view in scene_map.references.views])
    points = points[:: -(-len(points) // MAX_POINTS)]
    height = sign * points[:, axis]
    order = np.argsort(height)
    low, high = (np.array(corner) for corner in scene_map.bounds_m)
    T = scene_map.references.T_map_camera
    size = np.maximum(high - low, 0.1)[[right, ahead]]
    width = 9.0

    figure = Figure(figsize=(width, float(np.clip(width * size[1] / size[0], 4.0, 14.0))), layout="constrained")
    axes = figure.add_subplot()
    shades = axes.scatter(
        points[order, right],
        points[order, ahead],
        c=height[order],
        s=1.0,
        cmap="viridis",
        linewidths=0,
        vmin=float(np.quantile(height, 0.02)),
        vmax=float(np.quantile(height, 0.98)),
        rasterized=True,
    )
    axes.quiver(
        T[:, right, 3], T[:, ahead, 3], T[:, right, 2], T[:, ahead, 2],
        color="#d84315", angles="xy", scale_units="xy", scale=5.0, width=0.0018, label="reference views",
    )  # fmt: skip
    axes.add_patch(
        Rectangle(
            (low[right], low[ahead]), size[0], size[1], fill=False, linestyle="--", color="#444444", label="extent"
        )
    )
    centres, margin = T[:, [right, ahead], 3], 0.05 * size
    start = np.minimum(low[[right, ahead]], centres.min(axis=0)) - margin
    end = np.maximum(high[[right, ahead]], centres.max(axis=0)) + margin
    axes.set(xlim=(start[0], end[0]), ylim=(start[1], end[1]), aspect="equal")
    axes.set(xlabel=f"{AXES[right]} [m]", ylabel=f"{AXES[ahead]} [m]")
    axes.set_title(f"{scene_map.name} from above: {len(T)} reference views, {' x '.join(f'{s:.1f}' for s in size)} m")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.colorbar(shades, ax=axes, label=f"height, {'' if sign > 0 else '-'}{AXES[axis]} [m]", shrink=0.8)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def picture_of_coverage(scene_map: SceneMap, coverage: Coverage) -> bytes:
    """PNG: expected position error over the floor, fainter where fewer directions are covered."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    axis, sign = up_axis(scene_map)
    right, ahead = floor_axes(axis, sign)
    low, high = (np.array(corner)[[right, ahead]] for corner in scene_map.bounds_m)
    size = np.maximum(high - low, 0.1)
    figure = Figure(figsize=(9.0, float(np.clip(9.0 * size[1] / size[0], 4.0, 14.0))), layout="constrained")
    axes = figure.add_subplot()
    points = np.concatenate([view.points.cpu().numpy() for view in scene_map.references.views])
    points = points[:: -(-len(points) // MAX_POINTS)]
    axes.scatter(points[:, right], points[:, ahead], s=0.5, c="#bbbbbb", linewidths=0, rasterized=True)

    covered = coverage.share > 0
    error_cm = 100 * coverage.error_m[covered]
    worst_cm = max(5.0, float(np.quantile(error_cm, 0.9))) if covered.any() else 5.0
    shades = ScalarMappable(Normalize(0.0, worst_cm), colormaps["RdYlGn_r"])
    colours = shades.to_rgba(error_cm)
    colours[:, 3] = 0.25 + 0.75 * coverage.share[covered]
    step = coverage.step_m
    corners = coverage.places_m[covered][:, [right, ahead]] - step / 2
    squares = [Rectangle((float(x), float(y)), step, step) for x, y in corners]
    axes.add_collection(PatchCollection(squares, facecolors=colours, linewidths=0))

    T = scene_map.references.T_map_camera
    axes.plot(T[:, right, 3], T[:, ahead, 3], ".", color="#1a237e", markersize=2.0, label="reference views")
    start = np.minimum(low, coverage.places_m[:, [right, ahead]].min(axis=0))
    end = np.maximum(high, coverage.places_m[:, [right, ahead]].max(axis=0))
    axes.set(xlim=(start[0], end[0]), ylim=(start[1], end[1]), aspect="equal")
    axes.set(xlabel=f"{AXES[right]} [m]", ylabel=f"{AXES[ahead]} [m]")
    axes.set_title(f"{scene_map.name}: where it will localize (fainter: in fewer directions)")
    figure.legend(loc="outside lower center", frameon=False)
    figure.colorbar(shades, ax=axes, label="expected position error [cm]", shrink=0.8)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
