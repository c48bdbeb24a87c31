# SPDX-License-Identifier: Apache-2.0
"""Sheets: several pictures side by side with titles, colour bars and arrows, laid out once and then updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.visualization.cells import MAX_FLOW_CELLS, CellPicture, Scale, flow_wheel, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
PANEL_WIDTH_IN, PANEL_HEIGHT_IN = 4.6, 3.25
TITLE_HEIGHT_IN = 0.45
SEPARATOR = "   |   "
"""Separator between the parts of a title; narrow sheets break the line after the first part."""
QUIET = "#666666"
ARROW_LENGTHENING = 2.0
"""Factor on the length of arrows, since motion between frames is short."""
ARROW_KEY_PX = 10.0
"""Motion that the arrow in the key stands for."""


@dataclass(frozen=True, eq=False)
class Arrows:
    """Vectors drawn over a panel."""

    places: NDArray[np.float64]
    """(N, 2) start points, in pixels of the image."""
    vectors: NDArray[np.float64]
    """(N, 2) pixels."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Picture of a sheet; all panels of a sheet show the same field of view."""

    title: str
    rgb: NDArray[np.uint8] | None
    """(h, w, 3); None if there is nothing to show in this frame."""
    scale: Scale | None = None
    wheel: bool = False
    """Draw the key to the colours of flow."""
    arrows: Arrows | None = None
    nothing: str = "nothing to show"
    """Text shown if there is no picture."""


def panel_of(title: str, picture: CellPicture | None, scale: Scale, nothing: str) -> Panel:
    """Return a panel of a cell picture; the scale is shown even without a picture."""
    return Panel(title, None if picture is None else picture.rgb, scale, nothing=nothing)


class Sheet:
    """Renderer of sheets of one layout: the first sheet lays the figure out, later ones only update it.

    Args:
        columns: number of panels per row.
        width, height: size of the image in pixels, to which all panels are stretched.
    """

    def __init__(self, columns: int, width: int, height: int) -> None:
        self._columns, self._width, self._height = columns, width, height
        self._canvas: Any = None
        self._axes: list[Axes] = []
        self._images: list[Any] = []
        self._texts: list[Any] = []
        self._quivers: list[Any] = []
        self._title: Any = None

    def draw(self, title: str, panels: Sequence[Panel]) -> NDArray[np.uint8]:
        """Return the sheet as an RGB picture; all sheets of one layout have the same size."""
        if self._canvas is None:
            self._lay_out(panels)
        wide = self._columns > 2
        self._title.set_text(title if wide else title.replace(SEPARATOR, "\n", 1))
        for k, panel in enumerate(panels):
            self._update(k, panel)
        self._canvas.draw()
        self._canvas.figure.set_layout_engine("none")  # the layout is fixed from here on, which halves the drawing time
        return np.array(self._canvas.buffer_rgba(), dtype=np.uint8)[..., :3]

    def _lay_out(self, panels: Sequence[Panel]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = -(-len(panels) // self._columns)
        aspect = self._height / self._width
        size = (
            PANEL_WIDTH_IN * self._columns,
            (PANEL_HEIGHT_IN * aspect / 0.75 + 0.1) * rows + TITLE_HEIGHT_IN,
        )
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        self._canvas = FigureCanvasAgg(figure)
        self._title = figure.suptitle("", fontsize=11, x=0.01, ha="left")
        grid = figure.subplots(rows, self._columns, squeeze=False).reshape(-1)
        blank = np.full((2, 2, 3), 235, np.uint8)
        extent = (-0.5, self._width - 0.5, self._height - 0.5, -0.5)
        for axes, panel in zip(grid, panels, strict=False):
            axes.set_xticks([])
            axes.set_yticks([])
            self._images.append(axes.imshow(blank, extent=extent, interpolation="nearest"))
            self._texts.append(
                axes.text(0.5, 0.5, "", transform=axes.transAxes, ha="center", va="center", color=QUIET, wrap=True)
            )
            self._quivers.append(None)
            self._axes.append(axes)
            if panel.scale is not None:
                add_scale(figure, axes, panel.scale)
            if panel.wheel:
                _add_wheel(axes)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()

    def _update(self, k: int, panel: Panel) -> None:
        axes, image = self._axes[k], self._images[k]
        axes.set_title(panel.title, fontsize=10)
        image.set_data(np.full((2, 2, 3), 235, np.uint8) if panel.rgb is None else panel.rgb)
        self._texts[k].set_text(panel.nothing if panel.rgb is None else "")
        if self._quivers[k] is not None:
            for artist in self._quivers[k]:
                artist.remove()
            self._quivers[k] = None
        if panel.arrows is not None and len(panel.arrows.places):
            arrows = axes.quiver(
                *panel.arrows.places.T,
                *panel.arrows.vectors.T,
                angles="xy",
                scale_units="xy",
                scale=1.0 / ARROW_LENGTHENING,
                color="black",
                width=0.003,
                headwidth=3.2,
                headlength=3.5,
                headaxislength=3.0,
            )
            key = axes.quiverkey(
                arrows, 0.08, 0.05, ARROW_KEY_PX, f"{ARROW_KEY_PX:g} px", labelpos="E", coordinates="axes",
                fontproperties={"size": 8},
            )  # fmt: skip
            self._quivers[k] = (arrows, key)


def add_scale(figure: Any, axes: Any, scale: Scale) -> None:
    """Add a colour bar to the right of axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    norm = (LogNorm if scale.logarithmic else Normalize)(scale.low, scale.high)
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(palette(scale.palette) / 255.0)), ax=axes, shrink=0.92, pad=0.015, aspect=22
    )
    bar.set_label(scale.label, fontsize=8)
    if scale.ticks:
        bar.minorticks_off()
        bar.set_ticks(list(scale.ticks), labels=[_short(tick) for tick in scale.ticks])
    bar.ax.tick_params(labelsize=7)


def _short(tick: float) -> str:
    return f"{tick:.0f}" if tick >= 100 else f"{tick:.2g}"


def _add_wheel(axes: Any) -> None:
    """Add the key to flow colours in a corner."""
    inset = axes.inset_axes((0.0, 0.0, 0.16, 0.21))
    inset.imshow(flow_wheel())
    inset.set_xticks([])
    inset.set_yticks([])
    inset.text(
        1.05, 0.06, f"rim: {MAX_FLOW_CELLS * COARSE_STRIDE:g} px", transform=inset.transAxes, fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
    )  # fmt: skip
