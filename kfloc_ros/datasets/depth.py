# SPDX-License-Identifier: Apache-2.0
"""Depth images: registration of one camera's depth to another camera."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Matrix


def register_depth(
    depth_m: NDArray[np.float32], source: Camera, target: Camera, T_target_source: Matrix
) -> NDArray[np.float32]:
    """Forward-project a depth image (H, W) into another pinhole camera, nearest surface wins.

    Every sample fills a 2x2 patch, so that a slightly denser target grid has no pinholes.
    Returns (target.height, target.width) metres, 0 where nothing projects.
    """
    v, u = np.nonzero(depth_m > 0)
    z = depth_m[v, u].astype(np.float64)
    points = np.stack([(u - source.cx) / source.fx * z, (v - source.cy) / source.fy * z, z])
    points = T_target_source[:3, :3] @ points + T_target_source[:3, 3:]
    keep = points[2] > 1e-3
    x, y, z = points[:, keep]
    left = np.floor(x / z * target.fx + target.cx).astype(np.int64)
    top = np.floor(y / z * target.fy + target.cy).astype(np.int64)
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
