# SPDX-License-Identifier: Apache-2.0
"""Scene coordinates of a stream, accumulated in one cloud; and stored coordinate maps and flows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.images import read_image
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import so3_exp
from kfloc_ros.kfnet.reference.files import STRIDE, read_description
from kfloc_ros.messages.clouds import Cloud
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import NO_VALUE, SIGMA, Scale, coordinates_picture, flow_colours, sigma_picture
from kfloc_ros.visualization.clouds import Ortho, below, cell_cloud, merged, precise_points, write_ply
from kfloc_ros.visualization.filter import cell_panels
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import log_frame
from kfloc_ros.visualization.sheet import SEPARATOR, Panel, Sheet, panel_of
from kfloc_ros.visualization.stream import StoredFiles, View, read_flow, read_stored
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
        noise: scale of the noise.
    """

    def __init__(
        self,
        bounds_m: Sequence[Sequence[float]],
        up: tuple[int, float],
        max_sigma_m: float,
        voxel_m: float,
        noise: Scale = SIGMA,
    ) -> None:
        self.cloud = self._latest = merged([], voxel_m)
        self._bounds, self._up = bounds_m, up
        self._max_sigma_m, self._voxel_m, self._noise = max_sigma_m, voxel_m, noise
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
        return cell_panels(view.frame, view.coarse, self._bounds, from_above, self._noise)

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


@dataclass(frozen=True)
class StoredView:
    """Options of the viewers of stored maps and flows."""

    max_sigma_m: float
    """Points and flows with a larger standard deviation are omitted."""
    voxel_m: float = 0.02
    """One point per cube of this side is kept."""
    step: int = 1
    """Every ``step``-th file is drawn."""
    rotate_deg: float = 0.0
    """Rotation of the points about the x axis, for scenes whose vertical axis is not the viewer's."""
    noise: Scale = SIGMA
    images: Sequence[Path] = ()
    """Images by the numbers in the files' names; empty: none."""

    def rotated(self, cloud: Cloud) -> Cloud:
        """Return the cloud, rotated."""
        if not self.rotate_deg:
            return cloud
        turn = so3_exp([np.radians(self.rotate_deg), 0.0, 0.0])
        return replace(cloud, points=(cloud.points @ turn.T).astype(np.float32))

    def image(self, number: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8] | None:
        """Return an image by its number; None if there are no images.

        Raises:
            SourceError: the number is beyond the images.
            FrameError: the image cannot be read, or has another size.
        """
        if not self.images:
            return None
        if len(self.images) == 1:
            return read_image(self.images[0], size)
        if number >= len(self.images):
            raise SourceError(f"A file is of image {number}, and --images has {len(self.images)} images.")
        return read_image(self.images[number], size)


def show_stored(
    files: StoredFiles,
    name: str,
    out: Path,
    series: PictureSeries,
    options: StoredView,
    recording: Recording | None = None,
) -> Iterator[str]:
    """Draw every map; yields an empty line for each, and then the files written.

    Args:
        files: coordinate maps.
        name: title of the whole.
        out: folder for point clouds and the picture of all of them.
        series: output of the sheets.
        options: what is drawn, and how.
        recording: recording that each map's points are logged to, and stay in.

    Raises:
        SourceError: a file is damaged, or no map has a point with a low standard deviation.
    """
    limit = options.max_sigma_m
    # two passes, since the colours of coordinates depend on the extent of all of them
    clouds = [_stored_cloud(path, number, options) for path, number in zip(files.paths, files.numbers, strict=True)]
    whole = merged(clouds, options.voxel_m)
    if not len(whole.points):
        raise SourceError(
            f"None of the {len(clouds)} maps of '{name}' has a point with a standard deviation below {limit:g} m; "
            "increase --max-sigma."
        )
    low, high = (np.quantile(whole.points, q, axis=0).astype(np.float64) for q in (0.005, 0.995))
    camera = read_description(files.paths[0].parent).camera
    sheet = Sheet(2 if options.images else 3, camera.width, camera.height)
    for path, number, cloud in zip(files.paths, files.numbers, clouds, strict=True):
        coordinates = read_stored(path)
        write_ply(out / "cells" / f"{number:06d}.ply", cloud, path.name)
        noise = sigma_picture("", coordinates.variance, coordinates.valid, options.noise)
        image = options.image(number)
        panels = [
            *([] if image is None else [Panel(f"image {number}", image)]),
            Panel("scene coordinates: x, y, z as red, green, blue", coordinates_picture(coordinates, (low, high)).rgb),
            panel_of("noise", noise, options.noise, ""),
            _flow_panel(path.with_name(f"{number}_{number - 1}_flow.npy"), number, limit),
        ]
        sure = len(cloud.points) / max(coordinates.valid.numel(), 1)
        title = f"{name}: {path.name}{SEPARATOR}{sure:.0%} of the cells below {100 * limit:g} cm"
        series.add(number, sheet.draw(title, panels))
        if recording is not None:
            recording.at(number)
            recording.cloud(f"map/cloud/{number}", cloud.points, cloud.colours, radius_m=0.006)
        yield ""
    write_ply(out / "cloud.ply", whole, name)
    kind = "in their images' colours" if options.images else "by standard deviation"
    write_picture(out / "cloud.png", _three_views(whole, low, high, f"{name}: {len(clouds)} maps", kind))
    yield f"{out / 'cells'}: {len(clouds)} point clouds"
    yield f"{out / 'cloud.ply'}: {len(whole.points)} points of all maps"
    yield f"{out / 'cloud.png'}"


def _stored_cloud(path: Path, number: int, options: StoredView) -> Cloud:
    coordinates = read_stored(path)
    image = options.image(number)
    cloud = sigma_cloud(coordinates) if image is None else cell_cloud(coordinates, image)
    return options.rotated(precise_points(cloud, options.max_sigma_m))


def sigma_cloud(coordinates: SceneCoordinates) -> Cloud:
    """Return the points (N, 3) of a map without an image, coloured by their standard deviation."""
    points = coordinates.mean.permute(1, 2, 0).float().numpy().reshape(-1, 3).copy()
    sigma = coordinates.variance.sqrt().float().numpy().reshape(-1)
    points[~coordinates.valid.numpy().reshape(-1)] = np.nan
    return Cloud(points, SIGMA.rgb(100 * sigma), sigma)


def show_flows(
    flows: Sequence[tuple[int, int, Path]], name: str, series: PictureSeries, options: StoredView
) -> Iterator[str]:
    """Draw every flow (a, b, file) as arrows over its two images, and in colours; yields an empty line for each.

    Raises:
        SourceError: a file is damaged, or there is no such image.
    """
    sheet, omitted = Sheet(1, 1, 1), 0.0
    for count, (a, b, path) in enumerate(flows):
        grid = read_flow(path)
        if grid is None:
            raise SourceError(f"There is no file '{path}'.")
        height, width = STRIDE * grid.shape[0], STRIDE * grid.shape[1]
        panel, share = _stored_flow(grid, f"flow of image {a} to where it was in image {b}", options.max_sigma_m)
        first, second = (0, 1) if len(options.images) == 2 else (a, b)
        here, there = options.image(first), options.image(second)
        panels = [panel]
        if here is not None and there is not None:
            height, width = here.shape[:2]
            title = f"arrows from image {a} to image {b}, the two blended"
            panels.insert(0, Panel(title, flow_over_images(grid, here, there, options.max_sigma_m)))
        if not count:
            sheet = Sheet(len(panels), width, height)
        omitted += share
        rule = f"{share:.0%} above {100 * options.max_sigma_m:g} cm omitted"
        series.add(a, sheet.draw(f"{name}: {path.name}{SEPARATOR}{rule}", panels))
        yield ""
    if omitted > 0.999 * len(flows):
        yield f"All flow is above {100 * options.max_sigma_m:g} cm; increase --max-sigma to see it."


ARROW_STEP_CELLS = 3
ARROW_COLOUR = (0, 230, 0)


def flow_over_images(
    grid: NDArray[np.float32], here: NDArray[np.uint8], there: NDArray[np.uint8], max_sigma_m: float
) -> NDArray[np.uint8]:
    """Return two images blended (H, W, 3), with arrows from cells of the first to their places in the second.

    Args:
        grid: (h, w, 3) flow in cells at the cells of the first image, and 1/sigma in 1/m.
        here, there: (H, W, 3) of equal size.
        max_sigma_m: flow with a larger standard deviation is omitted.

    Raises:
        SourceError: the images differ in size.
    """
    if here.shape != there.shape:
        raise SourceError(f"A flow is between images of equal size, got {here.shape[:2]} and {there.shape[:2]}.")
    picture = cv2.addWeighted(here, 0.5, there, 0.5, 0.0)
    thickness = max(round(here.shape[1] / 250), 1)
    step, half = ARROW_STEP_CELLS, STRIDE / 2
    for row in range(step - 1, grid.shape[0] - step + 1, step):
        for column in range(step - 1, grid.shape[1] - step + 1, step):
            u, v, certainty = (float(value) for value in grid[row, column])
            if not (certainty >= 1.0 / max_sigma_m and np.isfinite([u, v]).all()):
                continue
            x, y = STRIDE * column + half, STRIDE * row + half
            start, end = ((round(x), round(y)), (round(x + STRIDE * u), round(y + STRIDE * v)))
            cv2.line(picture, start, end, ARROW_COLOUR, thickness, cv2.LINE_AA)
            cv2.circle(picture, start, thickness, ARROW_COLOUR, cv2.FILLED, cv2.LINE_AA)
    return np.asarray(picture, dtype=np.uint8)


def _flow_panel(path: Path, index: int, max_sigma_m: float) -> Panel:
    grid = read_flow(path)
    if grid is None:
        return Panel("flow", None, wheel=True, nothing=f"no {path.name}")
    return _stored_flow(grid, f"flow to map {index - 1}", max_sigma_m)[0]


def _stored_flow(grid: NDArray[np.float32], title: str, max_sigma_m: float) -> tuple[Panel, float]:
    """Return the panel of a flow in colours, and the share of its cells that are uncertain."""
    colours = flow_colours(grid[..., :2].transpose(2, 0, 1))
    uncertain = ~(grid[..., 2] >= 1.0 / max_sigma_m)  # standard deviation of the prior that it propagates
    colours[uncertain] = NO_VALUE
    return Panel(f"{title}, {uncertain.mean():.0%} uncertain (grey)", colours, wheel=True), float(uncertain.mean())


def _three_views(cloud: Cloud, low: np.ndarray, high: np.ndarray, title: str, kind: str) -> np.ndarray:
    views = [Panel(f"along {'xyz'[axis]}", Ortho(low, high, axis, 1.0).draw(cloud)) for axis in range(3)]
    views[-1] = Panel(views[-1].title, views[-1].rgb, SIGMA if "deviation" in kind else None)
    return Sheet(3, 640, 480).draw(f"{title}, {len(cloud.points)} points {kind}", views)
