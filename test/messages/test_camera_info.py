# SPDX-License-Identifier: Apache-2.0
"""CameraInfo: models, region of interest, binning, rectified images, and what must be refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.messages.camera_info import camera_from_info, fill_info, in_words, shared_view

PINHOLE = Camera(640, 480, 500.0, 510.0, 320.0, 241.0)


def info(camera: Camera = PINHOLE, **changes: Any) -> SimpleNamespace:
    message = fill_info(SimpleNamespace(), camera)
    message.roi = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    message.binning_x = message.binning_y = 0
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    "camera",
    [
        PINHOLE,
        Camera(640, 480, 500.0, 510.0, 320.0, 241.0, "plumb_bob", (-0.2, 0.1, 0.001, -0.002, 0.01)),
        Camera(640, 480, 500.0, 510.0, 320.0, 241.0, "rational_polynomial", tuple(0.01 * i for i in range(1, 9))),
        Camera(640, 480, 500.0, 510.0, 320.0, 241.0, "equidistant", (0.01, 0.002, 0.0, 0.001)),
    ],
)
def test_there_and_back(camera: Camera) -> None:
    assert camera_from_info(info(camera)) == camera


@pytest.mark.parametrize("model", ["", "plumb_bob", "rational_polynomial", "inverse_brown_conrady", "none"])
def test_no_coefficients_are_no_distortion(model: str) -> None:
    assert camera_from_info(info(distortion_model=model, d=[])) == PINHOLE
    assert camera_from_info(info(distortion_model=model, d=[0.0] * 5)) == PINHOLE


@pytest.mark.parametrize("model", ["equidistant", "fisheye", "Kannala_Brandt4"])
@pytest.mark.parametrize("count", [0, 4, 5])
def test_a_fisheye_without_coefficients_is_no_pinhole(model: str, count: int) -> None:
    camera = camera_from_info(info(distortion_model=model, d=[0.0] * count))
    u = camera.distort(np.array([[1.0, 0.0]]))[0, 0]
    assert u == pytest.approx(PINHOLE.cx + PINHOLE.fx * math.pi / 4)
    assert not camera.is_pinhole and not ImageAdapter(camera, camera.pinhole()).is_identity


@pytest.mark.parametrize("model", ["omni", "double_sphere", "ftheta", "EUCM"])
def test_a_lens_model_that_is_no_pinholes_is_refused_even_with_coefficients_of_zero(model: str) -> None:
    with pytest.raises(FrameError, match=f"(?i){model}"):
        camera_from_info(info(distortion_model=model, d=[0.0] * 4))


@pytest.mark.parametrize(
    ("model", "d", "zeros"),
    [
        ("plumb_bob", (-0.03, 0.035, -1e-4, -1e-4, -0.012), 3),
        ("rational_polynomial", (4.6, 1.3, 1e-4, -2e-4, -0.07, 4.9, 2.3, 0.02), 4),
        ("rational_polynomial", (4.6, 1.3, 1e-4, -2e-4, -0.07, 4.9, 2.3, 0.02), 6),
        ("equidistant", (0.1, 0.0, 0.0, 0.0), 1),
    ],
)
def test_coefficients_that_the_model_does_not_have_may_be_zero_and_nothing_else(
    model: str, d: tuple[float, ...], zeros: int
) -> None:
    assert camera_from_info(info(distortion_model=model, d=[*d, *[0.0] * zeros])).distortion == d
    with pytest.raises(FrameError, match="coefficients"):
        camera_from_info(info(distortion_model=model, d=[*d, *[0.0] * (zeros - 1), 0.01]))


@pytest.mark.parametrize("rectified", [False, True])
def test_a_matrix_of_binned_or_cropped_images_is_not_binned_or_cropped_again(rectified: bool) -> None:
    sensor = {"width": 4 * PINHOLE.width, "height": 4 * PINHOLE.height}
    with pytest.raises(FrameError, match=r"REP 104"):
        camera_from_info(info(**sensor, binning_x=4, binning_y=4), rectified=rectified)
    roi = SimpleNamespace(x_offset=960, y_offset=720, width=640, height=480)
    with pytest.raises(FrameError, match=r"REP 104"):
        camera_from_info(info(**sensor, roi=roi), rectified=rectified)
    whole = SimpleNamespace(x_offset=0, y_offset=0, width=640, height=480)
    assert camera_from_info(info(roi=whole), rectified=rectified) == PINHOLE
    corner = SimpleNamespace(x_offset=400, y_offset=300, width=100, height=100)
    assert camera_from_info(info(roi=corner), rectified=rectified).cx == PINHOLE.cx - 400


def test_fisheye_is_equidistant() -> None:
    assert camera_from_info(info(distortion_model="fisheye", d=[0.1, 0.0, 0.0, 0.0])).distortion_model == "equidistant"


def test_rectified_images_follow_the_projection_matrix() -> None:
    message = info(distortion_model="plumb_bob", d=[-0.2, 0.1, 0.0, 0.0, 0.0])
    message.p[0], message.p[2] = 450.0, 300.0
    camera = camera_from_info(message, rectified=True)
    assert camera.is_pinhole and (camera.fx, camera.cx) == (450.0, 300.0)


def test_a_region_of_interest_moves_the_principal_point() -> None:
    roi = SimpleNamespace(x_offset=100, y_offset=40, width=320, height=240)
    camera = camera_from_info(info(roi=roi))
    assert (camera.width, camera.height, camera.cx, camera.cy) == (320, 240, 220.0, 201.0)


def test_binning_keeps_the_half_pixel() -> None:
    camera = camera_from_info(info(binning_x=2, binning_y=2))
    # The centre of the image's left top 2x2 block is at 0.5, 0.5 in full pixels and at 0, 0 in binned ones.
    assert (camera.width, camera.fx, camera.cx, camera.cy) == (320, 250.0, 159.75, 120.25)


def test_rational_and_fisheye_lenses_with_binning_and_a_region_of_interest() -> None:
    roi = SimpleNamespace(x_offset=100, y_offset=40, width=320, height=240)
    for model, d in (("rational_polynomial", [0.1] * 8), ("equidistant", [0.1, 0.0, 0.0, 0.0])):
        camera = camera_from_info(info(distortion_model=model, d=d, roi=roi, binning_x=2, binning_y=2))
        assert (camera.width, camera.height, camera.fx) == (160, 120, 250.0)
        assert camera.distortion == tuple(d), "distortion acts on rays, which neither cropping nor binning changes"


def test_k_with_its_distortion_counts_even_where_a_driver_copies_k_into_p() -> None:
    message = info(distortion_model="plumb_bob", d=[-0.2, 0.1, 0.0, 0.0, 0.0])
    assert camera_from_info(message).distortion == (-0.2, 0.1, 0.0, 0.0, 0.0)
    assert camera_from_info(message, rectified=True).is_pinhole


def test_how_much_of_the_maps_view_another_camera_sees() -> None:
    assert shared_view(PINHOLE, PINHOLE) == 1.0
    assert shared_view(PINHOLE.scaled_to(320, 240), PINHOLE) == 1.0
    tele = replace(PINHOLE, fx=2 * PINHOLE.fx, fy=2 * PINHOLE.fy)
    assert shared_view(tele, PINHOLE) == pytest.approx(0.25, abs=0.05)
    assert shared_view(PINHOLE, tele) == 1.0
    assert "640x480" in in_words(PINHOLE) and "no distortion" in in_words(PINHOLE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": [0.0] * 9}, "no calibration"),
        ({"k": [math.nan] * 9}, "finite"),
        ({"k": [math.inf, 0, 320, 0, 500, 240, 0, 0, 1]}, "finite"),
        ({"d": [math.nan, 0, 0, 0, 0]}, "finite"),
        ({"d": [0.1, 0.1]}, "coefficients"),
        ({"width": 0, "height": 0}, "size"),
        ({"distortion_model": "unheard_of", "d": [0.1]}, "unheard_of"),
        ({"roi": SimpleNamespace(x_offset=600, y_offset=0, width=100, height=100)}, "not inside"),
    ],
)
def test_unusable_calibrations_are_refused_in_words(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FrameError, match=said):
        camera_from_info(info(**changes))
