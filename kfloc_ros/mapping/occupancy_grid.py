# SPDX-License-Identifier: Apache-2.0
"""Occupancy grids of map_server and slam_toolbox: reading, and a picture of a map on one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.files import MAX_IMAGE_PIXELS, read_bytes, read_text
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp

MAX_GRID_BYTES = 300_000_000
MAX_SIDE = 20_000


@dataclass(frozen=True, eq=False)
class OccupancyGrid:
    """Occupancy grid as map_server reads it."""

    occupied: NDArray[np.bool_]
    """(H, W); row 0 is at the bottom, column 0 on the left."""
    free: NDArray[np.bool_]
    resolution_m: float
    T_map_grid: Matrix
    """(4, 4) pose of the corner of cell (0, 0) in nav2's map frame: the yaml's ``origin``."""
    name: str = ""


def read_grid(path: Path) -> OccupancyGrid:
    """Read a grid of map_server: a yaml file, and the image that it names.

    Raises:
        SourceError: a file is missing, too large or damaged, or a value is invalid.
    """
    try:
        given = yaml.safe_load(read_text(path, 1_000_000))
        if not isinstance(given, dict):
            raise ValueError("it is no mapping of names to values")
        resolution_m = float(given["resolution"])
        x, y, turn = (float(value) for value in given["origin"])
        occupied_above, free_below = (float(given[f"{name}_thresh"]) for name in ("occupied", "free"))
        negate, image = bool(int(given.get("negate", 0))), str(given["image"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise SourceError(f"'{path}' is no occupancy grid of map_server: {what}.") from error
    numbers = [resolution_m, x, y, turn, occupied_above, free_below]
    if not (np.isfinite(numbers).all() and 1e-3 <= resolution_m <= 10.0 and np.abs(numbers).max() < 1e7):
        raise SourceError(f"'{path}' has a resolution (0.001 to 10 m), an origin or a threshold out of range.")
    picture = path.parent / image
    try:
        data = read_bytes(picture, MAX_GRID_BYTES)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    except (OSError, cv2.error) as error:
        raise SourceError(f"The image of the grid, '{picture}', cannot be read: {error}.") from error
    if pixels is None or pixels.size > MAX_IMAGE_PIXELS or max(pixels.shape) > MAX_SIDE:
        raise SourceError(f"The image of the grid, '{picture}', is no image of at most {MAX_SIDE} pixels a side.")
    share = pixels[::-1].astype(np.float64) / 255.0
    probability = share if negate else 1.0 - share
    occupied, free = probability > occupied_above, probability < free_below
    if occupied.sum() < 20:
        raise SourceError(f"The grid '{path}' has {int(occupied.sum())} occupied cells, which are no walls.")
    return OccupancyGrid(occupied, free, resolution_m, make_pose(so3_exp([0, 0, turn]), [x, y, 0.0]), path.name)


def picture_on_grid(grid: OccupancyGrid, walls: NDArray[np.float64], views: NDArray[np.float64], title: str) -> bytes:
    """Return a PNG of a grid with a map's wall points and the places of its views, in nav2's map frame.

    Args:
        grid: the grid.
        walls: (N, 3) points in nav2's map frame, metres.
        views: (M, 3) positions of cameras.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import Affine2D

    height, width = grid.occupied.shape
    shades = np.where(grid.occupied, 0.0, np.where(grid.free, 1.0, 0.75))
    figure = Figure(figsize=(9.0, max(4.0, min(14.0, 9.0 * height / width))), layout="constrained")
    axes = figure.add_subplot()
    extent = (0.0, width * grid.resolution_m, 0.0, height * grid.resolution_m)
    placed = Affine2D(grid.T_map_grid[np.ix_([0, 1, 3], [0, 1, 3])]) + axes.transData
    axes.imshow(shades, cmap="gray", origin="lower", extent=extent, transform=placed, vmin=0, vmax=1)
    axes.scatter(walls[:, 0], walls[:, 1], s=1.5, c="#d84315", linewidths=0, label="points of the map")
    axes.scatter(views[:, 0], views[:, 1], s=6, c="#1565c0", linewidths=0, label="its views")
    corners = np.array([[x, y, 0.0, 1.0] for x in extent[:2] for y in extent[2:]]) @ grid.T_map_grid.T
    shown = np.concatenate([corners[:, :2], walls[:, :2], views[:, :2]])
    axes.set_xlim(shown[:, 0].min(), shown[:, 0].max())
    axes.set_ylim(shown[:, 1].min(), shown[:, 1].max())
    axes.set_aspect("equal")
    axes.set_xlabel("x [m]")
    axes.set_ylabel("y [m]")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
