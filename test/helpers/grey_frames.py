# SPDX-License-Identifier: Apache-2.0
"""The smallest sequence that makes a bag: for tests of what a bag holds, not of what can be seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.types import Frame, Matrix

PERIOD_NS = 100_000_000
START_NS = 1_700_000_000_123_456_789


def pose(i: float) -> Matrix:
    """``T_map_camera`` of a frame, or between two."""
    return make_pose(so3_exp([0.1 * i, 0.0, 0.0]), [float(i), 0.0, 1.0])


class Grey(FrameSource):
    """Ten small frames at 10 Hz with depth and truth; frame i is of the grey 20 i."""

    name = "grey"
    camera = Camera(32, 24, 30.0, 30.0, 15.5, 11.5)

    def __len__(self) -> int:
        return 10

    def indices(self) -> Sequence[int]:
        return range(10)

    def __getitem__(self, i: int) -> Frame:
        image = np.full((24, 32, 3), 20 * i, np.uint8)
        depth = np.full((24, 32), 2.0, np.float32)
        return Frame(image, self.camera, START_NS + i * PERIOD_NS, i, depth_m=depth, T_map_camera=pose(i))
