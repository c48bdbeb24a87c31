# SPDX-License-Identifier: Apache-2.0
"""A source whose poses come from a reconstruction of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame, Matrix


class ReconstructedSource(FrameSource):
    """Images, and depth if there is any, of one source with the poses of a reconstruction.

    Args:
        source: the images; its own poses are not shown.
        poses: ``T_map_camera`` by position; images that found no place have none.
        points: (N, 3) points in the map frame that each image sees, by position.
        camera: what the reconstruction found where the source's camera was a guess.
    """

    def __init__(
        self,
        source: FrameSource,
        poses: Mapping[int, Matrix],
        points: Mapping[int, NDArray[np.float64]],
        camera: Camera | None = None,
    ) -> None:
        self.name = source.name
        self._source, self._poses, self._points = source, poses, points
        self._camera = camera or source.camera

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> Frame:
        position = range(len(self))[position]
        return replace(self._source[position], camera=self._camera, T_map_camera=self._poses.get(position))

    def indices(self) -> Sequence[int]:
        return self._source.indices()

    def encoded_image(self, position: int) -> bytes | None:
        return self._source.encoded_image(position)

    def pose(self, position: int) -> Matrix | None:
        return self._poses.get(position)

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        return self._points.get(position)
