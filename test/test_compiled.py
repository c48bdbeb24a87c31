# SPDX-License-Identifier: Apache-2.0
"""Compiled loops: they agree with their torch paths, and the package works without them."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import compiled_loop, has_numba, linear, runs_compiled, torch_only
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet.flow import Flow, cost_window
from kfloc_ros.kfnet.flow_network import load_flow_network
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.pixloc.cost import FeatureImage, RobustLoss, linearize
from kfloc_ros.types import SceneCoordinates

needs_numba = pytest.mark.skipif(not has_numba(), reason="Numba is not installed")
CAMERA = Camera(160, 128, 140.0, 145.0, 80.0, 63.0)


def level(channels: int = 24) -> FeatureImage:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, channels, 10, 12, generator=generator)
    smooth = F.interpolate(maps, (32, 40), mode="bicubic")[0]
    return FeatureImage.from_maps(smooth, torch.rand(32, 40, generator=generator), 4.0)


@needs_numba
@pytest.mark.parametrize("offsets", [None, np.zeros(6), np.array([0.05, -0.02, 3.0, -2.0, 0.08, 0.03])])
def test_normal_equations_agree_with_torch(offsets: np.ndarray | None) -> None:
    """Points at and beyond the border and behind the camera included."""
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(500, 3, generator=generator) - 0.5) * torch.tensor([4.0, 3.0, 5.0]) + torch.tensor([0, 0, 2.0])
    features = torch.randn(500, 24, generator=generator)
    confidence = torch.rand(500, generator=generator)
    pose = make_pose(so3_exp([0.05, -0.03, 0.02]), [0.02, -0.01, 0.05])
    given = (level(), points, features, confidence, pose, CAMERA, RobustLoss(0.5), offsets)
    quick = linearize(*given)
    with torch_only():
        reference = linearize(*given)
    assert 50 < quick.valid_count == reference.valid_count < 450
    assert quick.cost == pytest.approx(reference.cost, rel=1e-5)
    scale = np.sqrt(np.diag(reference.H))
    assert np.allclose(quick.H / np.outer(scale, scale), reference.H / np.outer(scale, scale), atol=1e-5)
    assert np.allclose(quick.g / scale, reference.g / scale, atol=1e-5)


@needs_numba
def test_samples_agree_with_torch_inside_outside_and_at_the_border() -> None:
    image = level()
    uv = torch.rand(300, 2) * torch.tensor([50.0, 40.0]) - 5
    uv = torch.cat([uv, torch.tensor([[0.0, 0.0], [39.0, 31.0], [39.0, 0.0], [0.5, 31.0]])])
    rows, inside = image.sample(uv)
    with torch_only():
        expected, expected_inside = image.sample(uv)
    assert torch.equal(inside, expected_inside) and 0 < int(inside.sum()) < len(uv)
    assert torch.allclose(rows, expected, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("size", [(24, 32), (25, 33)])
def test_flow_agrees_with_torch(size: tuple[int, int]) -> None:
    """Odd sides too: the last block of the coarse search is then half a block."""
    h, w = size
    generator = torch.Generator().manual_seed(0)
    world = F.interpolate(torch.randn(1, 64, 20, 24, generator=generator), scale_factor=2, mode="bicubic")[0]
    before, now = (F.normalize(world[:, 2 : 2 + h, k : k + w], dim=0) for k in (0, 2))
    network = load_flow_network().requires_grad_(False)
    window, flow = cost_window(now, before), network.flow(now, before)
    with torch_only():
        expected_window, expected = cost_window(now, before), network.flow(now, before)
    assert torch.equal(window.base, expected_window.base) and torch.equal(window.inside, expected_window.inside)
    assert torch.equal(window.at_edge, expected_window.at_edge)
    assert torch.allclose(window.scores, expected_window.scores, atol=1e-5)
    assert torch.allclose(flow.offset, expected.offset, atol=1e-4)
    assert torch.allclose(flow.variance, expected.variance, rtol=1e-3)
    assert torch.equal(flow.valid, expected.valid)


@needs_numba
@pytest.mark.parametrize("blend_sigma", [False, True])
def test_warped_belief_agrees_with_torch(blend_sigma: bool) -> None:
    """A belief hundreds of metres from the origin, with invalid cells, along a flow that leaves the image."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(3, 20, 30, generator=generator) + torch.tensor([300.0, -200.0, 2.0])[:, None, None]
    valid = torch.rand(20, 30, generator=generator) > 0.1
    belief = SceneCoordinates(mean, torch.rand(20, 30, generator=generator) * 1e-2, valid, 8)
    offset = 6 * torch.randn(2, 20, 30, generator=generator)
    flow = Flow(offset, torch.full((20, 30), 0.1), torch.ones(20, 30, dtype=torch.bool))
    prior = warp(belief, flow, 0.5, 1e-4, blend_sigma=blend_sigma)
    with torch_only():
        expected = warp(belief, flow, 0.5, 1e-4, blend_sigma=blend_sigma)
    assert torch.equal(prior.valid, expected.valid) and 0 < int(prior.valid.sum()) < 600
    assert torch.allclose(prior.mean, expected.mean, atol=1e-4)
    assert torch.allclose(prior.variance, expected.variance, rtol=1e-3)


def test_without_numba_the_torch_path_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    has_numba.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not runs_compiled(torch.zeros(1))
            assert not runs_compiled(torch.zeros(1))
            rows, _ = level().sample(torch.tensor([[1.0, 1.0]]))
        assert torch.isfinite(rows).all()
        assert [record.message for record in caplog.records if "numba" in record.message.lower()] == [
            "Numba is not installed: inner loops run in torch, and a frame takes about half as long again. "
            "`pip install numba` helps."
        ]
        assert compiled_loop(len) is len
    finally:
        has_numba.cache_clear()


def test_a_product_of_matrices_is_that_of_torch() -> None:
    """Also of rows and columns that are not in one piece, and in other precisions."""
    rows, weight, bias = torch.randn(40, 30), torch.randn(20, 30), torch.randn(20)
    for inputs, of in ((rows, weight), (rows[:, :15], weight[:, 15:]), (rows.t()[:, :20], weight.t()[:, ::1])):
        assert torch.allclose(linear(inputs, of), inputs @ of.t(), atol=1e-4)
    assert torch.allclose(linear(rows, weight, bias), rows @ weight.t() + bias, atol=1e-4)
    assert torch.equal(linear(rows.double(), weight.double()), rows.double() @ weight.double().t())


def test_only_plain_tensors_are_served() -> None:
    assert not runs_compiled(torch.zeros(1, dtype=torch.float64))
    assert not runs_compiled(torch.zeros(1, requires_grad=True))
    assert not runs_compiled(torch.zeros(1, device="meta"))
