# SPDX-License-Identifier: Apache-2.0
"""A picture on a wall, with exact depth and poses: what the reference networks' training and figures are tested on."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.types import Frame

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
