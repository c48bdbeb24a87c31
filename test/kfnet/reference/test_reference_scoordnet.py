# SPDX-License-Identifier: Apache-2.0
"""The published measurement network: size, receptive field, alignment and frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.kfnet.reference.frame import NetworkFrame
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.scoordnet import RECEPTIVE_FIELD_PX, ReferenceSCoordNet


def test_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ReferenceSCoordNet().parameters()) == 24_406_724


@pytest.mark.parametrize(("padding", "centre"), [(Padding.CENTRED, 0), (Padding.TENSORFLOW, 7)])
def test_receptive_field_is_79_pixels_about_the_stated_one(padding: Padding, centre: int) -> None:
    """With positive weights and inputs, exactly the pixels of the receptive field have a gradient."""
    net = ReferenceSCoordNet(padding, width=1 / 64)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.05)
    image = torch.full((1, 3, 176, 176), 200.0, requires_grad=True)
    net(image).coordinates[0, 0, 10, 9].backward()
    assert image.grad is not None
    rows, cols = (image.grad[0, 0] != 0).nonzero().unbind(1)
    half = RECEPTIVE_FIELD_PX // 2
    assert (int(rows.min()), int(rows.max())) == (8 * 10 + centre - half, 8 * 10 + centre + half)
    assert (int(cols.min()), int(cols.max())) == (8 * 9 + centre - half, 8 * 9 + centre + half)


@pytest.mark.parametrize("padding", list(Padding))
@pytest.mark.parametrize(("height", "width"), [(64, 96), (60, 90), (67, 71)])
def test_one_cell_for_every_eight_pixels_begun(padding: Padding, height: int, width: int) -> None:
    out = ReferenceSCoordNet(padding, width=1 / 64)(torch.zeros(1, 3, height, width))
    assert out.coordinates.shape == (1, 3, -(-height // 8), -(-width // 8))
    assert out.log_sigma.shape == (1, -(-height // 8), -(-width // 8))


def test_measurement_is_in_metres_of_the_map_under_a_reflection_and_a_scale() -> None:
    reflection = np.diag([1.0, 1.0, -1.0, 1.0])
    reflection[:3, 3] = 0.5, -2.0, 3.0
    frame = NetworkFrame(reflection, scale=0.02)
    torch.manual_seed(0)
    net = ReferenceSCoordNet(width=1 / 64, frame=frame).eval()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    raw = net(torch.from_numpy(image).permute(2, 0, 1)[None].float())
    measured = net.measure(image)
    in_map = frame.to_map(raw.coordinates[0].detach().permute(1, 2, 0).numpy())
    assert np.allclose(measured.mean.permute(1, 2, 0).numpy(), in_map, atol=1e-5)
    assert torch.allclose(measured.variance, (raw.log_sigma[0].exp() / 0.02) ** 2, rtol=1e-5)
    assert measured.pixel_offset == 0.0
    assert measured.valid.all()


def test_frame_survives_saving() -> None:
    points = np.random.default_rng(0).normal(size=(500, 3)) * [3.0, 2.0, 0.5] + [1.0, -4.0, 2.0]
    net = ReferenceSCoordNet(width=1 / 64, frame=NetworkFrame.of_points(points, 0.1))
    other = ReferenceSCoordNet(width=1 / 64)
    other.load_state_dict(net.state_dict())
    assert np.allclose(other.frame.to_network(points), net.frame.to_network(points))
    assert other.frame.scale == pytest.approx(0.1)
