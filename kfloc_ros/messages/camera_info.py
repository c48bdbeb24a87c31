# SPDX-License-Identifier: Apache-2.0
"""``sensor_msgs/CameraInfo`` to :class:`Camera` and back; imports nothing of ROS."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera, known_coefficients

_MIN_VIEW, _FULL_VIEW = 0.3, 0.8
"""Shares of the map camera's view below which a camera is refused, or used with a warning."""
_ALIASES = {
    "fisheye": "equidistant",
    "kannala_brandt": "equidistant",
    "kannala_brandt4": "equidistant",
    "opencv_fisheye": "equidistant",
    "radtan": "plumb_bob",
}
_NO_PERSPECTIVE = re.compile(r"fish|equi|kannala|f_?theta|omni|mei|ucm|unified|sphere|spherical|ocam|cylind")
"""In the names of models that are no pinhole's, even where their coefficients are zero."""
_NEAR_CENTRE = 0.25
"""A camera's principal point lies this share of its size or more from its edges."""


def camera_from_info(message: Any, *, rectified: bool = False) -> Camera:
    """The camera that a ``CameraInfo`` describes, in pixels of the image that comes with it.

    ``CameraInfo`` speaks of the full sensor; its region of interest and binning are applied here (REP 104).
    ``rectified``: the images were rectified before, so the projection matrix P counts, without distortion.

    Raises:
        FrameError: the calibration is missing (all zero), not finite, of an unknown model, or not of the full sensor.
    """
    if rectified:
        fx, fy, cx, cy = (float(message.p[i]) for i in (0, 5, 2, 6))
    else:
        fx, fy, cx, cy = (float(message.k[i]) for i in (0, 4, 2, 5))
    model, distortion = ("none", ()) if rectified else _distortion(message)
    which = "projection matrix P" if rectified else "matrix K"
    try:
        full = Camera(int(message.width), int(message.height), fx, fy, cx, cy, model, distortion)
        _check_full(full, message)
        return _binned(_cropped(full, message.roi), int(message.binning_x) or 1, int(message.binning_y) or 1)
    except FrameError as error:
        raise FrameError(f"A camera_info cannot be used (its {which} was read): {error}") from error


def _distortion(message: Any) -> tuple[str, tuple[float, ...]]:
    """Model and coefficients of those that the model has; an equidistant lens without any bends straight lines, too."""
    name = str(message.distortion_model).strip().lower()
    model = _ALIASES.get(name, name)
    coefficients = known_coefficients(model, tuple(float(value) for value in message.d))
    if model == "equidistant" and not any(coefficients):
        return model, (0.0, 0.0, 0.0, 0.0)
    if not any(coefficients) and not _NO_PERSPECTIVE.search(model):  # NaN counts as something, and Camera refuses it
        return "none", ()
    return model, coefficients


def _check_full(full: Camera, message: Any) -> None:
    """Refuse a calibration of binned or cropped images where the message bins or crops once more.

    Raises:
        FrameError: the principal point is far from the middle of the sensor that the message speaks of.
    """
    cropped = (int(message.roi.width), int(message.roi.height)) not in ((0, 0), (full.width, full.height))
    if not cropped and int(message.binning_x) <= 1 and int(message.binning_y) <= 1:
        return
    shares = (full.cx + 0.5) / full.width, (full.cy + 0.5) / full.height
    if not all(_NEAR_CENTRE <= share <= 1 - _NEAR_CENTRE for share in shares):
        raise FrameError(
            f"its principal point ({full.cx:.1f}, {full.cy:.1f}) is not near the middle of its {full.width}x"
            f"{full.height} pixels. With binning or a region of interest, the matrix and the size must be those of the "
            "whole sensor (REP 104). If the camera was calibrated as it is used, have its driver send the images' own "
            "size, binning 0 and no region of interest."
        )


def _cropped(camera: Camera, roi: Any) -> Camera:
    width, height = int(roi.width), int(roi.height)
    if width == 0 and height == 0:
        return camera
    left, top = int(roi.x_offset), int(roi.y_offset)
    if left + width > camera.width or top + height > camera.height:
        raise FrameError(
            f"its region of interest {width}x{height}+{left}+{top} is not inside its size "
            f"{camera.width}x{camera.height}."
        )
    return Camera(
        width, height, camera.fx, camera.fy, camera.cx - left, camera.cy - top,
        camera.distortion_model, camera.distortion,
    )  # fmt: skip


def _binned(camera: Camera, across: int, down: int) -> Camera:
    if across == 1 and down == 1:
        return camera
    return camera.scaled_to(camera.width // across, camera.height // down)


def shared_view(camera: Camera, map_camera: Camera) -> float:
    """Share, 0 to 1, of the map camera's image that another camera sees, too."""
    u, v = np.meshgrid(np.linspace(0, map_camera.width - 1, 21), np.linspace(0, map_camera.height - 1, 21))
    rays = np.stack([(u - map_camera.cx) / map_camera.fx, (v - map_camera.cy) / map_camera.fy], axis=-1).reshape(-1, 2)
    pixels = camera.distort(rays)
    inside = (pixels >= -0.5).all(axis=1) & (pixels <= [camera.width - 0.5, camera.height - 0.5]).all(axis=1)
    return float(inside.mean())


def check_view(camera: Camera, map_camera: Camera) -> str:
    """What to warn of if a camera sees less than the one the map was made with, or empty.

    Raises:
        FrameError: it sees too little for a pose.
    """
    share = shared_view(camera, map_camera)
    if share >= _FULL_VIEW:
        return ""
    said = (
        f"The camera sees {100 * share:.0f} % of the view of the camera that the map was made with. "
        f"camera_info: {in_words(camera)}. Map: {in_words(map_camera)}."
    )
    if share < _MIN_VIEW:
        way_out = "Is it the calibration of this camera? If it is, build a map with it"
        raise FrameError(f"{said} That is too little. {way_out}.")
    return f"{said} The rest stays black, and poses will be fewer and less accurate."


def in_words(camera: Camera) -> str:
    """A camera for an error message."""
    lens = "no distortion" if camera.is_pinhole else f"{camera.distortion_model} {list(camera.distortion)}"
    return (
        f"{camera.width}x{camera.height}, fx {camera.fx:.1f}, fy {camera.fy:.1f}, "
        f"cx {camera.cx:.1f}, cy {camera.cy:.1f}, {lens}"
    )


def fill_info(message: Any, camera: Camera) -> Any:
    """Put a camera into a ``CameraInfo`` and return the message."""
    message.width, message.height = camera.width, camera.height
    message.distortion_model = "plumb_bob" if camera.distortion_model == "none" else camera.distortion_model
    message.d = list(camera.distortion) or [0.0] * 5
    message.k = [float(value) for value in camera.K.reshape(-1)]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    message.p = [camera.fx, 0.0, camera.cx, 0.0, 0.0, camera.fy, camera.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message
