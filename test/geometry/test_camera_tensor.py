# SPDX-License-Identifier: Apache-2.0
"""Batched cameras: every model agrees with COLMAP and OpenCV, every Jacobian with autograd, limits with the lens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pycolmap
import pytest
import torch

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.colmap import (
    COLMAP_MODELS,
    camera_from_colmap,
    camera_from_parameters,
    camera_to_colmap,
    pixels_from_colmap,
    pixels_to_colmap,
)
from kfloc_ros.geometry.distortion import Distortion

PARAMETERS = {
    "SIMPLE_PINHOLE": [300.0, 160, 120],
    "PINHOLE": [300.0, 310, 160, 120],
    "SIMPLE_RADIAL": [300.0, 160, 120, -0.1],
    "RADIAL": [300.0, 160, 120, -0.1, 0.03],
    "OPENCV": [300.0, 310, 160, 120, -0.1, 0.03, 0.002, -0.003],
    "OPENCV_FISHEYE": [200.0, 210, 160, 120, 0.03, -0.02, 0.004, -0.001],
    "FULL_OPENCV": [300.0, 310, 160, 120, -0.1, 0.03, 0.002, -0.003, 0.01, 0.05, -0.02, 0.003],
    "SIMPLE_RADIAL_FISHEYE": [200.0, 160, 120, 0.03],
    "RADIAL_FISHEYE": [200.0, 160, 120, 0.03, -0.02],
}
MODELS = list(PARAMETERS)


def colmap_camera(model: str) -> pycolmap.Camera:
    return pycolmap.Camera(model=model, width=320, height=240, params=PARAMETERS[model])


def camera(model: str) -> CameraTensor:
    return CameraTensor.from_camera(camera_from_colmap(colmap_camera(model)))


def points(count: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 - 1
    p[:, 2] += 2.5
    p[0] = torch.tensor([0.0, 0.0, 2.0])
    return p


def test_every_colmap_model_is_tested() -> None:
    assert set(MODELS) == set(COLMAP_MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_projects_as_colmap_does(model: str) -> None:
    p = points()
    expected = colmap_camera(model).img_from_cam(p.numpy()) - 0.5
    found = camera(model).world2image(p)
    assert np.allclose(found.points.numpy(), expected, atol=1e-9)
    inside = ((expected >= 0) & (expected <= [319, 239])).all(1)
    assert found.valid.tolist() == inside.tolist()


@pytest.mark.parametrize("model", MODELS)
def test_jacobians_agree_with_autograd(model: str) -> None:
    cam, p = camera(model), points()
    xy = cam.project(p).points

    def of_each(function: object, inputs: torch.Tensor) -> torch.Tensor:
        full = torch.autograd.functional.jacobian(lambda x: function(x).sum(0), inputs)  # type: ignore[operator]
        return full.permute(1, 0, 2)

    assert torch.allclose(cam.J_project(p), of_each(lambda x: cam.project(x).points, p))
    assert torch.allclose(cam.J_distort(xy), of_each(lambda x: cam.distort(x).points, xy), atol=1e-9)
    assert torch.allclose(cam.J_world2image(p).J, of_each(lambda x: cam.world2image(x).points, p), atol=1e-6)
    assert torch.allclose(cam.J_denormalize().expand(60, 2, 2), of_each(cam.denormalize, xy))


@pytest.mark.parametrize("model", MODELS)
def test_rays_go_back_to_their_pixels(model: str) -> None:
    cam, p = camera(model), points()
    rays = cam.image2world(cam.world2image(p).points)
    assert torch.allclose(rays, p / p[:, 2:], atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_colmap_and_back(model: str) -> None:
    first = camera_from_colmap(colmap_camera(model))
    name, parameters = camera_to_colmap(first)
    assert camera_from_parameters(name, 320, 240, parameters) == first


class Row(NamedTuple):
    """As programs that read COLMAP's files themselves have it."""

    model: str
    width: int
    height: int
    params: list[float]


def test_cameras_of_other_programs() -> None:
    expected = camera_from_parameters("RADIAL", 320, 240, PARAMETERS["RADIAL"])
    row = Row("RADIAL", 320, 240, PARAMETERS["RADIAL"])
    assert camera_from_colmap(row) == expected
    assert camera_from_colmap(row._asdict()) == expected
    assert (expected.cx, expected.cy) == (159.5, 119.5)
    assert pixels_from_colmap([[160.0, 120.0]]).tolist() == [[159.5, 119.5]]
    assert pixels_to_colmap([[159.5, 119.5]]).tolist() == [[160.0, 120.0]]


@pytest.mark.parametrize(("model", "values"), [("THIN_PRISM", [1.0]), ("PINHOLE", [1.0, 2.0])])
def test_cameras_that_are_none_are_refused(model: str, values: list[float]) -> None:
    with pytest.raises(FrameError, match="COLMAP camera model"):
        camera_from_parameters(model, 320, 240, values)


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("none", (), Distortion.NONE),
        ("plumb_bob", (0.0,) * 5, Distortion.NONE),
        ("plumb_bob", (-0.1, 0.02, 0.0, 0.0, 0.0), Distortion.RADIAL),
        ("plumb_bob", (-0.1, 0.02, 1e-3, 0.0), Distortion.OPENCV),
        ("plumb_bob", (-0.1, 0.02, 1e-3, 2e-3, 0.01), Distortion.FULL_OPENCV),
        ("rational_polynomial", (-0.1, 0.02, 1e-3, 2e-3, 0.01, 0.02, 0.03, 0.04), Distortion.FULL_OPENCV),
        ("equidistant", (0.01, 0.02, 0.0, 0.0), Distortion.FISHEYE),
    ],
)
def test_every_camera_info_model_projects_as_opencv_does(
    name: str, values: tuple[float, ...], kind: Distortion
) -> None:
    value = Camera(320, 240, 300.0, 310.0, 150.0, 118.0, name, values)
    cam = CameraTensor.from_camera(value)
    assert cam.kind is kind
    p = points()
    expected = value.distort((p[:, :2] / p[:, 2:]).numpy())
    assert np.allclose(cam.world2image(p).points.numpy(), expected, atol=1e-8)


def test_points_behind_are_not_seen_and_nothing_explodes() -> None:
    cam = camera("OPENCV")
    p = torch.tensor([[0.1, 0.1, -1.0], [0.1, 0.1, 0.0], [0.0, 0.0, 2e-3]], dtype=torch.float64)
    found = cam.world2image(p)
    assert found.valid.tolist() == [False, False, True]
    J, in_front = cam.J_world2image(p)
    assert J.isfinite().all() and in_front.tolist() == [False, False, True]


LIMITS = {
    "barrel": (Distortion.RADIAL, [-0.2, 0.0]),
    "barrel that recovers": (Distortion.RADIAL, [-0.3, 0.3]),
    "barrel that turns": (Distortion.RADIAL, [-0.3, 0.02]),
    "pincushion": (Distortion.RADIAL, [0.2, 0.0]),
    "pincushion that turns": (Distortion.RADIAL, [0.2, -0.05]),
    "pincushion, large": (Distortion.RADIAL, [0.5, 0.01]),
    "sixth order": (Distortion.FULL_OPENCV, [0.1, 0.0, 0.0, 0.0, -0.01, 0.0, 0.0, 0.0]),
    "pole": (Distortion.FULL_OPENCV, [0.0, 0.0, 0.0, 0.0, 0.0, -0.2, 0.0, 0.0]),
    "rational": (Distortion.FULL_OPENCV, [0.3, 0.1, 0.0, 0.0, 0.0, 0.6, 0.2, 0.05]),
    "fisheye that turns": (Distortion.FISHEYE, [0.1, 0.0, -0.2, 0.0]),
    "fisheye": (Distortion.FISHEYE, [0.03, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_is_where_the_radius_stops_growing(name: str) -> None:
    kind, coefficients = LIMITS[name]
    cam = CameraTensor(torch.tensor([100.0, 100, 50, 50, 49.5, 49.5, *coefficients], dtype=torch.float64), kind)
    r = torch.linspace(0, 6, 60001, dtype=torch.float64)
    out, valid = cam.distort(torch.stack([r, torch.zeros_like(r)], dim=-1))
    step = out[:, 0].diff()
    turned = torch.nonzero((step <= 0) | (step > 1e3))
    expected = r[int(turned[0])].item() if len(turned) else 6.0
    last = r[valid.long().cumprod(0).bool()].max().item()
    assert last == pytest.approx(expected, abs=5e-4)


def test_legacy_limits_are_those_of_the_original() -> None:
    r = torch.linspace(0, 3, 301, dtype=torch.float64)
    line = torch.stack([r, torch.zeros_like(r)], dim=-1)

    def reach(k1: float, k2: float) -> float:
        data = torch.tensor([100.0, 100, 50, 50, 49.5, 49.5, k1, k2], dtype=torch.float64)
        return r[CameraTensor(data, Distortion.RADIAL).distort(line, legacy=True).valid].max().item()

    assert reach(0.3, 0.0) == pytest.approx((1 / 0.9) ** 0.5, abs=0.01)  # harmless, and limited
    assert reach(-0.3, 0.0) == 3.0  # dangerous, and not limited
    assert reach(-0.3, 0.02) == pytest.approx(((0.41**0.5 + 0.9) / 0.2) ** 0.5, abs=0.01)  # the larger root


def test_scaling_and_cropping() -> None:
    cam, p = camera("OPENCV"), points()
    pixels = cam.world2image(p).points
    assert torch.allclose(cam.scale(0.25).world2image(p).points, (pixels + 0.5) / 4 - 0.5)
    both = cam.scale((0.5, 2.0))
    assert both.size.tolist() == [160, 480]
    assert torch.allclose(both.world2image(p).points, (pixels + 0.5) * torch.tensor([0.5, 2.0]) - 0.5)
    cut = cam.crop((10, 20), (50, 40))
    assert cut.size.tolist() == [50, 40]
    assert torch.allclose(cut.world2image(p).points, pixels - torch.tensor([10.0, 20.0]))


def test_a_batch_is_indexed_stacked_and_moved() -> None:
    batch = CameraTensor.stack([camera("PINHOLE"), camera("RADIAL"), camera("FULL_OPENCV")])
    assert (batch.kind, batch.shape) == (Distortion.FULL_OPENCV, (3,))
    p = points()
    found = batch.world2image(p.expand(3, -1, -1))
    for k, model in enumerate(("PINHOLE", "RADIAL", "FULL_OPENCV")):
        alone = camera(model).world2image(p)
        assert torch.allclose(found.points[k], alone.points)
        assert torch.equal(batch[k].world2image(p).valid, alone.valid)
    assert batch[1:].limit.shape == (2,)
    assert CameraTensor.stack([batch, batch], dim=-1).limit.shape == (3, 2)
    half = batch.half()
    assert (half.dtype, half.limit.dtype) == (torch.float16, torch.float16)
    with pytest.raises(FrameError, match="cannot be written"):
        CameraTensor.stack([camera("PINHOLE"), camera("OPENCV_FISHEYE")])


def test_gradients_reach_the_intrinsics() -> None:
    for model in ("OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV"):
        cam = camera(model).detach().requires_grad_()
        cam.world2image(points()).points.square().sum().backward()
        grad = cam.data.grad
        assert grad is not None and grad.isfinite().all() and grad[2:].abs().min() > 0


def test_a_wrong_count_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="8 numbers"):
        CameraTensor(torch.zeros(7), Distortion.RADIAL)
