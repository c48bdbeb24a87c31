# SPDX-License-Identifier: Apache-2.0
"""The published process network: size, window, chunking, and that it can learn a motion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import FeatureNet, ReferenceOFlowNet, WindowUNet, cost_windows, displacements


def unit_features(h: int, w: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(32, h, w, generator=generator), dim=0)


def test_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in FeatureNet(Padding.CENTRED).parameters()) == 180_512
        assert sum(p.numel() for p in WindowUNet(Padding.CENTRED).parameters()) == 511_186


def test_cost_volume_equals_its_definition() -> None:
    h, w = 7, 9
    now, before = unit_features(h, w, 0), unit_features(h, w, 1)
    cost = torch.cat(list(cost_windows(now, before, chunk=20))).reshape(h, w, 32, 8, 8)
    for r, c, oy, ox in [(3, 4, 0, 0), (3, 4, -4, 3), (0, 0, -1, 0), (6, 8, 3, 3), (6, 8, -4, -4), (2, 7, 1, 2)]:
        inside = 0 <= r + oy < h and 0 <= c + ox < w
        other = before[:, r + oy, c + ox] if inside else torch.zeros(32)
        assert torch.equal(cost[r, c, :, oy + 4, ox + 4], now[:, r, c] - other)


def test_displacements_run_from_minus_four_to_three_y_outer() -> None:
    offsets = displacements(torch.device("cpu"), torch.float32)
    assert offsets[0].tolist() == [-4.0, -4.0]
    assert offsets[1].tolist() == [-3.0, -4.0]
    assert offsets[63].tolist() == [3.0, 3.0]
    assert offsets[4 * 8 + 4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("padding", list(Padding))
def test_chunks_do_not_change_the_result(padding: Padding) -> None:
    torch.manual_seed(0)
    net = ReferenceOFlowNet(padding).eval()
    now, before = unit_features(12, 10, 0), unit_features(12, 10, 1)
    with torch.inference_mode():
        net.chunk = 10_000
        whole = net.flow(now, before)
        net.chunk = 25
        parts = net.flow(now, before)
    assert torch.allclose(whole.offset, parts.offset, atol=1e-5)
    assert whole.process_variance_m2 is not None and parts.process_variance_m2 is not None
    assert torch.allclose(whole.process_variance_m2, parts.process_variance_m2, rtol=1e-4)


def test_before_training_process_noise_is_about_a_centimetre() -> None:
    torch.manual_seed(0)
    net = ReferenceOFlowNet().eval().requires_grad_(False)
    flow = net.flow(unit_features(8, 8, 0), unit_features(8, 8, 1))
    assert flow.process_variance_m2 is not None
    assert float(flow.process_variance_m2.sqrt().median()) == pytest.approx(0.01, rel=0.3)
    assert (flow.offset >= -4).all() and (flow.offset <= 3).all()


def test_features_have_unit_length_and_stride_eight() -> None:
    features = FeatureNet(Padding.TENSORFLOW)(torch.rand(2, 3, 64, 96) * 255)
    assert features.shape == (2, 32, 8, 12)
    assert torch.allclose(features.norm(dim=1), torch.ones(2, 8, 12), atol=1e-4)


@pytest.mark.thorough
def test_a_motion_can_be_learned() -> None:
    """A few steps on one pair bring the flow towards the true displacement: gradients reach the U-Net."""
    torch.manual_seed(0)
    net = ReferenceOFlowNet()
    world = unit_features(14, 16, 3)
    before, now = world[:, 2:12, 2:14], world[:, 3:13, 4:16]  # now(p) = before(p + (2, 1))
    target = torch.tensor([2.0, 1.0])[:, None, None].expand(2, 10, 12)[:, :9, :10]
    optimizer = torch.optim.Adam(net.unet.parameters(), 3e-3)
    first = last = 0.0
    for step in range(15):
        loss = (net.flow(now, before).offset[:, :9, :10] - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < 0.5 * first
