# SPDX-License-Identifier: Apache-2.0
"""Recording whose poses are told in another frame, as a second session's are before it is joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.types import Frame, Matrix


class InFrame(DerivedSource):
    """Another source whose poses are told in another frame: ``T_new_old`` times what they were."""

    passes_images_on = True

    def __init__(self, source: FrameSource, T_new_old: Matrix) -> None:
        super().__init__(source)
        self._T = T_new_old

    def changed(self, frame: Frame, position: int) -> Frame:
        return frame if frame.T_map_camera is None else replace(frame, T_map_camera=self._T @ frame.T_map_camera)

    def pose(self, position: int) -> Matrix | None:
        T = super().pose(position)
        return None if T is None else self._T @ T

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        points = super().visible_points(position)
        return None if points is None else points @ self._T[:3, :3].T + self._T[:3, 3]
