# SPDX-License-Identifier: Apache-2.0
"""Camera intrinsics: pinhole with an optional OpenCV distortion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.files import MAX_IMAGE_PIXELS

DISTORTION_LENGTHS: dict[str, tuple[int, ...]] = {
    "none": (0,),
    "plumb_bob": (4, 5),
    "rational_polynomial": (8,),
    "equidistant": (4,),
}
"""Distortion models of ``sensor_msgs/CameraInfo``, each with its possible numbers of coefficients."""


FOCAL_SIDES = (0.05, 100.0)
"""Focal lengths of cameras, in longer sides of the image: of wide fisheyes, and of small parts of a telephoto image."""
MAX_CENTRE_SIDES = 20.0
"""Largest distance of a principal point from the image's middle, in longer sides: that of a small part of an image."""
SAME_SHARE = 0.005
"""Calibrations that differ by no more than this share of the image's width are of one camera."""
BENT, BENT_AT = (0.3, 3.0), 0.25
"""Factors by which a lens moves a point towards the principal point or away from it, at the second share of the shorter
side; at most, real lenses move points there by a fifth."""


def known_coefficients(model: str, coefficients: Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients that a distortion model has, without the zeros that pad them.

    Drivers and tools pad with zeros, for example plumb_bob to 8 and rational_polynomial to 12 or 14. For an unknown
    model, and with a non-zero value beyond its coefficients, all are returned, and :class:`Camera` refuses them.
    """
    most = max(DISTORTION_LENGTHS.get(model, (len(coefficients),)))
    return tuple(coefficients if any(coefficients[most:]) else coefficients[:most])


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics in pixels; pixel (0, 0) is the centre of the top-left pixel.

    Whatever a camera is read from, its numbers are checked here.

    Raises:
        FrameError: a value is not finite, a size or focal length is not positive, the distortion model is unknown or
            has the wrong number of coefficients, or no camera has such numbers.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion_model: str = "none"
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # YAML and JSON writers refuse NumPy's numbers, and a map is written only after minutes of work.
        for name in ("width", "height"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("fx", "fy", "cx", "cy"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "distortion", tuple(float(k) for k in self.distortion))
        values = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if not all(math.isfinite(v) for v in values):
            raise FrameError(f"Camera intrinsics must be finite numbers, got {values}.")
        if self.width <= 0 or self.height <= 0:
            raise FrameError(f"Camera size must be positive, got {self.width}x{self.height}.")
        if self.fx <= 0 or self.fy <= 0:
            raise FrameError(
                f"Focal lengths must be positive, got fx={self.fx}, fy={self.fy}; "
                "an all-zero K means that the camera driver has no calibration."
            )
        lengths = DISTORTION_LENGTHS.get(self.distortion_model)
        if lengths is None:
            known = ", ".join(DISTORTION_LENGTHS)
            raise FrameError(f"Unknown distortion model '{self.distortion_model}'; known: {known}.")
        if len(self.distortion) not in lengths:
            raise FrameError(
                f"Distortion model '{self.distortion_model}' takes {lengths} coefficients, got {len(self.distortion)}."
            )
        if fault := self._absurdity():
            raise FrameError(f"{fault}, which no camera has: see that its numbers are in order, and in pixels.")

    def _absurdity(self) -> str:
        """What is wrong with finite numbers that no camera has; empty if nothing is."""
        side = max(self.width, self.height)
        size = f"{self.width}x{self.height} pixels"
        if self.width * self.height > MAX_IMAGE_PIXELS:
            return f"A camera has {size}, more than the {MAX_IMAGE_PIXELS} allowed"
        low, high = FOCAL_SIDES
        if not low * side <= min(self.fx, self.fy) <= max(self.fx, self.fy) <= high * side:
            return f"A camera of {size} has the focal lengths fx {self.fx:g} and fy {self.fy:g}"
        if max(abs(self.cx - self.width / 2), abs(self.cy - self.height / 2)) > MAX_CENTRE_SIDES * side:
            return f"A camera of {size} has the principal point ({self.cx:g}, {self.cy:g})"
        if any(self.distortion) and not self._bends_little():
            return f"A camera of {size} has the distortion {self.distortion_model} {list(self.distortion)}"
        return ""

    def _bends_little(self) -> bool:
        """Whether the distortion leaves points in the middle part of the image about where they are."""
        r = BENT_AT * min(self.width, self.height) / max(self.fx, self.fy)
        if self.distortion_model == "equidistant":
            angle = math.atan(r)
            r2 = angle * angle
            k1, k2, k3, k4 = self.distortion
            factor = angle / r * (1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4))))
            return BENT[0] <= factor <= BENT[1]
        k1, k2, p1, p2, k3, k4, k5, k6 = (*self.distortion, *[0.0] * (8 - len(self.distortion)))
        r2 = r * r
        above, below = 1 + r2 * (k1 + r2 * (k2 + r2 * k3)), 1 + r2 * (k4 + r2 * (k5 + r2 * k6))
        slant = 3 * r * max(abs(p1), abs(p2))
        return slant <= 1 and below > 0 and BENT[0] * below <= above <= BENT[1] * below

    @property
    def K(self) -> NDArray[np.float64]:
        """(3, 3) calibration matrix."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]], dtype=np.float64)

    @property
    def is_pinhole(self) -> bool:
        """True if pixels are linear in (x/z, y/z); never for an equidistant lens, whatever its coefficients."""
        return self.distortion_model != "equidistant" and not any(self.distortion)

    def pinhole(self) -> Camera:
        """Return the same camera without distortion."""
        return replace(self, distortion_model="none", distortion=())

    def scaled_to(self, width: int, height: int) -> Camera:
        """Return the intrinsics after resizing the image to (width, height); the half-pixel offset is accounted for."""
        sx, sy = width / self.width, height / self.height
        return replace(
            self,
            width=width,
            height=height,
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx - 0.5,
            cy=(self.cy + 0.5) * sy - 0.5,
        )

    def distort(self, normalized_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return pixels (N, 2) of rays (N, 2) given as (x/z, y/z)."""
        if not len(normalized_xy):
            return np.empty((0, 2))
        rays = np.concatenate([normalized_xy, np.ones((len(normalized_xy), 1))], axis=1)
        if self.distortion_model == "equidistant":
            pixels, _ = cv2.fisheye.projectPoints(
                rays[:, None], np.zeros(3), np.zeros(3), self.K, np.array(self.distortion)
            )
        else:
            pixels, _ = cv2.projectPoints(rays[:, None], np.zeros(3), np.zeros(3), self.K, np.array(self.distortion))
        return np.asarray(pixels, dtype=np.float64).reshape(-1, 2)

    def is_other(self, other: Camera) -> bool:
        """Return true if two calibrations are of two cameras, or of another zoom; autofocus moves less."""
        return self != other and self.difference_px(other) > SAME_SHARE * self.width

    def difference_px(self, other: Camera) -> float:
        """Return the largest distance, over the image, between a ray's pixels in two cameras; inf if sizes differ."""
        if (self.width, self.height) != (other.width, other.height):
            return math.inf
        u, v = np.meshgrid(np.linspace(0, self.width - 1, 9), np.linspace(0, self.height - 1, 9))
        rays = np.stack([(u - self.cx) / self.fx, (v - self.cy) / self.fy], axis=-1).reshape(-1, 2)
        return float(np.linalg.norm(self.distort(rays) - other.distort(rays), axis=1).max())


class ImageAdapter:
    """Converter of images from one camera to another pinhole camera: undistorts, scales and crops in one remap.

    The field of view is the target's; pixels that the source does not see become black.

    Args:
        source: camera of the images.
        target: pinhole camera of the results.

    Raises:
        FrameError: the target has distortion.
    """

    def __init__(self, source: Camera, target: Camera) -> None:
        if not target.is_pinhole:
            raise FrameError("The target camera of an image adapter must be a pinhole.")
        self.source, self.target = source, target
        self._maps: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        if source.pinhole() != target or not source.is_pinhole:
            u, v = np.meshgrid(np.arange(target.width), np.arange(target.height))
            rays = np.stack([(u - target.cx) / target.fx, (v - target.cy) / target.fy], axis=-1)
            pixels = source.distort(rays.reshape(-1, 2).astype(np.float64)).astype(np.float32)
            grid = pixels.reshape(target.height, target.width, 2)
            self._maps = (np.ascontiguousarray(grid[..., 0]), np.ascontiguousarray(grid[..., 1]))

    @property
    def is_identity(self) -> bool:
        """True if images are returned unchanged."""
        return self._maps is None

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Convert an (H, W, 3) image of the source camera to the target camera.

        Raises:
            FrameError: the image does not have the size of the source camera.
        """
        self._check(image.shape)
        if self._maps is None:
            return image
        return np.asarray(cv2.remap(image, *self._maps, cv2.INTER_LINEAR), dtype=np.uint8)

    def nearest(self, depth_m: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert an (H, W) depth image by nearest sample; depth is never interpolated across edges.

        Raises:
            FrameError: the image does not have the size of the source camera.
        """
        self._check(depth_m.shape)
        if self._maps is None:
            return depth_m
        return np.asarray(cv2.remap(depth_m, *self._maps, cv2.INTER_NEAREST), dtype=np.float32)

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[:2] != (self.source.height, self.source.width):
            raise FrameError(
                f"The image is {shape[1]}x{shape[0]} but its camera_info says {self.source.width}x{self.source.height}."
            )
