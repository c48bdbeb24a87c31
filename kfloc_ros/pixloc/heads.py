# SPDX-License-Identifier: Apache-2.0
"""Alignment heads: what turns XFeat's features into ones that are better to align by, and says how far to trust them.

A head works on single cells and single points alike. So a map keeps the backbone's own features of its references, the
heads are applied to them when they are used, and any map works with any heads or none. New heads change nothing: their
features, confidences and damping are those of the plain refiner.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kfloc_ros.errors import ConfigError, WeightsError
from kfloc_ros.features.backbone import COARSE_CHANNELS, FINE_CHANNELS
from kfloc_ros.pixloc.optimizer import ConstantDamping

FORMAT = "kfloc_heads"
FORMAT_VERSION = "1"
MAX_WIDTH = 1024
LEVELS = ("coarse", "fine")
SHIPPED = "shipped"
SHIPPED_FILE = Path(__file__).parent / "weights" / "heads_fast.safetensors"
PLAIN_DAMPING = 1e-3
"""The plain refiner's damping at the start of a level."""


@dataclass(frozen=True)
class HeadsConfig:
    """Widths of the layers.

    Raises:
        ConfigError: a width is out of its range.
    """

    coarse_width: int = 64
    fine_width: int = 48
    """0: the fine level's features stay as they are; it is the coarse one that decides how far a start may lie off."""
    context: int = 16
    """Channels of the coarse level that the fine one sees: what a cell's surroundings look like."""
    damping_log10_range: tuple[float, float] = (-6.0, 3.0)

    def __post_init__(self) -> None:
        widths = (self.coarse_width, self.fine_width or 1, self.context)
        if not all(0 < width <= MAX_WIDTH for width in widths):
            raise ConfigError(f"Widths of alignment heads lie between 1 and {MAX_WIDTH}, got {self}.")
        low, high = self.damping_log10_range
        if not -12 <= low < high <= 12:
            raise ConfigError(f"The damping's range must be two rising numbers, got {self.damping_log10_range}.")


class Aligned(NamedTuple):
    """What the alignment sees of cells or points at one level."""

    features: torch.Tensor
    """(..., C) of unit length."""
    trust: torch.Tensor
    """(...) in (0, 2): factor of the backbone's reliability; 1 for new heads."""


class LevelHead(nn.Module):
    """One level: features, plus what one hidden layer makes of them and their context; and a factor of confidence."""

    def __init__(self, channels: int, context: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels + context, width)
        self.change = nn.Linear(width, channels)
        self.trust = nn.Linear(width, 1)
        for layer in (self.change, self.trust):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor, context: torch.Tensor | None = None) -> Aligned:
        """Of unit features (..., C) with their context (..., K)."""
        hidden = self.hidden(features if context is None else torch.cat([features, context], dim=-1)).relu()
        return Aligned(F.normalize(features + self.change(hidden), dim=-1), 2 * self.trust(hidden)[..., 0].sigmoid())


class AlignmentHeads(nn.Module):
    """Heads of both levels, and the damping of each."""

    def __init__(self, config: HeadsConfig | None = None) -> None:
        super().__init__()
        self.config = config or HeadsConfig()
        c = self.config
        self.coarse = LevelHead(COARSE_CHANNELS, 0, c.coarse_width)
        self.context = nn.Linear(COARSE_CHANNELS, c.context) if c.fine_width else None
        self.fine = LevelHead(FINE_CHANNELS, c.context, c.fine_width) if c.fine_width else None
        self.damping = nn.ModuleDict({level: ConstantDamping(c.damping_log10_range) for level in LEVELS})
        low, high = c.damping_log10_range
        share = torch.tensor((torch.log10(torch.tensor(PLAIN_DAMPING)).item() - low) / (high - low))
        for damping in self.damping.values():
            nn.init.constant_(damping.const, float(share.logit()))  # type: ignore[arg-type]
        self.register_buffer("cost_ratio", torch.ones(()))

    cost_ratio: torch.Tensor
    """How the mean cost at the fine level compares with that of plain features: about, and at true poses."""

    def of_points(self, coarse: torch.Tensor, fine: torch.Tensor) -> tuple[Aligned, Aligned]:
        """Coarse and fine level of points with the backbone's unit features (..., 64) and (..., 24)."""
        if self.fine is None or self.context is None:
            return self.coarse(coarse), _unchanged(fine)
        return self.coarse(coarse), self.fine(fine, self.context(coarse))

    def of_maps(self, coarse: torch.Tensor, fine: torch.Tensor) -> tuple[Aligned, Aligned]:
        """Coarse and fine level of maps (B, 64, h, w) and (B, 24, H, W), each (B, height, width, ...)."""
        coarse = coarse.permute(0, 2, 3, 1)
        if self.fine is None or self.context is None:
            return self.coarse(coarse), _unchanged(fine.permute(0, 2, 3, 1))
        context = self.context(coarse).permute(0, 3, 1, 2)
        context = F.interpolate(context, fine.shape[-2:], mode="bilinear").permute(0, 2, 3, 1)
        return self.coarse(coarse), self.fine(fine.permute(0, 2, 3, 1), context)

    def damping_of(self, level: str) -> torch.Tensor:
        """(6,) factors of the diagonal in the order tx, ty, tz, rx, ry, rz of the camera."""
        return torch.as_tensor(self.damping[level]())


def _unchanged(features: torch.Tensor) -> Aligned:
    return Aligned(features, features.new_ones(features.shape[:-1]))


def save_heads(path: Path, heads: AlignmentHeads, origin: str = "") -> None:
    """Write heads as safetensors; their configuration and where they come from are in the file's metadata."""
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": json.dumps(dataclasses.asdict(heads.config)),
        "origin": origin,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in heads.state_dict().items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes it private


def choose_heads(choice: str) -> AlignmentHeads | None:
    """The heads that an option names: none if it is empty, those of this package if it is ``shipped``, else a file's.

    Raises:
        WeightsError: see :func:`load_heads`.
    """
    return load_heads(SHIPPED_FILE if choice == SHIPPED else Path(choice)) if choice else None


def load_heads(path: Path) -> AlignmentHeads:
    """Read heads, in evaluation mode.

    Raises:
        WeightsError: missing, damaged, of another version, or no alignment heads.
    """
    if not path.is_file():
        raise WeightsError(f"There are no alignment heads '{path}'.")
    try:
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{path}' is not a safetensors file ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"'{path}' does not hold alignment heads that `kfloc train heads` wrote.")
    if metadata.get("version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{path}' has format version {metadata.get('version')}; this installation reads {FORMAT_VERSION}."
        )
    try:
        values = json.loads(metadata.get("config", ""))
        values["damping_log10_range"] = tuple(values["damping_log10_range"])
        heads = AlignmentHeads(HeadsConfig(**values))
        state = load_file(path)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise ValueError("it holds numbers that are not finite")
        heads.load_state_dict(state)
    except (ValueError, KeyError, TypeError, ConfigError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"'{path}' is damaged: {error}") from error
    return heads.eval()
