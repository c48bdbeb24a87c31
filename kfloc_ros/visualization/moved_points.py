# SPDX-License-Identifier: Apache-2.0
"""Where an alignment found a map's points in a picture, and where it took them."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix

START_COLOUR, END_COLOUR = (230, 60, 50), (70, 220, 80)
REFERENCE_WIDTH_PX = 640


def draw_moved_points(
    image: NDArray[np.uint8], camera: Camera, points: NDArray[np.float64], T_start: Matrix, T_end: Matrix | None
) -> NDArray[np.uint8]:
    """The image (H, W, 3) with points (N, 3) of the map where they are seen from the start (red) and the end (green).

    Args:
        image: of the camera, any lens.
        camera: of the image.
        points: to draw.
        T_start: T_map_camera before the alignment.
        T_end: after it, or None where it failed.
    """
    picture = np.ascontiguousarray((0.65 * image + 0.35 * 128).astype(np.uint8))
    radius = max(round(2 * image.shape[1] / REFERENCE_WIDTH_PX), 1)
    for T, colour in ((T_start, START_COLOUR), (T_end, END_COLOUR)):
        if T is None:
            continue
        for x, y in np.rint(_seen(camera, points, T)).astype(int).tolist():
            cv2.circle(picture, (x, y), radius, colour, cv2.FILLED, cv2.LINE_AA)
    return picture


def _seen(camera: Camera, points: NDArray[np.float64], T_map_camera: Matrix) -> NDArray[np.float64]:
    """Pixels (M, 2) of the points that are in view."""
    local = torch.from_numpy((points - T_map_camera[:3, 3]) @ T_map_camera[:3, :3])
    found = CameraTensor.from_camera(camera).world2image(local)
    return np.asarray(found.points[found.valid].numpy(), dtype=np.float64)
