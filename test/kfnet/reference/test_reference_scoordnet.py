# SPDX-License-Identifier: Apache-2.0
"""The published measurement network: size, receptive field, alignment and frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.errors import SourceError
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.scoordnet import NetworkFrame, ReferenceSCoordNet, read_transform, write_transform


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
    half = 79 // 2  # pixels of the receptive field
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


def test_principal_axes_decorrelate_and_centre() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2000, 3)) @ rng.normal(size=(3, 3)) + [5.0, -1.0, 2.0]
    moved = NetworkFrame.of_points(points).to_network(points)
    assert np.allclose(moved.mean(0), 0, atol=1e-9)
    covariance = np.cov(moved.T)
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    assert np.all(np.diff(np.diag(covariance)) < 0)


@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_there_and_back_through_a_file(tmp_path: Path, determinant: float) -> None:
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    Q[:, 0] *= determinant * np.linalg.det(Q)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Q, [0.1, -7.0, 3.0]
    write_transform(tmp_path / "transform.txt", NetworkFrame(T))
    frame = read_transform(tmp_path / "transform.txt", scale=0.02)
    assert np.array_equal(frame.T_network_map, T)
    points = np.random.default_rng(2).normal(size=(7, 3))
    assert np.allclose(frame.to_map(frame.to_network(points)), points)
    assert np.linalg.norm(frame.to_network(points[0]) - frame.to_network(points[1])) == pytest.approx(
        0.02 * np.linalg.norm(points[0] - points[1])
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1", "stretches"),
        ("1 0 0\n0 1 0\n0 0 1", "4x4"),
        ("1 0 0 0\n0 1 0 0\n0 0 nan 0\n0 0 0 1", "finite"),
        ("a b c d", "not a scene transform"),
    ],
)
def test_what_is_not_an_isometry_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "transform.txt"
    path.write_text(text)
    with pytest.raises(SourceError, match=words) as caught:
        read_transform(path)
    assert "transform.txt" in str(caught.value)
