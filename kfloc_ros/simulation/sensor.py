# SPDX-License-Identifier: Apache-2.0
"""Sensor of a small camera: motion blur, exposure, vignetting, noise, gamma."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.simulation.render import Array, Rendering
from kfloc_ros.types import Matrix

_GRID_PX = 8
_LUT = np.arange(4096, dtype=np.float64) / 4095
_TO_SRGB = np.rint(
    255 * np.where(_LUT < 0.0031308, 12.92 * _LUT, 1.055 * np.maximum(_LUT, 1e-9) ** (1 / 2.4) - 0.055)
).astype(np.uint8)


@dataclass(frozen=True)
class SensorModel:
    """Properties of the camera."""

    exposure_s: float = 0.010
    target_brightness: float = 0.20
    """Mean linear value that the automatic exposure aims at."""
    exposure_strength: float = 0.7
    """Share of the correction towards its target that the automatic exposure applies."""
    shot_noise: float = 0.00035
    """Variance per linear value."""
    read_noise: float = 0.0025
    """Standard deviation in linear values."""
    vignetting: float = 0.28
    """Share of light lost in the corners."""


class Sensor:
    """Converter from renderings to images.

    Args:
        camera: camera of the renderings.
        model: properties of the sensor.
    """

    def __init__(self, camera: Camera, model: SensorModel | None = None) -> None:
        self.model = model or SensorModel()
        self._camera = camera
        ys, xs = np.mgrid[: camera.height, : camera.width].astype(np.float32)
        self._xs, self._ys = xs, ys
        radius_sq = (xs - camera.cx) ** 2 + (ys - camera.cy) ** 2
        self._lens = (1 - self.model.vignetting * radius_sq / radius_sq.max())[..., None].astype(np.float32)

    def expose(
        self, rendering: Rendering, T_start: Matrix, T_middle: Matrix, T_end: Matrix, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """Return the (H, W, 3) RGB image of an exposure during which the camera moved.

        Args:
            rendering: rendering from ``T_middle``.
            T_start: T_map_camera when the shutter opens.
            T_middle: in the middle of the exposure.
            T_end: when it closes.
            rng: random generator of the noise.
        """
        light = self._blurred(rendering, T_start, T_middle, T_end)
        mean = float(np.minimum(light, 1.0).mean())
        gain = (self.model.target_brightness / max(mean, 1e-4)) ** self.model.exposure_strength
        values = light * (np.float32(gain) * self._lens)
        spread = np.sqrt(np.float32(self.model.shot_noise) * values + np.float32(self.model.read_noise**2))
        values += spread * rng.standard_normal(values.shape, dtype=np.float32)
        return np.asarray(_TO_SRGB[np.clip(values * 4095, 0, 4095).astype(np.uint16)], dtype=np.uint8)

    def _blurred(self, rendering: Rendering, T_start: Matrix, T_middle: Matrix, T_end: Matrix) -> Array:
        """Return the mean over the exposure.

        Surfaces are looked up along their path in the middle image. That is right except within a path's length of an
        occlusion; paths are a few pixels long.
        """
        path_x, path_y = self._paths(rendering.depth_m, T_start, T_middle, T_end)
        longest = float(np.sqrt(path_x**2 + path_y**2).max())
        count = min(7, int(np.ceil(longest / 1.5)))
        if count < 2:
            return rendering.radiance
        size = (self._camera.width, self._camera.height)
        path_x, path_y = (cv2.resize(path, size, interpolation=cv2.INTER_LINEAR) for path in (path_x, path_y))
        total = np.zeros_like(rendering.radiance)
        for share in (np.arange(count) + 0.5) / count - 0.5:
            x, y = self._xs + np.float32(share) * path_x, self._ys + np.float32(share) * path_y
            total += cv2.remap(rendering.radiance, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return total / np.float32(count)

    def _paths(self, depth_m: Array, T_start: Matrix, T_middle: Matrix, T_end: Matrix) -> tuple[Array, Array]:
        """Return the motion in the image of each point of a coarse grid during the exposure, in pixels."""
        camera, half = self._camera, _GRID_PX // 2
        xs, ys = self._xs[half::_GRID_PX, half::_GRID_PX], self._ys[half::_GRID_PX, half::_GRID_PX]
        z = depth_m[half::_GRID_PX, half::_GRID_PX]
        points = np.stack([(xs - camera.cx) / camera.fx * z, (ys - camera.cy) / camera.fy * z, z]).reshape(3, -1)
        ends = []
        for T in (T_start, T_end):
            moved = inverse_pose(T) @ T_middle
            x, y, w = moved[:3, :3] @ points + moved[:3, 3:]
            w = np.maximum(w, 0.05)
            ends.append((camera.fx * x / w, camera.fy * y / w))
        path_x, path_y = ((end - start).reshape(z.shape) for start, end in zip(*ends, strict=True))
        return path_x.astype(np.float32), path_y.astype(np.float32)
