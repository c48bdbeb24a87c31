# SPDX-License-Identifier: Apache-2.0
"""The simulated camera: exposure, noise and motion blur."""

from __future__ import annotations

import numpy as np

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.simulation.render import Rendering, Sensor, SensorModel

CAMERA = Camera(96, 64, 80.0, 80.0, 47.5, 31.5)
STILL = np.eye(4)


def turned(degrees: float) -> np.ndarray:
    return make_pose(so3_exp([0, np.radians(degrees), 0]), [0, 0, 0])


def rendering(radiance: np.ndarray) -> Rendering:
    return Rendering(radiance.astype(np.float32), np.full(radiance.shape[:2], 2.0, np.float32))


def stripes() -> Rendering:
    values = np.where((np.arange(96) // 8) % 2 == 0, 0.35, 0.05)
    return rendering(np.broadcast_to(values[None, :, None], (64, 96, 3)))


def test_turning_blurs_along_the_motion_only() -> None:
    sensor = Sensor(CAMERA, SensorModel(read_noise=0.0, shot_noise=0.0, vignetting=0.0))
    rng = np.random.default_rng(0)
    sharp = sensor.expose(stripes(), STILL, STILL, STILL, rng).astype(float)
    yaw = sensor.expose(stripes(), turned(-2.5), STILL, turned(2.5), rng).astype(float)
    steepest = np.abs(np.diff(sharp[32, :, 0])).max(), np.abs(np.diff(yaw[32, :, 0])).max()
    assert steepest[1] < 0.5 * steepest[0]
    pitch = make_pose(so3_exp([np.radians(2.5), 0, 0]), [0, 0, 0])
    across = sensor.expose(stripes(), pitch.T, STILL, pitch, rng).astype(float)
    assert np.abs(np.diff(across[32, 30:60, 0])).max() > 0.9 * steepest[0]


def test_the_blur_lies_around_the_middle_of_the_exposure() -> None:
    sensor = Sensor(CAMERA, SensorModel(read_noise=0.0, shot_noise=0.0, vignetting=0.0, exposure_strength=0.0))
    line = np.zeros((64, 96, 3))
    line[:, 46:50] = 1.0
    image = sensor.expose(rendering(line), turned(-2), STILL, turned(2), np.random.default_rng(0)).astype(float)
    weight = image[32, :, 0]
    assert abs((weight * np.arange(96)).sum() / weight.sum() - 47.5) < 0.3


def test_exposure_evens_out_the_light_in_part() -> None:
    sensor = Sensor(CAMERA)
    rng = np.random.default_rng(0)
    means = []
    for light in (0.05, 0.4):
        flat = rendering(np.full((64, 96, 3), light))
        means.append(float(sensor.expose(flat, STILL, STILL, STILL, rng).mean()))
    assert means[0] < means[1] < 1.6 * means[0]


def test_noise_has_the_strength_of_the_model_and_follows_the_generator() -> None:
    model = SensorModel(exposure_strength=0.0, vignetting=0.0)
    sensor, flat = Sensor(CAMERA, model), rendering(np.full((64, 96, 3), 0.2))
    images = [sensor.expose(flat, STILL, STILL, STILL, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    slope = 255 * 1.055 / 2.4 * 0.2 ** (1 / 2.4 - 1)  # of the sRGB curve at 0.2
    expected = slope * np.sqrt(model.shot_noise * 0.2 + model.read_noise**2)
    assert abs(images[0].std() - expected) < 0.15 * expected
