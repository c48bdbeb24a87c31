# SPDX-License-Identifier: Apache-2.0
"""Point clouds and line symbols in the map frame: the map's points, its reference views, scene coordinates; PLY
files.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.place import MapInfo
from kfloc_ros.messages.clouds import Cloud, ply_bytes
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import Scale

MAX_MAP_POINTS = 150_000
FRUSTUM_DEPTH_M = 0.12
CORNERS_OF_LINES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))
"""Lines of a camera symbol: from its centre (0) to the image's corners (1 to 4), and around these."""


def map_cloud(scene_map: MapInfo, limit: int = MAX_MAP_POINTS) -> Cloud:
    """Return all reference points, evenly thinned to ``limit``, coloured by height (maps store no colours)."""
    points = np.concatenate([view.points.cpu().numpy() for view in scene_map.references.views]).astype(np.float32)
    points = points[:: -(-len(points) // limit)]
    axis, sign = up_axis(scene_map)
    height = sign * points[:, axis]
    low, high = np.quantile(height, [0.02, 0.98])
    return Cloud(points, Scale("height [m]", float(low), float(max(high, low + 1e-3))).rgb(height))


def cell_cloud(coordinates: SceneCoordinates, image: NDArray[np.uint8]) -> Cloud:
    """Return the scene points of an image's (H, W, 3) cells, in the cells' order (h, w), in the image's colours."""
    points = coordinates.mean.detach().cpu().float().permute(1, 2, 0).numpy().copy()
    valid = coordinates.valid.cpu().numpy() & np.isfinite(points).all(axis=2)
    points[~valid] = np.nan
    sigma = coordinates.variance.detach().cpu().float().clamp(min=0).sqrt().numpy()
    rows, columns = (
        np.clip(np.rint(coordinates.stride * np.arange(n) + coordinates.pixel_offset).astype(int), 0, side - 1)
        for n, side in zip(valid.shape, image.shape[:2], strict=True)
    )
    return Cloud(points, image[rows[:, None], columns], np.where(valid, sigma, np.nan).astype(np.float32))


def camera_symbols(T_map_camera: NDArray[np.float64], camera: Camera, depth_m: float) -> NDArray[np.float64]:
    """Return line segments (K, 8, 2, 3) of camera symbols for poses (K, 4, 4): pyramids from the centre to the image
    plane.
    """
    corners = camera_corners(camera, depth_m)
    placed = corners @ T_map_camera[:, :3, :3].transpose(0, 2, 1) + T_map_camera[:, None, :3, 3]
    return placed[:, np.array(CORNERS_OF_LINES)]


def camera_corners(camera: Camera, depth_m: float) -> Matrix:
    """Return (5, 3) in the camera's frame: its centre, and the corners of its image at a depth, in order."""
    u = np.array([-0.5, camera.width - 0.5, camera.width - 0.5, -0.5])
    v = np.array([-0.5, -0.5, camera.height - 0.5, camera.height - 0.5])
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones(4)], axis=1)
    return np.concatenate([np.zeros((1, 3)), depth_m * rays])


BACKGROUND = 250
BARS_M = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Ortho:
    """Orthographic view along an axis of everything between two corners.

    Args:
        low, high: corners of the visible box, metres.
        axis: viewing axis, 0 to 2.
        sign: sign of the direction from the scene to the viewer along the axis.
        upward: axis that points up in the picture, and its sign; None: the one that fits best.
        width, height: size of the picture in pixels.
    """

    def __init__(
        self,
        low: NDArray[np.float64],
        high: NDArray[np.float64],
        axis: int,
        sign: float,
        *,
        upward: tuple[int, float] | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        size = np.maximum(high - low, 0.1)
        others = [k for k in range(3) if k != axis]
        if upward is None:
            upward = (min(others, key=lambda k: size[k]), 1.0)
        across = next(k for k in others if k != upward[0])
        eye, up = np.zeros(3), np.zeros(3)
        eye[axis], up[upward[0]] = sign, upward[1]
        right = np.cross(up, eye)
        self._axes = np.stack([right, -up, eye])
        self.width, self.height = width, height
        self.pixels_per_m = float(0.92 * min(width / size[across], height / size[upward[0]]))
        self._centre = (low + high) / 2

    def pixels(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return (N, 3): pixels of points (N, 3), and their nearness to the viewer in metres."""
        projected = (np.asarray(points, dtype=np.float64) - self._centre) @ self._axes.T
        projected[:, :2] = projected[:, :2] * self.pixels_per_m + (self.width / 2, self.height / 2)
        return np.asarray(projected)

    def draw(
        self,
        cloud: Cloud,
        *,
        path: NDArray[np.float64] | None = None,
        camera: Matrix | None = None,
        size_px: int = 3,
    ) -> NDArray[np.uint8]:
        """Return the picture (height, width, 3) of a cloud (N, 3), nearer points over farther ones.

        Args:
            cloud: points to draw.
            path: (K, 3) camera centres to join by a line.
            camera: pose ``T_map_camera`` to mark, with its viewing direction.
            size_px: size of a point.
        """
        picture = np.full((self.height, self.width, 3), BACKGROUND, np.uint8)
        projected = self.pixels(cloud.points)
        order = np.argsort(projected[:, 2], kind="stable")
        places = np.rint(projected[order, :2]).astype(int)
        colours = cloud.colours[order]
        for du in range(size_px):
            for dv in range(size_px):
                u, v = places[:, 0] + du, places[:, 1] + dv
                inside = (u >= 0) & (u < self.width) & (v >= 0) & (v < self.height)
                picture[v[inside], u[inside]] = colours[inside]
        if path is not None and len(path) > 1:
            line = np.rint(self.pixels(path)[:, :2]).astype(np.int32)
            cv2.polylines(picture, [line], False, (216, 67, 21), 1, cv2.LINE_AA)
        if camera is not None:
            self._mark(picture, camera)
        self._bar(picture)
        return picture

    def _mark(self, picture: NDArray[np.uint8], T_map_camera: Matrix) -> None:
        ends = self.pixels(np.stack([T_map_camera[:3, 3], T_map_camera[:3, 3] + 0.35 * T_map_camera[:3, 2]]))
        start, end = (tuple(np.rint(p[:2]).astype(int).tolist()) for p in ends)
        cv2.arrowedLine(picture, start, end, (216, 20, 20), 2, cv2.LINE_AA, tipLength=0.35)
        cv2.circle(picture, start, 4, (216, 20, 20), cv2.FILLED, cv2.LINE_AA)

    def _bar(self, picture: NDArray[np.uint8]) -> None:
        """Draw a scale bar of a round length."""
        fitting = [bar for bar in BARS_M if bar * self.pixels_per_m < 0.3 * self.width]
        length = fitting[-1] if fitting else BARS_M[0]
        x, y = 14, self.height - 14
        end = x + round(length * self.pixels_per_m)
        picture[y - 24 :, : end + 14] = BACKGROUND
        cv2.line(picture, (x, y), (end, y), (30, 30, 30), 2)
        for place in (x, end):
            cv2.line(picture, (place, y - 4), (place, y + 4), (30, 30, 30), 2)
        cv2.putText(
            picture, f"{length:g} m", (x + 4, y - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA
        )


def below(cloud: Cloud, axis: int, sign: float, height_m: float) -> Cloud:
    """Return the points below a height, so that a ceiling does not hide the room."""
    keep = sign * cloud.points[:, axis] <= height_m
    return Cloud(cloud.points[keep], cloud.colours[keep], None if cloud.sigma_m is None else cloud.sigma_m[keep])


def write_ply(path: Path, cloud: Cloud, comment: str = "") -> int:
    """Write x, y, z in metres, red, green, blue, and sigma if the cloud has it; return the number of points.

    Points that are not finite are omitted.
    """
    points = np.asarray(cloud.points, dtype=np.float32).reshape(-1, 3)
    finite = np.isfinite(points).all(axis=1)
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    if cloud.sigma_m is not None:
        fields.append(("sigma", "<f4"))
    table = np.zeros(int(finite.sum()), dtype=fields)
    for k, name in enumerate("xyz"):
        table[name] = points[finite, k]
    for k, name in enumerate(("red", "green", "blue")):
        table[name] = cloud.colours.reshape(-1, 3)[finite, k]
    if cloud.sigma_m is not None:
        table["sigma"] = cloud.sigma_m.reshape(-1)[finite]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ply_bytes(table, comment.strip() or "kfloc"))
    return len(table)


def precise_points(cloud: Cloud, max_sigma_m: float) -> Cloud:
    """Return the points (N, 3) of a cloud that are finite and have at most this standard deviation."""
    points = cloud.points.reshape(-1, 3)
    keep = np.isfinite(points).all(axis=1)
    sigma: NDArray[np.float32] | None = None
    if cloud.sigma_m is not None:
        sigma = cloud.sigma_m.reshape(-1)
        keep &= sigma <= max_sigma_m
        sigma = sigma[keep]
    return Cloud(points[keep], cloud.colours.reshape(-1, 3)[keep], sigma)


def merged(clouds: list[Cloud], voxel_m: float) -> Cloud:
    """Return clouds (N, 3) as one: of the points in a voxel, the one with the lowest variance (or the first)."""
    if not clouds:
        return Cloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))
    points = np.concatenate([c.points for c in clouds])
    colours = np.concatenate([c.colours for c in clouds])
    sigma = np.concatenate([np.zeros(len(c.points), np.float32) if c.sigma_m is None else c.sigma_m for c in clouds])
    order = np.argsort(sigma, kind="stable")
    _, first = np.unique(np.floor(points[order] / voxel_m).astype(np.int64), axis=0, return_index=True)
    chosen = order[first]
    return Cloud(points[chosen], colours[chosen], sigma[chosen])
