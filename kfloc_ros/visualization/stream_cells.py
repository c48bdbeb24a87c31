# SPDX-License-Identifier: Apache-2.0
"""Scene coordinates of a stream, accumulated in one cloud."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.messages.clouds import Cloud
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import NO_VALUE, SIGMA, coordinates_picture, flow_colours, sigma_picture
from kfloc_ros.visualization.clouds import Ortho, below, cell_cloud, merged, precise_points, write_ply
from kfloc_ros.visualization.filter import cell_panels
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import log_frame
from kfloc_ros.visualization.sheet import SEPARATOR, Panel, Sheet, panel_of
from kfloc_ros.visualization.stream import View, read_coordinate_folder, read_flow, read_stored
from kfloc_ros.visualization.video import PictureSeries, write_picture

HEADROOM_M = 0.6
"""Height above the cameras, in metres, above which points are not drawn from above: they would hide the room."""


class CellStream:
    """Accumulator of frames, one after the other.

    Args:
        bounds_m: smallest and largest corner of the map.
        up: vertical axis of the map, and its sign.
        max_sigma_m: largest standard deviation of a point.
        voxel_m: side of a voxel, in which only the point with the lowest variance is used.
    """

    def __init__(
        self, bounds_m: Sequence[Sequence[float]], up: tuple[int, float], max_sigma_m: float, voxel_m: float
    ) -> None:
        self.cloud = self._latest = merged([], voxel_m)
        self._bounds, self._up = bounds_m, up
        self._max_sigma_m, self._voxel_m = max_sigma_m, voxel_m
        self._way: list[NDArray[np.float64]] = []
        self._files = 0
        low, high = (np.array(corner, dtype=np.float64) for corner in bounds_m)
        self._above = Ortho(low, high, *up)
        side = next(k for k in range(3) if k != up[0])
        self._side = Ortho(low, high, side, 1.0, upward=up)

    def add(self, view: View, folder: Path) -> list[Panel]:
        """Write the frame's PLY into a folder, add its points to the cloud, and return the panels of its sheet."""
        coordinates, pose = view.coarse.scene_coordinates, view.coarse.pose
        assert coordinates is not None  # the stages run in this process
        cloud = precise_points(cell_cloud(coordinates, view.frame.image), self._max_sigma_m)
        write_ply(folder / f"{view.frame.index:06d}.ply", cloud, f"frame {view.frame.index}")
        self._files += 1
        self._latest = cloud
        self.cloud = merged([self.cloud, cloud], self._voxel_m)
        if pose.T_map_camera is not None:
            self._way.append(pose.T_map_camera[:3, 3])
        from_above = self._above.draw(self._low_enough(), path=self._line(), camera=pose.T_map_camera)
        return cell_panels(view.frame, view.coarse, self._bounds, from_above)

    def log(self, recording: Recording, view: View) -> None:
        """Log the frame, and its points, which remain visible."""
        log_frame(recording, view)
        recording.cloud(f"map/cloud/{view.frame.index}", self._latest.points, self._latest.colours, radius_m=0.006)

    def write(self, out: Path, title: str) -> list[str]:
        """Write ``cloud.ply`` and ``cloud.png`` of all frames; return a description of the files."""
        count = write_ply(out / "cloud.ply", self.cloud, title)
        sheet = Sheet(2, self._above.width, self._above.height)
        panels = [
            Panel("from above, with the camera path", self._above.draw(self._low_enough(), path=self._line())),
            Panel("from the side", self._side.draw(self.cloud, path=self._line())),
        ]
        rule = f"sigma below {100 * self._max_sigma_m:g} cm, one point in {100 * self._voxel_m:g} cm"
        heading = f"{title}: scene coordinates of {self._files} frames, {count} points ({rule})"
        write_picture(out / "cloud.png", sheet.draw(heading, panels))
        return [
            f"{out / 'cells'}: {self._files} point clouds",
            f"{out / 'cloud.ply'}: {count} points of all frames",
            f"{out / 'cloud.png'}",
        ]

    def _line(self) -> NDArray[np.float64] | None:
        return np.array(self._way) if self._way else None

    def _low_enough(self) -> Cloud:
        if not self._way:
            return self.cloud
        axis, sign = self._up
        return below(self.cloud, axis, sign, max(sign * centre[axis] for centre in self._way) + HEADROOM_M)


def show_stored(
    folder: Path,
    out: Path,
    series: PictureSeries,
    max_sigma_m: float,
    voxel_m: float,
    recording: Recording | None = None,
) -> Iterator[str]:
    """Draw every map of a folder; yields an empty line for each, and then the files written.

    Args:
        folder: folder of ``coord_<i>.npy``.
        out: folder for point clouds and the picture of all of them.
        series: output of the sheets.
        max_sigma_m: points with a larger standard deviation are omitted.
        voxel_m: one point per cube of this side is kept.
        recording: recording that each map's points are logged to, and stay in.

    Raises:
        SourceError: a file is damaged, or no map has a point with a low standard deviation.
    """
    camera, paths = read_coordinate_folder(folder)
    # two passes, since the colours of coordinates depend on the extent of all of them
    clouds = [precise_points(sigma_cloud(read_stored(path).coordinates), max_sigma_m) for path in paths]
    whole = merged(clouds, voxel_m)
    if not len(whole.points):
        raise SourceError(
            f"None of the {len(paths)} maps in '{folder}' has a point with a standard deviation below {max_sigma_m:g} "
            "m; increase --max-sigma."
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
        title = f"{folder.name}/{path.name}{SEPARATOR}{sure:.0%} of the cells below {100 * max_sigma_m:g} cm"
        series.add(stored.index, sheet.draw(title, panels))
        if recording is not None:
            recording.at(stored.index)
            recording.cloud(f"map/cloud/{stored.index}", cloud.points, cloud.colours, radius_m=0.006)
        yield ""
    write_ply(out / "cloud.ply", whole, folder.name)
    write_picture(out / "cloud.png", _three_views(whole, low, high, f"{folder.name}: {len(paths)} maps"))
    yield f"{out / 'cells'}: {len(paths)} point clouds"
    yield f"{out / 'cloud.ply'}: {len(whole.points)} points of all maps"
    yield f"{out / 'cloud.png'}"


def sigma_cloud(coordinates: SceneCoordinates) -> Cloud:
    """Return the points (N, 3) of a map without an image, coloured by their standard deviation."""
    points = coordinates.mean.permute(1, 2, 0).float().numpy().reshape(-1, 3).copy()
    sigma = coordinates.variance.sqrt().float().numpy().reshape(-1)
    points[~coordinates.valid.numpy().reshape(-1)] = np.nan
    return Cloud(points, SIGMA.rgb(100 * sigma), sigma)


def _flow_panel(folder: Path, index: int, max_sigma_m: float) -> Panel:
    grid = read_flow(folder, index)
    if grid is None:
        return Panel("flow", None, wheel=True, nothing=f"no {index}_{index - 1}_flow.npy")
    colours = flow_colours(grid[..., :2].transpose(2, 0, 1))
    uncertain = ~(grid[..., 2] >= 1.0 / max_sigma_m)  # standard deviation of the prior that it propagates
    colours[uncertain] = NO_VALUE
    return Panel(f"flow to map {index - 1}, {uncertain.mean():.0%} uncertain (grey)", colours, wheel=True)


def _three_views(cloud: Cloud, low: np.ndarray, high: np.ndarray, title: str) -> np.ndarray:
    views = [Panel(f"along {'xyz'[axis]}", Ortho(low, high, axis, 1.0).draw(cloud)) for axis in range(3)]
    views[-1] = Panel(views[-1].title, views[-1].rgb, SIGMA)
    return Sheet(3, 640, 480).draw(f"{title}, {len(cloud.points)} points by standard deviation", views)
