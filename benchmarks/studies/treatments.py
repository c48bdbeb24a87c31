# SPDX-License-Identifier: Apache-2.0
"""Treatments of good images: wrong calibration, changed scenes, bad images and foreign places, with known truth.

A treatment changes the camera that is told, or the image, or both. Image treatments are the same for one image on every
run. If nothing of the map is in the image where the map has it, no pose is right (``has_pose`` is false).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera, ImageAdapter

Image = NDArray[np.uint8]
Paint = Callable[[Image, Image, np.random.Generator], Image]
"""Changes an image (H, W, 3), given an image of another place and a random generator."""


@dataclass(frozen=True)
class Treatment:
    """Change of images or of their camera."""

    name: str
    group: str
    """``clean``, ``camera``, ``scene``, ``image`` or ``elsewhere``."""
    camera: Callable[[Camera], Camera] = lambda camera: camera
    """Makes the camera that is told of the true one."""
    paint: Paint = lambda image, other, rng: image
    has_pose: bool = True
    """False if no pose in the map is right."""
    frozen: bool = False
    """True if one image is repeated with new stamps."""


def _focal(factor: float) -> Callable[[Camera], Camera]:
    return lambda c: replace(c, fx=c.fx * factor, fy=c.fy * factor)


def _told_distortion(k1: float) -> Callable[[Camera], Camera]:
    return lambda c: replace(c, distortion_model="plumb_bob", distortion=(k1, 0.0, 0.0, 0.0, 0.0))


def _distorted(k1: float) -> Paint:
    """Distort an image radially: what a lens does that is not told."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        pinhole = Camera(w, h, 0.82 * w, 0.82 * w, (w - 1) / 2, (h - 1) / 2)
        undo = replace(pinhole, distortion_model="plumb_bob", distortion=(-k1, 0.0, 0.0, 0.0, 0.0))
        return ImageAdapter(undo, pinhole)(image)  # to first order the inverse of k1 is -k1

    return paint


def _zoomed(factor_x: float, factor_y: float) -> Paint:
    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        H = np.array([[factor_x, 0, (1 - factor_x) * (w - 1) / 2], [0, factor_y, (1 - factor_y) * (h - 1) / 2]])
        return _image(cv2.warpAffine(image, H, (w, h), flags=cv2.INTER_LINEAR))

    return paint


def _sheared(px: float) -> Paint:
    """Shift every row by its readout time, as a rolling shutter does in a turn: ``px`` from the first to the last."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        sign = 1 if rng.random() < 0.5 else -1
        H = np.array([[1.0, sign * px / h, -sign * px / 2], [0.0, 1.0, 0.0]])
        return _image(cv2.warpAffine(image, H, (w, h), borderMode=cv2.BORDER_REPLICATE))

    return paint


def _moved(share: float, dx: int, dy: int = 0, at: tuple[float, float] = (0.5, 0.5)) -> Paint:
    """Move a rectangle of the image; the place where it was is filled by its mean colour."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        ph, pw = int(h * share**0.5), int(w * share**0.5)
        y, x = int((h - ph) * at[1]), int((w - pw) * at[0])
        out, patch = image.copy(), image[y : y + ph, x : x + pw].copy()
        out[y : y + ph, x : x + pw] = patch.mean((0, 1)).astype(np.uint8)
        y, x = max(y + dy, 0), max(x + dx, 0)
        part = patch[: h - y, : w - x]
        out[y : y + part.shape[0], x : x + part.shape[1]] = part
        return out

    return paint


def _pasted(count: int, low: float, high: float) -> Paint:
    """Paste rectangles of the image at other places: furniture that was moved."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        out, (h, w) = image.copy(), image.shape[:2]
        for _ in range(count):
            ph, pw = (int(s * rng.uniform(low, high)) for s in (h, w))
            y0, y1 = rng.integers(0, h - ph, 2)
            x0, x1 = rng.integers(0, w - pw, 2)
            out[y1 : y1 + ph, x1 : x1 + pw] = image[y0 : y0 + ph, x0 : x0 + pw]
        return out

    return paint


def _screens(count: int) -> Paint:
    """Replace rectangles by parts of another place: screens and posters with new content."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        out, (h, w) = image.copy(), image.shape[:2]
        for _ in range(count):
            ph, pw = (int(s * rng.uniform(0.2, 0.35)) for s in (h, w))
            y, x = int(rng.integers(0, h - ph)), int(rng.integers(0, w - pw))
            out[y : y + ph, x : x + pw] = cv2.resize(other, (pw, ph), interpolation=cv2.INTER_AREA)
        return out

    return paint


def _people(count: int) -> Paint:
    """Cover parts by people: textured bodies with heads, close to the camera."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        out, (h, w) = image.copy(), image.shape[:2]
        for _ in range(count):
            x, width = int(rng.integers(w // 8, 7 * w // 8)), int(w * rng.uniform(0.12, 0.2))
            mask = np.zeros((h, w), np.uint8)
            cv2.ellipse(mask, (x, h), (width, int(0.65 * h)), 0, 0, 360, 255, -1)
            cv2.circle(mask, (x, int(0.25 * h)), width // 2, 255, -1)
            cloth = rng.integers(30, 200, 3) + rng.normal(0, 12, (h // 8, w // 8, 3))
            cloth = cv2.resize(np.clip(cloth, 0, 255).astype(np.uint8), (w, h))
            out[mask > 0] = cloth[mask > 0]
        return out

    return paint


def _printed(scale: float) -> Paint:
    """Hang a print of the image, a little tilted, in another place."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        sw, sh = w * scale, h * scale
        x, y, tilt = (w - sw) / 2, (h - sh) / 2, 0.06 * sw
        corners = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32)
        shown = np.array([[x, y + tilt], [x + sw, y], [x + sw, y + sh], [x, y + sh - tilt]], np.float32)
        H = cv2.getPerspectiveTransform(corners, shown)
        out = cv2.resize(other, (w, h)).copy()
        inside = cv2.warpPerspective(np.full((h, w), 255, np.uint8), H, (w, h)) > 127
        out[inside] = cv2.warpPerspective(image, H, (w, h))[inside]
        return _image(out)

    return paint


def _motion_blur(px: int) -> Paint:
    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        kernel = np.zeros((px, px), np.float32)
        angle = rng.uniform(0, np.pi)
        half, dx, dy = (px - 1) / 2, np.cos(angle), np.sin(angle)
        for t in np.linspace(-half, half, 4 * px):
            kernel[round(half + t * dy), round(half + t * dx)] = 1.0
        return _image(cv2.filter2D(image, -1, kernel / kernel.sum()))

    return paint


def _defocused(sigma: float) -> Paint:
    return lambda image, other, rng: _image(cv2.GaussianBlur(image, (0, 0), sigma))


def _exposed(gain: float, gamma: float, noise: float) -> Paint:
    """Apply a gamma and gain, then sensor noise (grey values)."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        linear = gain * 255.0 * (image / 255.0) ** gamma
        return np.clip(linear + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)

    return paint


def _jpeg(quality: int) -> Paint:
    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        return _image(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)))

    return paint


def _low_resolution(factor: int) -> Paint:
    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        return _image(cv2.resize(cv2.resize(image, (w // factor, h // factor), interpolation=cv2.INTER_AREA), (w, h)))

    return paint


def _dirt(spots: int) -> Paint:
    """Put blurred spots on the lens."""

    def paint(image: Image, other: Image, rng: np.random.Generator) -> Image:
        h, w = image.shape[:2]
        mask = np.zeros((h, w), np.float32)
        for _ in range(spots):
            at = (int(rng.integers(w)), int(rng.integers(h)))
            cv2.circle(mask, at, int(w * rng.uniform(0.03, 0.1)), 1.0, -1)
        mask = cv2.GaussianBlur(mask, (0, 0), w / 60)[..., None] * 0.85
        veil = cv2.GaussianBlur(image, (0, 0), w / 30) * 0.7 + 25
        return _image(np.clip(image * (1 - mask) + veil * mask, 0, 255))

    return paint


def _glare(image: Image, other: Image, rng: np.random.Generator) -> Image:
    h, w = image.shape[:2]
    u, v = np.meshgrid(np.arange(w) - rng.uniform(0, w), np.arange(h) - rng.uniform(0, h / 2))
    light = 255 * np.exp(-(u * u + v * v) / (2 * (0.25 * w) ** 2)) + 35
    return _image(np.clip(image + light[..., None], 0, 255))


def _mirrored(image: Image, other: Image, rng: np.random.Generator) -> Image:
    return np.ascontiguousarray(image[:, ::-1])


def _other(image: Image, other: Image, rng: np.random.Generator) -> Image:
    return _image(cv2.resize(other, image.shape[1::-1]))


def _image(array: NDArray[np.generic]) -> Image:
    return np.ascontiguousarray(array, dtype=np.uint8)


TREATMENTS: Sequence[Treatment] = (
    Treatment("clean", "clean"),
    Treatment("focal length x 0.9", "camera", camera=_focal(0.9)),
    Treatment("focal length x 1.02", "camera", camera=_focal(1.02)),
    Treatment("focal length x 1.05", "camera", camera=_focal(1.05)),
    Treatment("focal length x 1.1", "camera", camera=_focal(1.1)),
    Treatment("focal length x 1.2", "camera", camera=_focal(1.2)),
    Treatment("principal point + 10 px", "camera", camera=lambda c: replace(c, cx=c.cx + 10.0)),
    Treatment("distortion told, not there", "camera", camera=_told_distortion(0.1)),
    Treatment("distortion there, not told", "camera", paint=_distorted(0.1)),
    Treatment("digital zoom 1.15", "camera", paint=_zoomed(1.15, 1.15)),
    Treatment("16:9 squeezed to 4:3", "camera", paint=_zoomed(1.0, 4 / 3)),
    Treatment("rolling shutter, 25 px", "camera", paint=_sheared(25.0)),
    Treatment("middle 40 % moved 60 px", "scene", paint=_moved(0.4, 60)),
    Treatment("middle 40 % moved 25 px", "scene", paint=_moved(0.4, 25)),
    Treatment("left 30 % moved 50 px down", "scene", paint=_moved(0.3, 0, 50, (0.0, 0.5))),
    Treatment("right half moved 40 px", "scene", paint=_moved(0.5, -40, 0, (1.0, 0.5))),
    Treatment("furniture moved", "scene", paint=_pasted(5, 0.2, 0.35)),
    Treatment("4 screens changed", "scene", paint=_screens(4)),
    Treatment("2 people", "scene", paint=_people(2)),
    Treatment("motion blur 15 px", "image", paint=_motion_blur(15)),
    Treatment("motion blur 31 px", "image", paint=_motion_blur(31)),
    Treatment("defocus 4 px", "image", paint=_defocused(4.0)),
    Treatment("night, gamma 4", "image", paint=_exposed(1.0, 4.0, 2.0)),
    Treatment("night, gamma 8", "image", paint=_exposed(1.0, 8.0, 2.0)),
    Treatment("overexposed 2.5", "image", paint=_exposed(2.5, 1.0, 3.0)),
    Treatment("noise 25", "image", paint=_exposed(1.0, 1.0, 25.0)),
    Treatment("JPEG 5", "image", paint=_jpeg(5)),
    Treatment("resolution / 4", "image", paint=_low_resolution(4)),
    Treatment("lens dirt", "image", paint=_dirt(12)),
    Treatment("glare", "image", paint=_glare),
    Treatment("print elsewhere, 85 %", "elsewhere", paint=_printed(0.85), has_pose=False),
    Treatment("print elsewhere, 70 %", "elsewhere", paint=_printed(0.7), has_pose=False),
    Treatment("print elsewhere, 50 %", "elsewhere", paint=_printed(0.5), has_pose=False),
    Treatment("mirrored room", "elsewhere", paint=_mirrored, has_pose=False),
    Treatment("another place", "elsewhere", paint=_other, has_pose=False),
    Treatment("frozen camera", "elsewhere", frozen=True),
)
ZOOMS: Sequence[Treatment] = tuple(
    Treatment(f"digital zoom {factor:g}", "camera", paint=_zoomed(factor, factor)) for factor in (1.02, 1.05, 1.1)
)
"""Further treatments of streams that begin well: before any good image, they are other focal lengths."""
