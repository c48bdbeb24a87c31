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


@pytest.mark.parametrize(
    ("encoder", "encoder_parameters"),
    [("resnet18", 2_782_784), ("resnet34", 8_170_304), ("resnet50", 8_543_296), ("resnet101", 27_535_424)],
)
def test_residual_encoders_have_the_parameters_of_their_layers_and_their_names(
    encoder: str, encoder_parameters: int
) -> None:
    with torch.device("meta"):
        net = UNet(UNetConfig(encoder))
    # Of torchvision's networks without layer4 and the classifier, which the original cuts off.
    assert sum(p.numel() for p in net.encoder.parameters()) == encoder_parameters
    names = set(net.state_dict())
    assert {"encoder.1.0.0.weight", "encoder.1.0.1.running_var", "encoder.2.0.1.0.conv1.weight",
            "encoder.3.0.0.downsample.0.weight", "encoder.4.0.1.bn2.bias"} <= names  # fmt: skip
    assert ("encoder.4.0.1.conv3.weight" in names) == (encoder in ("resnet50", "resnet101"))


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50"])
def test_residual_encoders_have_the_strides_of_the_others(encoder: str) -> None:
    net = UNet(UNetConfig(encoder, output_dim=(4, 8, 8))).train()
    out = net(torch.rand(2, 3, 64, 48))
    assert [tuple(f.shape) for f in out.features] == [(2, 4, 64, 48), (2, 8, 16, 12), (2, 8, 4, 3)]
    (sum(f.square().mean() for f in out.features) + sum(c.mean() for c in out.confidences)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    with pytest.raises(ConfigError, match="no poolings"):
        UNetConfig(encoder, average_pooling=True)


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
