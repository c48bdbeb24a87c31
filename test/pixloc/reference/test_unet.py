# SPDX-License-Identifier: Apache-2.0
"""The U-Net: the published number of parameters, maps of the right shape, gradients, errors that say what is wrong."""

from __future__ import annotations

import pytest
import torch

from kfloc_ros.errors import ConfigError, FrameError
from kfloc_ros.pixloc.reference.unet import UNet, UNetConfig


@pytest.mark.parametrize(("encoder", "parameters", "entries"), [("vgg16", 15_712_405, 65), ("vgg19", 21_022_101, 71)])
def test_as_large_as_published(encoder: str, parameters: int, entries: int) -> None:
    with torch.device("meta"):
        net = UNet(UNetConfig(encoder))
    damping = 3  # vectors of six, beside the network in a checkpoint
    assert sum(p.numel() for p in net.parameters()) + 6 * damping == parameters
    assert len(net.state_dict()) + damping == entries


def test_maps_end_at_the_last_whole_cell_of_stride_16() -> None:
    net = UNet().eval()
    with torch.inference_mode():
        out = net(torch.rand(2, 3, 59, 50))
    assert [tuple(f.shape) for f in out.features] == [(2, 32, 48, 48), (2, 128, 12, 12), (2, 128, 3, 3)]
    assert [tuple(c.shape) for c in out.confidences] == [(2, 1, 48, 48), (2, 1, 12, 12), (2, 1, 3, 3)]
    assert out.strides == (1, 4, 16)
    assert all(((c > 0) & (c < 1)).all() for c in out.confidences)


def test_a_level_can_be_left_out_and_so_can_confidences() -> None:
    net = UNet(UNetConfig(decoder=(64, 64), output_scales=(2, 4), output_dim=(8, 16), confidences=False)).eval()
    with torch.inference_mode():
        out = net(torch.rand(1, 3, 32, 32))
    assert [tuple(f.shape) for f in out.features] == [(1, 8, 8, 8), (1, 16, 2, 2)]
    assert all((c == 1).all() for c in out.confidences)


def test_every_parameter_learns() -> None:
    net = UNet(UNetConfig(output_dim=(4, 4, 4))).train()
    out = net(torch.rand(1, 3, 32, 32))
    (sum(f.square().mean() for f in out.features) + sum(c.mean() for c in out.confidences)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "config",
    [
        {"encoder": "vgg11"},
        {"output_scales": (0, 2)},
        {"output_scales": (2, 0, 4)},
        {"decoder": (64, 64)},
        {"decoder": ()},
    ],
)
def test_shapes_that_do_not_fit_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        UNetConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 8, 32)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FrameError, match="at least 16 pixels"):
        UNet()(torch.rand(shape))
