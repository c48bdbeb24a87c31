# SPDX-License-Identifier: Apache-2.0
"""Point clouds seen along an axis of the map, without perspective."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.visualization.clouds import Cloud

BACKGROUND = 250
BARS_M = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Ortho:
    """A view along an axis, with everything between two corners in it.

    Args:
        low, high: corners of the box to see, metres.
        axis: along which one looks, 0 to 2.
        sign: of the direction from the scene to the eye along it.
        upward: the axis, and its sign, that points up in the picture; None: whichever fits.
        width, height: of the picture in pixels.
    """

    def __init__(
        self,
        low: NDArray[np.float64],
        high: NDArray[np.float64],
        axis: int,
        sign: float,
        *,
        upward: tuple[int, float] | None = None,
        width: int = 640,
        height: int = 480,
    ) -> None:
        size = np.maximum(high - low, 0.1)
        others = [k for k in range(3) if k != axis]
        if upward is None:
            upward = (min(others, key=lambda k: size[k]), 1.0)
        across = next(k for k in others if k != upward[0])
        eye, up = np.zeros(3), np.zeros(3)
        eye[axis], up[upward[0]] = sign, upward[1]
        right = np.cross(up, eye)
        self._axes = np.stack([right, -up, eye])
        self.width, self.height = width, height
        self.pixels_per_m = float(0.92 * min(width / size[across], height / size[upward[0]]))
        self._centre = (low + high) / 2

    def pixels(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 3): where points (N, 3) are drawn, and how near to the eye they are, in metres."""
        seen = (np.asarray(points, dtype=np.float64) - self._centre) @ self._axes.T
        seen[:, :2] = seen[:, :2] * self.pixels_per_m + (self.width / 2, self.height / 2)
        return np.asarray(seen)

    def draw(
        self,
        cloud: Cloud,
        *,
        way: NDArray[np.float64] | None = None,
        camera: Matrix | None = None,
        size_px: int = 3,
    ) -> NDArray[np.uint8]:
        """The picture (height, width, 3) of a cloud (N, 3), nearer points over farther ones.

        Args:
            cloud: to draw.
            way: (K, 3) camera centres to join by a line.
            camera: pose ``T_map_camera`` to mark, with its viewing direction.
            size_px: of a point.
        """
        picture = np.full((self.height, self.width, 3), BACKGROUND, np.uint8)
        seen = self.pixels(cloud.points)
        order = np.argsort(seen[:, 2], kind="stable")
        places = np.rint(seen[order, :2]).astype(int)
        colours = cloud.colours[order]
        for du in range(size_px):
            for dv in range(size_px):
                u, v = places[:, 0] + du, places[:, 1] + dv
                inside = (u >= 0) & (u < self.width) & (v >= 0) & (v < self.height)
                picture[v[inside], u[inside]] = colours[inside]
        if way is not None and len(way) > 1:
            line = np.rint(self.pixels(way)[:, :2]).astype(np.int32)
            cv2.polylines(picture, [line], False, (216, 67, 21), 1, cv2.LINE_AA)
        if camera is not None:
            self._mark(picture, camera)
        self._bar(picture)
        return picture

    def _mark(self, picture: NDArray[np.uint8], T_map_camera: Matrix) -> None:
        ends = self.pixels(np.stack([T_map_camera[:3, 3], T_map_camera[:3, 3] + 0.35 * T_map_camera[:3, 2]]))
        start, end = (tuple(np.rint(p[:2]).astype(int).tolist()) for p in ends)
        cv2.arrowedLine(picture, start, end, (216, 20, 20), 2, cv2.LINE_AA, tipLength=0.35)
        cv2.circle(picture, start, 4, (216, 20, 20), cv2.FILLED, cv2.LINE_AA)

    def _bar(self, picture: NDArray[np.uint8]) -> None:
        """A scale bar of a round length."""
        fitting = [bar for bar in BARS_M if bar * self.pixels_per_m < 0.3 * self.width]
        length = fitting[-1] if fitting else BARS_M[0]
        x, y = 14, self.height - 14
        end = x + round(length * self.pixels_per_m)
        picture[y - 24 :, : end + 14] = BACKGROUND
        cv2.line(picture, (x, y), (end, y), (30, 30, 30), 2)
        for place in (x, end):
            cv2.line(picture, (place, y - 4), (place, y + 4), (30, 30, 30), 2)
        cv2.putText(
            picture, f"{length:g} m", (x + 4, y - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA
        )


def below(cloud: Cloud, axis: int, sign: float, height_m: float) -> Cloud:
    """The points not above a height, so that a ceiling does not hide the room."""
    keep = sign * cloud.points[:, axis] <= height_m
    return Cloud(cloud.points[keep], cloud.colours[keep], None if cloud.sigma_m is None else cloud.sigma_m[keep])
