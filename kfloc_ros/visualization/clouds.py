# SPDX-License-Identifier: Apache-2.0
"""What there is to see in the map frame: the map's points, its reference views, the scene coordinates of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import Scale

MAX_MAP_POINTS = 150_000
FRUSTUM_DEPTH_M = 0.12
CORNERS_OF_LINES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))
"""The lines of a camera symbol: from its centre (0) to the image's corners (1 to 4), and around these."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """Coloured points; organised ones keep the shape of their image."""

    points: NDArray[np.float32]
    """(..., 3) metres, map frame; NaN where there is no point."""
    colours: NDArray[np.uint8]
    """(..., 3) RGB."""
    sigma_m: NDArray[np.float32] | None = None
    """(...) standard deviation per axis, where it is known."""


def map_cloud(scene_map: MapOutline, limit: int = MAX_MAP_POINTS) -> Cloud:
    """All reference points, evenly thinned to ``limit``, coloured by height: maps keep no colours."""
    points = np.concatenate([view.points.cpu().numpy() for view in scene_map.references.views]).astype(np.float32)
    points = points[:: -(-len(points) // limit)]
    axis, sign = up_axis(scene_map)
    height = sign * points[:, axis]
    low, high = np.quantile(height, [0.02, 0.98])
    return Cloud(points, Scale("height [m]", float(low), float(max(high, low + 1e-3))).rgb(height))


def cell_cloud(coordinates: SceneCoordinates, image: NDArray[np.uint8]) -> Cloud:
    """The points that the cells of an image (H, W, 3) see, in the cells' order (h, w), in the image's colours."""
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
    """Line segments (K, 8, 2, 3) of camera symbols for poses (K, 4, 4): pyramids from the centre to the image plane."""
    corners = camera_corners(camera, depth_m)
    placed = corners @ T_map_camera[:, :3, :3].transpose(0, 2, 1) + T_map_camera[:, None, :3, 3]
    return placed[:, np.array(CORNERS_OF_LINES)]


def camera_corners(camera: Camera, depth_m: float) -> Matrix:
    """(5, 3) in the camera's frame: its centre, and the corners of its image at a depth, around."""
    u = np.array([-0.5, camera.width - 0.5, camera.width - 0.5, -0.5])
    v = np.array([-0.5, -0.5, camera.height - 0.5, camera.height - 0.5])
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones(4)], axis=1)
    return np.concatenate([np.zeros((1, 3)), depth_m * rays])
