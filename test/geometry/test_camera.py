# SPDX-License-Identifier: Apache-2.0
"""Cameras refuse nonsense; the image adapter undistorts and scales without losing the half pixel."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera, ImageAdapter

VALID = {"width": 64, "height": 48, "fx": 50.0, "fy": 50.0, "cx": 31.5, "cy": 23.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fx": 0.0}, "all-zero K"),
        ({"cx": float("nan")}, "finite"),
        ({"width": 0}, "size must be positive"),
        ({"distortion_model": "fov", "distortion": (0.1,)}, "Unknown distortion model"),
        ({"distortion_model": "plumb_bob", "distortion": (0.1,)}, "coefficients"),
        ({"fx": 1e300}, r"focal lengths fx 1e\+300.*no camera has"),
        ({"fx": 5000.0, "fy": 1.0}, "focal lengths"),
        ({"cx": 1e5}, r"principal point \(100000, 23.5\)"),
        ({"width": 20_000, "height": 20_000, "fx": 2e4, "fy": 2e4}, "more than the 64000000 allowed"),
        ({"distortion_model": "plumb_bob", "distortion": (1e300, 0.0, 0.0, 0.0)}, "has the distortion plumb_bob"),
        ({"distortion_model": "plumb_bob", "distortion": (0.0, 0.0, 0.0, 40.0)}, "has the distortion"),
        ({"distortion_model": "rational_polynomial", "distortion": (0, 0, 0, 0, 0, -40.0, 0, 0)}, "has the distortion"),
        ({"distortion_model": "equidistant", "distortion": (-1e3, 0.0, 0.0, 0.0)}, "has the distortion"),
    ],
)
def test_impossible_cameras_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        Camera(**{**VALID, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"fx": 16.0, "fy": 16.0, "distortion_model": "equidistant", "distortion": (0.05, -0.01, 0.0, 0.0)},
        {"distortion_model": "plumb_bob", "distortion": (-0.4, 0.2, 0.001, -0.002, -0.05)},
        {"distortion_model": "rational_polynomial", "distortion": (24.0, 14.0, 0.0, 0.0, 0.8, 24.3, 22.0, 4.5)},
        {"fx": 1500.0, "fy": 1500.0, "distortion_model": "plumb_bob", "distortion": (0.5, 90.0, 0.0, 0.0, -4000.0)},
        {"fx": 1200.0, "fy": 1200.0, "cx": -700.0, "cy": 500.0},
    ],
    ids=["fisheye", "barrel", "time-of-flight", "telephoto", "part of an image"],
)
def test_cameras_that_exist_are_taken(change: dict[str, object]) -> None:
    Camera(**{**VALID, **change})  # type: ignore[arg-type]


def test_scaling_keeps_rays() -> None:
    camera = Camera(**VALID)  # type: ignore[arg-type]
    half = camera.scaled_to(32, 24)
    # the centre of a 2x2 block of pixels is the centre of one pixel of half the size
    assert (10.5 - camera.cx) / camera.fx == pytest.approx((5.0 - half.cx) / half.fx)


def test_adapter_is_free_for_the_same_camera() -> None:
    camera = Camera(**VALID)  # type: ignore[arg-type]
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    adapter = ImageAdapter(camera, camera)
    assert adapter.is_identity
    assert adapter(image) is image


@pytest.mark.parametrize(
    ("model", "coefficients"),
    [
        ("plumb_bob", (-0.3, 0.1, 0.001, -0.002, 0.0)),
        ("rational_polynomial", (0.5, -0.2, 0.001, 0.0005, 0.01, 0.6, -0.1, 0.02)),
        ("equidistant", (0.05, -0.01, 0.002, 0.0)),
    ],
)
def test_adapter_undistorts(model: str, coefficients: tuple[float, ...]) -> None:
    """A bright dot drawn where the distorted camera sees a ray appears where the pinhole sees it."""
    source = Camera(320, 240, 200.0, 205.0, 160.0, 119.0, model, coefficients)
    target = Camera(320, 240, 210.0, 210.0, 159.5, 119.5)
    ray = np.array([[0.31, -0.22]])
    u, v = source.distort(ray)[0]
    rows, cols = np.mgrid[0:240, 0:320]
    blob = np.exp(-((cols - u) ** 2 + (rows - v) ** 2) / 18.0)
    image = np.repeat((255 * blob)[..., None], 3, axis=2).astype(np.uint8)
    seen = ImageAdapter(source, target)(image)[..., 0].astype(float)
    centre = np.array([(cols * seen).sum(), (rows * seen).sum()]) / seen.sum()
    expected = [target.fx * 0.31 + target.cx, target.fy * -0.22 + target.cy]
    assert centre == pytest.approx(expected, abs=0.3)


def test_adapter_refuses_an_image_of_another_size() -> None:
    camera = Camera(**VALID)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="32x24 but its camera_info says 64x48"):
        ImageAdapter(camera, camera)(np.zeros((24, 32, 3), dtype=np.uint8))


def test_numbers_of_numpy_become_plain_ones() -> None:
    """A map's description is written with ``yaml.safe_dump``, which takes none of NumPy's."""
    camera = Camera(np.int64(640), np.int32(480), *np.array([500.0, 500.0, 320.0, 240.0]))
    assert type(camera.width) is int and type(camera.fx) is float
    assert yaml.safe_load(yaml.safe_dump(vars(camera)))["fx"] == 500.0
