# SPDX-License-Identifier: Apache-2.0
"""Pictures on a wall, with exact depth and poses: what the reference networks and PixLoc are tested on."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.training.pixloc_samples import Pairs
from kfloc_ros.types import Frame, Matrix

CAMERA = Camera(128, 96, 110.0, 110.0, 64.0, 48.0)


class Poster(FrameSource):
    """A smooth picture on a plane at z = 2, seen by a camera that moves sideways; indices jump in the middle."""

    name = "poster"
    camera = CAMERA  # type: ignore[assignment]

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        self._picture = cv2.resize(noise, (600, 400), interpolation=cv2.INTER_CUBIC)

    def __len__(self) -> int:
        return 8

    def indices(self) -> Sequence[int]:
        return [0, 1, 2, 3, 50, 51, 52, 53]

    def __getitem__(self, position: int) -> Frame:
        T = make_pose(so3_exp([0.0, 0.0, 0.02 * position]), [0.04 * position, 0.0, 0.0])
        v, u = np.mgrid[:96, :128].astype(np.float64)
        rays = np.stack([(u - 64) / 110, (v - 48) / 110, np.ones_like(u)], axis=-1) @ T[:3, :3].T
        depth = (2.0 - T[2, 3]) / rays[..., 2]
        hit = T[:3, 3] + rays * depth[..., None]
        xy = (hit[..., :2] * 100 + [250, 200]).astype(np.float32)
        image = cv2.remap(self._picture, xy[..., 0], xy[..., 1], cv2.INTER_LINEAR)
        return Frame(
            image, CAMERA, self.indices()[position] * 33_000_000, self.indices()[position],
            depth_m=depth.astype(np.float32), T_map_camera=T,
        )  # fmt: skip


def wall(camera: Camera, T_wall_camera: Matrix) -> np.ndarray:
    """A textured wall at z = 2.5 m, seen through the camera's lens."""
    rng = np.random.default_rng(5)
    texture = np.zeros((600, 800, 3), dtype=np.float32)
    for cells in (12, 30, 60):
        noise = rng.uniform(0, 255, (cells * 3 // 4, cells, 3)).astype(np.float32)
        texture += cv2.resize(noise, (800, 600), interpolation=cv2.INTER_CUBIC) / 3
    u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    pixels = torch.from_numpy(np.stack([u, v], -1).reshape(-1, 2).astype(np.float64))
    rays = CameraTensor.from_camera(camera).image2world(pixels).numpy() @ T_wall_camera[:3, :3].T
    hits = T_wall_camera[:3, 3] + rays * ((2.5 - T_wall_camera[2, 3]) / rays[:, 2:])
    xy = (hits[:, :2] * 120 + [400, 300]).astype(np.float32).reshape(camera.height, camera.width, 2)
    return cv2.remap(texture, xy, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT).clip(0, 255).astype(np.uint8)


def colour_difference(pairs: Pairs, roll: int = 0) -> float:
    """Median difference of colour between the two views of a pair, at the points that both see."""
    uv_r = pairs.camera_reference.world2image(pairs.points)
    uv_q = pairs.camera_query.world2image(pairs.T_true.transform(pairs.points))
    both = uv_r.valid & uv_q.valid
    assert int(both.sum()) > 15
    colours = [
        FeatureMap.from_maps(image.double()).sample(uv.points).values[both]
        for image, uv in ((pairs.reference, uv_r), (pairs.query, uv_q))
    ]
    return float((colours[0] - colours[1].roll(roll, 0)).abs().median())
