# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a choice of padding: centred, or TensorFlow's ``SAME``, which original weights need.

For a kernel of 3, stride 2 and an even size, ``SAME`` pads nothing at the top and left and one pixel at the bottom and
right. Three such layers move the receptive field of cell i from pixel 8 i (centred) to pixel 8 i + 7.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import nn


class Padding(Enum):
    """Padding of convolutions at the border of their input."""

    CENTRED = "centred"
    """The receptive field of cell i is centred on the pixel that it is supervised with, 8 i."""
    TENSORFLOW = "tensorflow"
    """Padding of TensorFlow; the network learns the shift, as weights trained there have."""


def image_to_input(images: torch.Tensor) -> torch.Tensor:
    """Return the network's input for RGB images with values 0..255: about -0.8..0.8, equal for all channels."""
    return (images - 128.0) * 0.00625


class Conv(nn.Conv2d):
    """Convolution whose output has ceil(size / stride) cells; initialised with a Glorot-uniform kernel and no bias."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, padding: Padding) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2)
        self._same = padding is Padding.TENSORFLOW and stride > 1  # with stride 1 the two are equal
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._same:
            return super().forward(x)
        stride, kernel = self.stride[0], self.kernel_size[0]
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
        top, left = missing[0] // 2, missing[1] // 2
        x = F.pad(x, (left, missing[1] - left, top, missing[0] - top))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class UpConv(nn.ConvTranspose2d):
    """Transposed 3x3 convolution that doubles the size."""

    def __init__(self, inputs: int, outputs: int, *, padding: Padding) -> None:
        self._same = padding is Padding.TENSORFLOW
        border = 0 if self._same else 1
        super().__init__(inputs, outputs, 3, 2, padding=border, output_padding=border)
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        y = super().forward(x, output_size)
        return y[..., :-1, :-1] if self._same else y  # SAME: the last row and column are cut
