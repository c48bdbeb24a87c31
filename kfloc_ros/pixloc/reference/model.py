# SPDX-License-Identifier: Apache-2.0
"""PixLoc model as trained and stored: the feature extractor, a damping vector per level, and its configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kfloc_ros.errors import ConfigError, WeightsError
from kfloc_ros.files import check_tensor_list, save_tensors
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.unet import FeaturePyramid, UNet, UNetConfig

FORMAT = "kfloc_pixloc"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class PixLocConfig:
    """Configuration of a model, stored in its checkpoint.

    Raises:
        ConfigError: a number is out of its range, or the loss is unknown.
    """

    extractor: UNetConfig = field(default_factory=UNetConfig)
    normalize_features: bool = True
    loss: str = "scaled_barron(0, 0.1)"
    num_iters: int = 100
    """Largest number of LM iterations a level."""
    pad: int = 2
    """Cells at the border of a feature map that are not used."""
    jacobi_scaling: bool = False
    learned_damping: bool = True
    lambda_: float = 0.0
    """Constant damping of a model without learned damping; 0 is Gauss-Newton."""
    damping_log10_range: tuple[float, float] = (-6.0, 5.0)

    def __post_init__(self) -> None:
        RobustLoss.parse(self.loss)
        low, high = self.damping_log10_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"The damping's range must be two rising numbers, got {self.damping_log10_range}.")
        if self.num_iters < 1 or self.pad < 0 or not (math.isfinite(self.lambda_) and self.lambda_ >= 0):
            raise ConfigError(
                "num_iters must be positive and pad and lambda_ not negative, got "
                f"{self.num_iters}, {self.pad}, {self.lambda_}."
            )

    def to_json(self) -> str:
        """Return the configuration as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PixLocConfig:
        """Read the JSON of :meth:`to_json`.

        Raises:
            ValueError: the text is not such a configuration.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(extractor=UNetConfig(**_tuples(values.pop("extractor"))), **_tuples(values))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the configuration is incomplete or has unknown entries: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


class _LevelOptimizer(nn.Module):
    """Holder of the damping under the name that it has in the published checkpoints."""

    def __init__(self, log10_range: tuple[float, float]) -> None:
        super().__init__()
        self.dampingnet = ConstantDamping(log10_range)


class PixLocModel(nn.Module):
    """All learned parts. The entries of its state dict are those of a published checkpoint's ``model``."""

    def __init__(self, config: PixLocConfig | None = None) -> None:
        super().__init__()
        self.config = config or PixLocConfig()
        self.extractor = UNet(self.config.extractor)
        levels = len(self.config.extractor.output_scales) if self.config.learned_damping else 0
        self.optimizer = nn.ModuleList(_LevelOptimizer(self.config.damping_log10_range) for _ in range(levels))

    def damping(self, level: int) -> torch.Tensor:
        """Return the damping factors (6,) of a level; level 0 is the finest."""
        if not self.config.learned_damping:
            return torch.full((6,), self.config.lambda_, device=next(self.extractor.parameters()).device)
        return torch.as_tensor(self.optimizer[level].dampingnet())  # type: ignore[operator]


@torch.inference_mode()
def extract(model: PixLocModel, pixels: torch.Tensor, *, half: bool = False) -> FeaturePyramid:
    """Return the features (float32) of RGB images (B, 3, H, W) in [0, 1], on the model's device.

    Args:
        model: in evaluation mode.
        pixels: images of one size.
        half: compute in half precision: float16 on a GPU, bfloat16 on a CPU, where it takes less than half the time.
            Features turn by half a degree, and confidences change by 0.02 at most.
    """
    device = next(model.parameters()).device
    if not half:
        return model.extractor(pixels.to(device))  # type: ignore[no-any-return]
    layout = torch.channels_last
    model.extractor.to(memory_format=layout)  # type: ignore[call-overload]
    with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
        pyramid: FeaturePyramid = model.extractor(pixels.to(device).contiguous(memory_format=layout))
    return FeaturePyramid(
        tuple(f.float() for f in pyramid.features), tuple(c.float() for c in pyramid.confidences), pyramid.strides
    )


def save_model(path: Path, model: PixLocModel, origin: str = "") -> None:
    """Write a model as safetensors, with its configuration and origin in the file's metadata."""
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": model.config.to_json(),
        "origin": origin,
    }
    save_tensors(model.state_dict(), path, metadata)


def load_model(path: Path) -> PixLocModel:
    """Read a converted model, in evaluation mode.

    Raises:
        WeightsError: the file is missing, damaged, of a newer version, or not a PixLoc model.
    """
    if not path.is_file():
        raise WeightsError(f"There is no PixLoc model '{path}'.")
    try:
        check_tensor_list(path)
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"'{path}' is not a safetensors file ({error}); an original checkpoint is converted by "
            "`kfloc convert pixloc-checkpoint`."
        ) from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"'{path}' is not a PixLoc model that this package wrote.")
    if metadata.get("version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{path}' has format version {metadata.get('version')}; this installation reads {FORMAT_VERSION}."
        )
    try:
        model = PixLocModel(PixLocConfig.from_json(metadata.get("config", "")))
        model.load_state_dict(load_file(path))
    except (ValueError, ConfigError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"'{path}' is damaged: {error}") from error
    return model.eval()


class ConstantDamping(nn.Module):
    """Learned damping factor per degree of freedom: 10^(low + sigmoid(const) (high - low))."""

    def __init__(self, log10_range: tuple[float, float]) -> None:
        super().__init__()
        self.log10_range = log10_range
        self.const = nn.Parameter(torch.zeros(6))

    def forward(self) -> torch.Tensor:
        """Return (6,) positive factors of H's diagonal, in the order tx, ty, tz, rx, ry, rz of the query camera."""
        low, high = self.log10_range
        return torch.pow(10.0, low + self.const.sigmoid() * (high - low))
