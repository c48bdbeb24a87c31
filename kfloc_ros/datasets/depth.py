# SPDX-License-Identifier: Apache-2.0
"""Depth images: registration of one camera's depth to another camera."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.distortion import Distortion
from kfloc_ros.types import Matrix


def one_to_one(camera: Camera, normalized_xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rays (x/z, y/z), (N, 2), lie where a camera's distortion means something; see ``distortion.py``."""
    tensor = CameraTensor.from_camera(camera)
    r2 = (normalized_xy**2).sum(axis=1)
    squared = np.arctan(np.sqrt(r2)) ** 2 if tensor.kind is Distortion.FISHEYE else r2
    return np.asarray(squared < float(tensor.limit))


def register_depth(
    depth_m: NDArray[np.float32], source: Camera, target: Camera, T_target_source: Matrix
) -> NDArray[np.float32]:
    """Forward-project a depth image (H, W) of one camera into another, each with its own lens; nearest surface wins.

    Every sample fills a 2x2 patch, so that a slightly denser target grid has no pinholes.
    Returns (target.height, target.width) metres, 0 where nothing projects.
    """
    v, u = np.nonzero(depth_m > 0)
    z = depth_m[v, u].astype(np.float64)
    if source.is_pinhole:
        points = np.stack([(u - source.cx) / source.fx * z, (v - source.cy) / source.fy * z, z])
    else:
        pixels = torch.from_numpy(np.stack([u, v], axis=1).astype(np.float64))
        points = CameraTensor.from_camera(source).image2world(pixels).numpy().T * z
    points = T_target_source[:3, :3] @ points + T_target_source[:3, 3:]
    keep = points[2] > 1e-3
    x, y, z = points[:, keep]
    if target.is_pinhole:
        columns, lines = x / z * target.fx + target.cx, y / z * target.fy + target.cy
    else:
        rays = np.stack([x / z, y / z], axis=1)
        valid = one_to_one(target, rays)
        z = z[valid]
        columns, lines = target.distort(rays[valid]).T
    left = np.floor(columns).astype(np.int64)
    top = np.floor(lines).astype(np.int64)
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
