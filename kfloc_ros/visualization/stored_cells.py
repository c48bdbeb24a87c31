# SPDX-License-Identifier: Apache-2.0
"""Coordinate maps in KFNet's format (``coord_<i>.npy``, ``<a>_<b>_flow.npy``) as point clouds and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import (
    NO_VALUE,
    SIGMA,
    coordinates_picture,
    flow_colours,
    sigma_picture,
)
from kfloc_ros.visualization.clouds import Cloud
from kfloc_ros.visualization.from_above import Ortho
from kfloc_ros.visualization.ply import merged, surest, write_ply
from kfloc_ros.visualization.series import PictureSeries, write_picture
from kfloc_ros.visualization.sheet import SEPARATOR, Panel, Sheet, panel_of
from kfloc_ros.visualization.stream import read_coordinate_folder, read_flow, read_stored


def show_stored(folder: Path, out: Path, series: PictureSeries, max_sigma_m: float, voxel_m: float) -> Iterator[str]:
    """Draw every map of a folder; yields an empty line for each, and then what was written.

    Raises:
        SourceError: a file is damaged, or no map has a point that is certain enough.
    """
    camera, paths = read_coordinate_folder(folder)
    # two passes, since the colours of coordinates need the extent of all of them
    clouds = [surest(sigma_cloud(read_stored(path).coordinates), max_sigma_m) for path in paths]
    whole = merged(clouds, voxel_m)
    if not len(whole.points):
        raise SourceError(
            f"None of the {len(paths)} maps in '{folder}' has a point more certain than {max_sigma_m:g} m; "
            "raise --max-sigma."
        )
    low, high = (np.quantile(whole.points, q, axis=0).astype(np.float64) for q in (0.005, 0.995))
    sheet = Sheet(3, camera.width, camera.height)
    for path, cloud in zip(paths, clouds, strict=True):
        stored = read_stored(path)
        write_ply(out / "cells" / f"{stored.index:06d}.ply", cloud, path.name)
        coordinates = stored.coordinates
        panels = [
            Panel("scene coordinates: x, y, z as red, green, blue", coordinates_picture(coordinates, (low, high)).rgb),
            panel_of("noise", sigma_picture("", coordinates.variance, coordinates.valid), SIGMA, ""),
            _flow_panel(folder, stored.index, max_sigma_m),
        ]
        sure = len(cloud.points) / max(coordinates.valid.numel(), 1)
        title = f"{folder.name}/{path.name}{SEPARATOR}{sure:.0%} of the cells surer than {100 * max_sigma_m:g} cm"
        series.add(stored.index, sheet.draw(title, panels))
        yield ""
    write_ply(out / "cloud.ply", whole, folder.name)
    write_picture(out / "cloud.png", _three_views(whole, low, high, f"{folder.name}: {len(paths)} maps"))
    yield f"{out / 'cells'}: {len(paths)} point clouds"
    yield f"{out / 'cloud.ply'}: {len(whole.points)} points of all maps"
    yield f"{out / 'cloud.png'}"


def sigma_cloud(coordinates: SceneCoordinates) -> Cloud:
    """The points (N, 3) of a map without an image, coloured by their standard deviation."""
    points = coordinates.mean.permute(1, 2, 0).float().numpy().reshape(-1, 3).copy()
    sigma = coordinates.variance.sqrt().float().numpy().reshape(-1)
    points[~coordinates.valid.numpy().reshape(-1)] = np.nan
    return Cloud(points, SIGMA.rgb(100 * sigma), sigma)


def _flow_panel(folder: Path, index: int, max_sigma_m: float) -> Panel:
    grid = read_flow(folder, index)
    if grid is None:
        return Panel("flow", None, wheel=True, nothing=f"no {index}_{index - 1}_flow.npy")
    colours = flow_colours(grid[..., :2].transpose(2, 0, 1))
    uncertain = ~(grid[..., 2] >= 1.0 / max_sigma_m)  # of the prior that it carries here
    colours[uncertain] = NO_VALUE
    return Panel(f"flow to map {index - 1}, {uncertain.mean():.0%} uncertain (grey)", colours, wheel=True)


def _three_views(cloud: Cloud, low: np.ndarray, high: np.ndarray, title: str) -> np.ndarray:
    views = [Panel(f"along {'xyz'[axis]}", Ortho(low, high, axis, 1.0).draw(cloud)) for axis in range(3)]
    views[-1] = Panel(views[-1].title, views[-1].rgb, SIGMA)
    return Sheet(3, 640, 480).draw(f"{title}, {len(cloud.points)} points by standard deviation", views)
