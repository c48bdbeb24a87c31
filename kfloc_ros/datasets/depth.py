# SPDX-License-Identifier: Apache-2.0
"""Depth images: registration of one camera's depth to another camera."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Matrix


def register_depth(
    depth_m: NDArray[np.float32], source: Camera, target: Camera, T_target_source: Matrix
) -> NDArray[np.float32]:
    """Forward-project a depth image (H, W) into another camera, nearest surface wins; either may have distortion.

    Every sample fills a 2x2 patch, so that a slightly denser target grid has no pinholes.
    Returns (target.height, target.width) metres, 0 where nothing projects.
    """
    v, u = np.nonzero(depth_m > 0)
    z = depth_m[v, u].astype(np.float64)
    if source.is_pinhole:
        points = np.stack([(u - source.cx) / source.fx * z, (v - source.cy) / source.fy * z, z])
    else:
        xy = _rays(source)[v, u]
        keep = np.isfinite(xy).all(axis=1)
        xy, z = xy[keep], z[keep]
        points = np.stack([xy[:, 0] * z, xy[:, 1] * z, z])
    points = T_target_source[:3, :3] @ points + T_target_source[:3, 3:]
    keep = points[2] > 1e-3
    x, y, z = points[:, keep]
    if target.is_pinhole:
        left = np.floor(x / z * target.fx + target.cx).astype(np.int64)
        top = np.floor(y / z * target.fy + target.cy).astype(np.int64)
    else:
        left, top = _pixels(np.stack([x / z, y / z], axis=1), target)
    flat = np.full(target.height * target.width, np.inf, dtype=np.float32)
    order = np.argsort(-z)  # later writes win, so the nearest point is written last
    for du in (0, 1):
        for dv in (0, 1):
            cols, rows = (left + du)[order], (top + dv)[order]
            inside = (cols >= 0) & (cols < target.width) & (rows >= 0) & (rows < target.height)
            where = rows[inside] * target.width + cols[inside]
            layer = np.full_like(flat, np.inf)
            layer[where] = z[order][inside]
            np.minimum(flat, layer, out=flat)
    flat[~np.isfinite(flat)] = 0.0
    return flat.reshape(target.height, target.width)


@lru_cache(maxsize=4)
def _rays(camera: Camera) -> NDArray[np.float64]:
    """(H, W, 2) rays x/z, y/z of the pixels of a camera; NaN where the lens leads none to a pixel."""
    u, v = np.meshgrid(np.arange(camera.width, dtype=np.float64), np.arange(camera.height, dtype=np.float64))
    return camera.undistort(np.stack([u, v], axis=-1).reshape(-1, 2)).reshape(camera.height, camera.width, 2)


def _pixels(xy: NDArray[np.float64], camera: Camera) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns and rows of the pixels of rays (N, 2); -2 for rays that the camera cannot see.

    Far outside of a lens's field its polynomial comes back into the image, so only rays inside the undistorted
    border of the image, and a little beyond, are projected.
    """
    rays = _rays(camera)
    border = np.concatenate([rays[0], rays[-1], rays[:, 0], rays[:, -1]])
    border = border[np.isfinite(border).all(axis=1)]
    seen = np.linalg.norm(xy, axis=1) <= 1.05 * np.linalg.norm(border, axis=1).max(initial=0.0)
    found = np.full((len(xy), 2), -2, dtype=np.int64)
    found[seen] = np.floor(camera.distort(xy[seen])).astype(np.int64)
    return found[:, 0], found[:, 1]
