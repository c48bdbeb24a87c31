# SPDX-License-Identifier: Apache-2.0
"""Backbone features as messages and back."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.features import fill_coarse, fill_fine, read_features

CAMERA = Camera(width=64, height=32, fx=50.0, fy=50.0, cx=31.5, cy=15.5)


@pytest.fixture
def features() -> BackboneFeatures:
    generator = torch.Generator().manual_seed(3)

    def unit(channels: int, height: int, width: int) -> torch.Tensor:
        return F.normalize(torch.randn(1, channels, height, width, generator=generator), dim=1)

    return BackboneFeatures(
        coarse=unit(64, 4, 8), fine=unit(24, 8, 16), context=torch.zeros(1, 128, 4, 8),
        reliability=torch.rand(1, 4, 8, generator=generator),
    )  # fmt: skip


def messages(features: BackboneFeatures) -> tuple[Any, Any]:
    return fill_coarse(SimpleNamespace(), features), fill_fine(SimpleNamespace(), features)


def test_features_come_back_as_unit_vectors_that_are_nearly_the_same(features: BackboneFeatures) -> None:
    read = read_features(*messages(features), CAMERA)
    for name in ("coarse", "fine"):
        sent, came = getattr(features, name), getattr(read, name)
        assert came.shape == sent.shape
        assert (came.norm(dim=1) - 1).abs().max() < 1e-5
        assert (came * sent).sum(dim=1).min() > 0.999
    assert (read.reliability - features.reliability).abs().max() <= 0.5 / 127 + 1e-6


def test_cells_without_features_do_not_become_nan(features: BackboneFeatures) -> None:
    features.coarse[:], features.fine[:] = 0, 0
    read = read_features(*messages(features), CAMERA)
    assert torch.isfinite(read.coarse).all() and torch.isfinite(read.fine).all()


@pytest.mark.parametrize(
    "change",
    [{"width": 7}, {"height": 5}, {"encoding": "8UC65"}, {"encoding": "8SC64"}, {"step": 1}, {"data": array.array("B")},
     {"data": array.array("B", bytes(64 * 32))}],
)  # fmt: skip
def test_a_message_that_does_not_fit_is_refused(features: BackboneFeatures, change: dict[str, Any]) -> None:
    coarse, fine = messages(features)
    for name, value in change.items():
        setattr(coarse, name, value)
    with pytest.raises(FrameError, match="same map"):
        read_features(coarse, fine, CAMERA)
    with pytest.raises(FrameError, match="same map"):
        read_features(fine, coarse, CAMERA)
