# SPDX-License-Identifier: Apache-2.0
"""A source whose poses come from a reconstruction of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.base import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame, Matrix


class ReconstructedSource(DerivedSource):
    """Images, and depth if there is any, of one source with the poses of a reconstruction.

    Args:
        source: the images; its own poses are not shown.
        poses: ``T_map_camera`` by position; images that found no place have none.
        points: (N, 3) points in the map frame that each image sees, by position.
        camera: what the reconstruction found where the source's camera was a guess.
    """

    passes_images_on = True

    def __init__(
        self,
        source: FrameSource,
        poses: Mapping[int, Matrix],
        points: Mapping[int, NDArray[np.float64]],
        camera: Camera | None = None,
    ) -> None:
        super().__init__(source)
        self._poses, self._points = poses, points
        self._camera = camera or source.camera

    @property
    def camera(self) -> Camera:
        return self._camera

    @property
    def camera_is_guess(self) -> bool:
        return False

    def changed(self, frame: Frame, position: int) -> Frame:
        return replace(frame, camera=self._camera, T_map_camera=self._poses.get(position))

    def pose(self, position: int) -> Matrix | None:
        return self._poses.get(position)

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        return self._points.get(position)
