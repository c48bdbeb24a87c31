# SPDX-License-Identifier: Apache-2.0
"""Camera in a scene: a renderer to radiance and exact depth, and a sensor with blur, exposure, noise and gamma.

All surfaces are flat, so the ray caster only has to find the surface of each pixel; depth and texture position follow
exactly from the surface's homography.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.simulation.scene import Scene
from kfloc_ros.types import Matrix

Array = NDArray[np.float32]
Ids = NDArray[np.int32]
Value = TypeVar("Value", bound=np.generic)

_BLOCK_PX = 4
_EDGE_SAMPLES = ((-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
"""Rotated grid of four samples for pixels that see more than one surface, in pixels from the centre."""
_TO_LINEAR = (((np.arange(1024) / 1023 + 0.055) / 1.055) ** 2.4).astype(np.float32)
_TO_LINEAR[:42] = np.arange(42) / 1023 / 12.92


@dataclass(frozen=True)
class Illumination:
    """Strength of each light, as linear RGB; white paper in full light has 1."""

    west_lamp: tuple[float, float, float]
    east_lamp: tuple[float, float, float]
    window: tuple[float, float, float]
    ambient: tuple[float, float, float]

    def matrix(self) -> Array:
        """Return (3, 4): from the light map's channels to RGB."""
        return np.array([self.west_lamp, self.east_lamp, self.window, self.ambient], np.float32).T


@dataclass(frozen=True, eq=False)
class Rendering:
    """Image of a pinhole camera, before the sensor."""

    radiance: Array
    """(H, W, 3) linear RGB."""
    depth_m: Array
    """(H, W) exact depth along the optical axis, at pixel centres."""


class Renderer:
    """Renderer of one scene with one pinhole camera.

    Args:
        scene: the scene.
        camera: camera without distortion.
    """

    def __init__(self, scene: Scene, camera: Camera) -> None:
        self._scene, self._camera = scene, camera
        ys, xs = np.mgrid[: camera.height, : camera.width].astype(np.float32)
        self._xs, self._ys = xs, ys
        self._K_inverse = np.linalg.inv(camera.K)
        light = scene.light_map
        shown, lit, packing = scene.picture_of, scene.patch_of, scene.atlas.packing
        self._atlas_scale, self._atlas_offset = _span(
            scene.picture_px[:, 0], scene.picture_px[:, 1], packing.left[shown], packing.top[shown]
        )
        self._light_scale, self._light_offset = _span(
            light.columns[lit], light.rows[lit], light.left[lit], light.top[lit]
        )
        self._corner = np.stack([face.corner for face in scene.faces])
        # Rows that give the picture position (a, b) of a map point relative to the corner, also for skewed faces.
        self._to_picture = np.stack([np.linalg.pinv(np.stack([face.right, face.down], axis=1)) for face in scene.faces])
        self._normal = np.stack([face.normal for face in scene.faces])

    def render(self, T_map_camera: Matrix, illumination: Illumination) -> Rendering:
        """Render from a pose; the result is undefined for a camera inside a solid."""
        homographies = self._homographies(T_map_camera)
        ids = self._visible_faces(T_map_camera)
        radiance, inverse_depth = self._shade(ids, self._xs, self._ys, homographies, illumination)
        edges = _edges(ids)
        if edges.any():
            radiance[edges] = self._supersample(edges, T_map_camera, homographies, illumination)
        return Rendering(radiance, (1.0 / inverse_depth).astype(np.float32))

    def hits(self, T_map_camera: Matrix) -> NDArray[np.bool_]:
        """Return the pixels (H, W) that see a surface; elsewhere, a rendering is undefined."""
        ids = self._cast(self._xs.reshape(-1), self._ys.reshape(-1), T_map_camera)
        return np.asarray(ids.reshape(self._xs.shape) >= 0)

    def _homographies(self, T_map_camera: Matrix) -> NDArray[np.float64]:
        """Return (n, 3, 3): pixel (x, y, 1) to (a / z, b / z, 1 / z) with (a, b) the position in the face's picture."""
        R, center = T_map_camera[:3, :3], T_map_camera[:3, 3]
        offset = center - self._corner
        height = -np.einsum("ij,ij->i", self._normal, offset)
        height = np.where(np.abs(height) < 1e-9, 1e-9, height)
        inverse_depth = (self._normal @ R) / height[:, None]
        position = np.einsum("nij,jk->nik", self._to_picture, R)
        start = np.einsum("nij,nj->ni", self._to_picture, offset)
        rows = np.concatenate([position + start[..., None] * inverse_depth[:, None], inverse_depth[:, None]], axis=1)
        return np.asarray(rows @ self._K_inverse)

    def _rays(self, x: Array, y: Array, T_map_camera: Matrix) -> Array:
        matrix = (T_map_camera[:3, :3] @ self._K_inverse).astype(np.float32)
        return np.stack([matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] for i in range(3)], axis=-1)

    def _cast(self, x: Array, y: Array, T_map_camera: Matrix) -> Ids:
        return self._scene.caster.hit_face(T_map_camera[:3, 3], self._rays(x, y, T_map_camera))

    def _visible_faces(self, T_map_camera: Matrix) -> Ids:
        """Return the (H, W) face of each pixel; rays are cast on a coarse grid, and densely where faces meet."""
        height, width = self._xs.shape
        grid_y, grid_x = np.mgrid[0 : height + _BLOCK_PX : _BLOCK_PX, 0 : width + _BLOCK_PX : _BLOCK_PX]
        flat = (grid_x.reshape(-1).astype(np.float32), grid_y.reshape(-1).astype(np.float32))
        grid = self._cast(*flat, T_map_camera).reshape(grid_x.shape)
        corners = (grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:])
        mixed = np.any([corner != corners[0] for corner in corners[1:]], axis=0)
        mixed = cv2.dilate(mixed.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        ids = _enlarge(corners[0])[:height, :width].copy()
        open_pixels = _enlarge(mixed)[:height, :width]
        ids[open_pixels] = self._cast(self._xs[open_pixels], self._ys[open_pixels], T_map_camera)
        return _close_cracks(ids)

    def _emission(self, illumination: Illumination) -> Array:
        """Return (n, 3) linear RGB that each face emits."""
        colors = np.concatenate([illumination.matrix().T[:3], np.ones((1, 3), np.float32)])  # -1 takes the last
        return np.asarray(self._scene.emission[:, None] * colors[self._scene.light_of], np.float32)

    def _supersample(
        self, edges: NDArray[np.bool_], T_map_camera: Matrix, homographies: NDArray[np.float64], light: Illumination
    ) -> Array:
        """Return (n, 3) means over several points of every edge pixel."""
        x0, y0 = self._xs[edges], self._ys[edges]
        total = np.zeros((len(x0), 3), np.float32)
        for dx, dy in _EDGE_SAMPLES:
            x, y = x0 + np.float32(dx), y0 + np.float32(dy)
            ids = _close_cracks(self._cast(x, y, T_map_camera)[None])[0]
            radiance, _ = self._shade(_rows(ids), _rows(x), _rows(y), homographies, light)
            total += radiance.reshape(-1, 3)[: len(x)]
        return np.asarray(total / len(_EDGE_SAMPLES), np.float32)

    def _shade(
        self, ids: Ids, x: Array, y: Array, homographies: NDArray[np.float64], illumination: Illumination
    ) -> tuple[Array, Array]:
        """Return radiance (h, w, 3) and inverse depth (h, w) at pixels that see the given faces."""
        h = homographies.reshape(-1, 9).astype(np.float32)
        a, b, inverse_depth = (h[:, 3 * i][ids] * x + h[:, 3 * i + 1][ids] * y + h[:, 3 * i + 2][ids] for i in range(3))
        inverse_depth = np.maximum(inverse_depth, 1e-3)
        a = np.clip(a / inverse_depth, 0, 1)
        b = np.clip(b / inverse_depth, 0, 1)
        texel_area = np.abs(np.linalg.det(homographies)) * self._scene.picture_px.prod(axis=1)
        bias = np.log2(np.maximum(texel_area, 1e-12)).astype(np.float32)
        level = 0.5 * (bias[ids] - 3.0 * np.log2(inverse_depth))
        encoded = self._scene.atlas.sample(*_place(a, b, ids, self._atlas_scale, self._atlas_offset), level)
        albedo = _TO_LINEAR[(encoded * (1023 / 255)).astype(np.int32)]
        u, v = _place(a, b, ids, self._light_scale, self._light_offset)
        light = cv2.remap(self._scene.light_map.values, u, v, cv2.INTER_LINEAR)
        light = cv2.transform(light, illumination.matrix())
        shining = self._scene.emission[ids] > 0
        light[shining] += self._emission(illumination)[ids[shining]]
        radiance = albedo * light
        return radiance, inverse_depth


def _span(
    columns: NDArray[np.int64], rows: NDArray[np.int64], left: NDArray[np.int64], top: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Return scale and offset from picture positions 0..1 to texel coordinates; texel centres are whole numbers."""
    scale = np.stack([columns, rows], axis=1).astype(np.float32)
    offset = np.stack([left, top], axis=1).astype(np.float32) - np.float32(0.5)
    return scale, offset


def _place(a: Array, b: Array, ids: Ids, scale: Array, offset: Array) -> tuple[Array, Array]:
    u = a * scale[:, 0][ids] + offset[:, 0][ids]
    v = b * scale[:, 1][ids] + offset[:, 1][ids]
    return u, v


def _enlarge(blocks: NDArray[Value]) -> NDArray[Value]:
    return blocks.repeat(_BLOCK_PX, axis=0).repeat(_BLOCK_PX, axis=1)


def _edges(ids: Ids) -> NDArray[np.bool_]:
    """Return the pixels with a neighbour that sees another face."""
    edges = np.zeros(ids.shape, bool)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges


def _close_cracks(ids: Ids) -> Ids:
    """Assign the few rays that slip between two faces to the face on their left."""
    missed = ids < 0
    if not missed.any():
        return ids
    columns = np.where(missed, 0, np.arange(ids.shape[1]))
    filled = np.take_along_axis(ids, np.maximum.accumulate(columns, axis=1), axis=1)
    return np.maximum(filled, 0)


def _rows(values: NDArray[Value], width: int = 512) -> NDArray[Value]:
    """Return a list as an image with the last row filled up, for OpenCV's lookup, whose rows must not be too long."""
    missing = -len(values) % width
    return np.concatenate([values, np.repeat(values[-1:], missing)]).reshape(-1, width)


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


class DirtyLens:
    """Smears and specks on the lens, out of focus.

    Args:
        amount: 0 to 1; 1 covers about half of the image.
        camera: camera of the images.
        seed: seed of the dirt.
    """

    def __init__(self, amount: float, camera: Camera, seed: int) -> None:
        rng = np.random.default_rng((seed, 74))
        cover = np.zeros((camera.height, camera.width), np.float32)
        for number in range(60):
            centre = rng.uniform(0, 1, 2) * (camera.width, camera.height)
            axes = rng.uniform(0.015, 0.09, 2) * camera.width
            angle, strength = float(rng.uniform(0, 180)), float(rng.uniform(0.5, 1.0))
            if number < round(60 * amount):
                spot = ((int(centre[0]), int(centre[1])), (int(axes[0]) + 1, int(axes[1]) + 1))
                cv2.ellipse(cover, *spot, angle, 0, 360, strength, -1)
        blur = camera.width / 60
        self._cover = 0.9 * cv2.GaussianBlur(cover, (0, 0), blur)[..., None]
        self._spread = camera.width / 25

    def over(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image (H, W, 3) as seen through the dirt: scattered light, some of it lost."""
        values = image.astype(np.float32)
        scattered = 0.75 * cv2.GaussianBlur(values, (0, 0), self._spread)
        return np.asarray(np.rint(values + self._cover * (scattered - values)), np.uint8)
