# SPDX-License-Identifier: Apache-2.0
"""COLMAP cameras and pixels to :class:`Camera` and back: the one place that knows of its pixel centres at .5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera

PIXEL_SHIFT = 0.5
"""COLMAP's pixel (0, 0) is the corner of the top-left pixel; here it is that pixel's centre."""
_ZERO = -1

_LAYOUTS: dict[str, tuple[int, str, tuple[int, ...]]] = {
    # number of focal lengths, distortion model, where in COLMAP's parameters each of its coefficients is
    "SIMPLE_PINHOLE": (1, "none", ()),
    "PINHOLE": (2, "none", ()),
    "SIMPLE_RADIAL": (1, "plumb_bob", (3, _ZERO, _ZERO, _ZERO)),
    "RADIAL": (1, "plumb_bob", (3, 4, _ZERO, _ZERO)),
    "OPENCV": (2, "plumb_bob", (4, 5, 6, 7)),
    "FULL_OPENCV": (2, "rational_polynomial", (4, 5, 6, 7, 8, 9, 10, 11)),
    "OPENCV_FISHEYE": (2, "equidistant", (4, 5, 6, 7)),
    "SIMPLE_RADIAL_FISHEYE": (1, "equidistant", (3, _ZERO, _ZERO, _ZERO)),
    "RADIAL_FISHEYE": (1, "equidistant", (3, 4, _ZERO, _ZERO)),
}
COLMAP_MODELS = tuple(_LAYOUTS)


def pixels_from_colmap(xy: ArrayLike) -> NDArray[np.float64]:
    """Return pixels (..., 2) whose centres are whole numbers, given COLMAP's, whose centres are at .5."""
    return np.asarray(xy, dtype=np.float64) - PIXEL_SHIFT


def pixels_to_colmap(uv: ArrayLike) -> NDArray[np.float64]:
    """Return COLMAP's pixels (..., 2), whose centres are at .5, given pixels whose centres are whole numbers."""
    return np.asarray(uv, dtype=np.float64) + PIXEL_SHIFT


def camera_from_parameters(model: str, width: int, height: int, parameters: Sequence[float]) -> Camera:
    """The camera of a COLMAP model's name, size and parameters, as in ``cameras.txt`` and in query lists.

    Raises:
        FrameError: an unknown model, a wrong number of parameters, or values that no camera has.
    """
    if model not in _LAYOUTS:
        raise FrameError(f"The COLMAP camera model '{model}' is not supported; known: {', '.join(COLMAP_MODELS)}.")
    focal, kind, places = _LAYOUTS[model]
    wanted = focal + 2 + sum(place != _ZERO for place in places)
    if len(parameters) != wanted:
        raise FrameError(f"The COLMAP camera model {model} takes {wanted} parameters, got {len(parameters)}.")
    values = [float(value) for value in parameters]
    cx, cy = values[focal : focal + 2]
    distortion = tuple(0.0 if place == _ZERO else values[place] for place in places)
    if kind != "equidistant" and not any(distortion):
        kind, distortion = "none", ()
    return Camera(
        int(width), int(height), values[0], values[focal - 1], cx - PIXEL_SHIFT, cy - PIXEL_SHIFT, kind, distortion
    )


def camera_from_colmap(camera: Any) -> Camera:
    """The camera of a ``pycolmap.Camera``, of a named tuple, or of a mapping with model, width, height, params.

    Raises:
        FrameError: see :func:`camera_from_parameters`.
    """
    read = camera.__getitem__ if isinstance(camera, dict) else lambda name: getattr(camera, name)
    model = read("model")
    return camera_from_parameters(
        str(getattr(model, "name", model)), read("width"), read("height"), [float(v) for v in read("params")]
    )


def camera_to_colmap(camera: Camera) -> tuple[str, list[float]]:
    """Name and parameters of the COLMAP model that says the same as a camera."""
    fx, fy, cx, cy = camera.fx, camera.fy, camera.cx + PIXEL_SHIFT, camera.cy + PIXEL_SHIFT
    d = camera.distortion
    if camera.distortion_model == "equidistant":
        return "OPENCV_FISHEYE", [fx, fy, cx, cy, *d]
    if any(d[4:]):
        return "FULL_OPENCV", [fx, fy, cx, cy, *(*d, 0.0, 0.0, 0.0)[:8]]
    if any(d):
        return "OPENCV", [fx, fy, cx, cy, *d[:4]]
    return "PINHOLE", [fx, fy, cx, cy]
