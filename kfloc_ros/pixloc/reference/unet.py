# SPDX-License-Identifier: Apache-2.0
"""PixLoc's feature extractor: a U-Net on a VGG or ResNet encoder, with a confidence map for each feature map.

It follows the description of Sarlin et al., "Back to the Feature" (CVPR 2021); the names of the parameters are those of
the published checkpoints. Nothing is downloaded: a network without a checkpoint has random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.errors import ConfigError, FrameError

VGGS: Mapping[str, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Number of convolutions in each of the five blocks; a max pooling opens every block but the first."""
RESNETS: Mapping[str, tuple[int, ...]] = {
    "resnet18": (2, 2, 2), "resnet34": (3, 4, 6), "resnet50": (3, 4, 6), "resnet101": (3, 4, 23),
}  # fmt: skip
"""Number of residual blocks in each of the three layers that are used; the first block of the U-Net is the image."""
BASIC = ("resnet18", "resnet34")
"""ResNets of two convolutions a block; the original takes the widths of the others for theirs, which cannot run."""
ENCODERS = (*VGGS, *RESNETS)

BLOCK_CHANNELS = (64, 128, 256, 512, 512)
RESNET_CHANNELS, BASIC_CHANNELS = (3, 64, 256, 512, 1024), (3, 64, 64, 128, 256)
DEEPEST_STRIDE = 2 ** (len(BLOCK_CHANNELS) - 1)
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network.

    Raises:
        ConfigError: an unknown encoder, or scales and dimensions that do not fit each other.
    """

    encoder: str = "vgg16"
    decoder: tuple[int, ...] = (64, 64, 64, 32)
    """Output channels of the decoder's blocks, from stride 8 to stride 1."""
    output_scales: tuple[int, ...] = (0, 2, 4)
    """Exponents of the output strides, fine to coarse."""
    output_dim: tuple[int, ...] = (32, 128, 128)
    average_pooling: bool = False
    confidences: bool = True

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ConfigError(f"Unknown encoder '{self.encoder}'; known: {', '.join(ENCODERS)}.")
        if self.average_pooling and self.encoder in RESNETS:
            raise ConfigError(f"The encoder '{self.encoder}' has no poolings between its blocks to be averaged.")
        deepest = len(BLOCK_CHANNELS) - 1
        if not 0 < len(self.decoder) <= deepest:
            raise ConfigError(f"The decoder must have between 1 and {deepest} blocks, got {len(self.decoder)}.")
        if not self.output_scales or len(self.output_scales) != len(self.output_dim):
            raise ConfigError(
                f"Every output scale needs one dimension, got {len(self.output_scales)} scales and "
                f"{len(self.output_dim)} dimensions."
            )
        lowest = deepest - len(self.decoder)
        if list(self.output_scales) != sorted(set(self.output_scales)) or not (
            lowest <= self.output_scales[0] and self.output_scales[-1] <= deepest
        ):
            raise ConfigError(
                f"Output scales must rise within [{lowest}, {deepest}] for this decoder, got {self.output_scales}."
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Image pixels per cell of every output, fine to coarse."""
        return tuple(2**scale for scale in self.output_scales)

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Channels of the encoder's blocks, from stride 1 to stride 16."""
        if self.encoder in VGGS:
            return BLOCK_CHANNELS
        return BASIC_CHANNELS if self.encoder in BASIC else RESNET_CHANNELS

    def channels_at(self, scale: int) -> int:
        """Return the input channels of an output scale's head: the encoder's at the deepest, else the decoder's."""
        deepest = len(BLOCK_CHANNELS) - 1
        return self.block_channels[-1] if scale == deepest else self.decoder[deepest - 1 - scale]


@dataclass(frozen=True, eq=False)
class FeaturePyramid:
    """Features of a batch of images, fine to coarse; cell (r, c) of stride s starts at pixel (s r, s c).

    A level's camera is the image's, scaled by 1 / stride. If a side is not a multiple of 16, the finer maps end before
    the image does (as in the original); the grids stay aligned at the top left.
    """

    features: tuple[torch.Tensor, ...]
    """(B, D, h, w) each, not normalised."""
    confidences: tuple[torch.Tensor, ...]
    """(B, 1, h, w) each, in (0, 1); ones for a network without confidences."""
    strides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.features)


class UNet(nn.Module):
    """VGG or ResNet encoder, bilinear decoder with skip connections, a linear head and a confidence head per scale."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        is_vgg = config.encoder in VGGS
        self.encoder = nn.ModuleList(_encoder_blocks(config) if is_vgg else _resnet_blocks(config.encoder))
        self.decoder = nn.ModuleList()
        below = config.block_channels[-1]
        for out, skip in zip(config.decoder, reversed(config.block_channels[:-1]), strict=False):
            self.decoder.append(_DecoderBlock(below + skip, out))
            below = out
        widths = [config.channels_at(scale) for scale in config.output_scales]
        self.adaptation = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, dim, 1)) for width, dim in zip(widths, config.output_dim, strict=True)
        )
        self.uncertainty = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 1, 1)) for width in (widths if config.confidences else [])
        )
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    @property
    def strides(self) -> tuple[int, ...]:
        return self.config.strides

    def forward(self, images: torch.Tensor) -> FeaturePyramid:
        """Return features of RGB images (B, 3, H, W) with values in [0, 1].

        Raises:
            FrameError: the images do not have three channels, or a side is shorter than 16 pixels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < DEEPEST_STRIDE:
            raise FrameError(
                f"The U-Net takes images (B, 3, H, W) of at least {DEEPEST_STRIDE} pixels a side, "
                f"got {tuple(images.shape)}."
            )
        x = (images - self.mean) / self.std
        skips: list[torch.Tensor] = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        at_scale = {len(skips) - 1: x}
        for step, block in enumerate(self.decoder):
            scale = len(skips) - 2 - step
            x = block(x, skips[scale])
            at_scale[scale] = x
        sources = [at_scale[scale] for scale in self.config.output_scales]
        features = tuple(head(source) for head, source in zip(self.adaptation, sources, strict=True))
        if self.config.confidences:
            # The "uncertainty" head is the logit of 1 - confidence.
            maps = zip(self.uncertainty, sources, strict=True)
            confidences = tuple(torch.sigmoid(-head(source)) for head, source in maps)
        else:
            confidences = tuple(torch.ones_like(f[:, :1]) for f in features)
        return FeaturePyramid(features, confidences, self.strides)


class _DecoderBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        up = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=False)
        skip = skip[..., : up.shape[-2], : up.shape[-1]]
        return torch.as_tensor(self.layers(torch.cat([up, skip], dim=1)))


def _encoder_blocks(config: UNetConfig) -> list[nn.Sequential]:
    blocks: list[nn.Sequential] = []
    channels = 3
    for index, (count, out) in enumerate(zip(VGGS[config.encoder], BLOCK_CHANNELS, strict=True)):
        layers: list[nn.Module] = []
        if index:
            layers.append(nn.AvgPool2d(2) if config.average_pooling else nn.MaxPool2d(2))
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            channels = out
        blocks.append(nn.Sequential(*layers))
    return blocks


class _Residual(nn.Module):
    """Residual block of a ResNet (He et al., CVPR 2016), with the parameters' usual names.

    Args:
        channels_in: of the input.
        width: of the inner convolutions.
        out: of the output; ``width`` for a basic block, four times as many for a bottleneck.
        stride: of the block.
    """

    def __init__(self, channels_in: int, width: int, out: int, stride: int) -> None:
        super().__init__()
        is_basic = out == width
        size, stride1 = (3, stride) if is_basic else (1, 1)
        self.conv1 = nn.Conv2d(channels_in, width, size, stride1, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1 if is_basic else stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if not is_basic:
            self.conv3 = nn.Conv2d(width, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        return torch.as_tensor(F.relu(y + (x if self.downsample is None else self.downsample(x))))


def _resnet_blocks(name: str) -> list[nn.Module]:
    """Return image, stem, and three layers, nested as the original names their parameters."""
    layers: list[nn.Sequential] = []
    channels, expansion = 64, 1 if name in BASIC else 4
    for number, count in enumerate(RESNETS[name]):
        width = 64 * 2**number
        blocks = []
        for place in range(count):
            blocks.append(_Residual(channels, width, expansion * width, 2 if number and not place else 1))
            channels = expansion * width
        layers.append(nn.Sequential(*blocks))
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    second = nn.Sequential(nn.MaxPool2d(3, 2, 1), layers[0])
    return [nn.Identity(), *(nn.Sequential(block) for block in (stem, second, *layers[1:]))]


RESIZE_BY = ("max", "max_force")


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Image as input of the network."""

    pixels: torch.Tensor
    """(1, 3, h, w) float in [0, 1]."""
    scale: float
    """Scale of the camera. Sides are rounded to whole pixels but the scale is not, as in the original."""


@dataclass(frozen=True)
class ImageSize:
    """Rule for resizing images by their longer side.

    Raises:
        ConfigError: a side below 16 pixels, or an unknown rule.
    """

    resize: int = 1024
    resize_by: str = "max"
    """``max`` makes larger images smaller; ``max_force`` also makes smaller images larger."""

    def __post_init__(self) -> None:
        if self.resize < 16 or self.resize_by not in RESIZE_BY:
            raise ConfigError(
                f"Images are resized to 16 pixels or more by one of {', '.join(RESIZE_BY)}, got {self.resize} by "
                f"'{self.resize_by}'."
            )

    def prepare(self, image: NDArray[np.uint8], image_scale: int = 1) -> PreparedImage:
        """Resize an RGB image (H, W, 3) to a longer side of ``resize // image_scale``.

        Raises:
            FrameError: the image is not (H, W, 3).
        """
        if image.ndim != 3 or image.shape[2] != 3:
            raise FrameError(f"The U-Net takes RGB images (H, W, 3), got shape {image.shape}.")
        pixels = image.astype(np.float32)
        height, width = image.shape[:2]
        scale = (self.resize // image_scale) / max(height, width)
        if scale < 1 or (scale > 1 and self.resize_by == "max_force"):
            size = (round(width * scale), round(height * scale))
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
        else:
            scale = 1.0
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None] / 255.0
        return PreparedImage(tensor, scale)
