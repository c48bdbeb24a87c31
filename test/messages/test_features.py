# SPDX-License-Identifier: Apache-2.0
"""Backbone features as messages and back."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import torch_only
from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.features import fill_features, read_features, warm_up

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


def message_of(features: BackboneFeatures) -> Any:
    return fill_features(SimpleNamespace(), features)


def test_features_come_back_as_unit_vectors_that_are_nearly_the_same(features: BackboneFeatures) -> None:
    read = read_features(message_of(features), CAMERA)
    for name in ("coarse", "fine"):
        sent, came = getattr(features, name), getattr(read, name)
        assert came.shape == sent.shape
        assert (came.norm(dim=1) - 1).abs().max() < 1e-5
        assert (came * sent).sum(dim=1).min() > 0.999
    assert (read.reliability - features.reliability).abs().max() <= 0.5 / 127 + 1e-6


def test_cells_without_features_do_not_become_nan(features: BackboneFeatures) -> None:
    features.coarse[:], features.fine[:] = 0, 0
    read = read_features(message_of(features), CAMERA)
    assert torch.isfinite(read.coarse).all() and torch.isfinite(read.fine).all()


def test_compiled_loops_write_and_read_what_the_others_do(features: BackboneFeatures) -> None:
    message = message_of(features)
    read = read_features(message, CAMERA)
    with torch_only():
        other = read_features(message, CAMERA)
        assert message_of(features).data == message.data
    for name in ("coarse", "fine", "reliability"):
        assert (getattr(read, name) - getattr(other, name)).abs().max() < 1e-6
        assert getattr(read, name).stride() == getattr(other, name).stride()


def test_a_camera_whose_sides_the_strides_do_not_divide_warms_up() -> None:
    warm_up(SimpleNamespace(), Camera(width=70, height=45, fx=50.0, fy=50.0, cx=31.5, cy=15.5))


@pytest.mark.parametrize(
    "change",
    [{"format": "jpeg"}, {"format": "8SC65 8x4, 8SC24 16x7"}, {"data": array.array("B")},
     {"data": array.array("B", bytes(64 * 32))}],
)  # fmt: skip
def test_a_message_that_does_not_fit_is_refused(features: BackboneFeatures, change: dict[str, Any]) -> None:
    message = message_of(features)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(FrameError, match="same map"):
        read_features(message, CAMERA)
