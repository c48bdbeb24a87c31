# SPDX-License-Identifier: Apache-2.0
"""Robust losses of a squared residual, by name: ``squared``, ``huber``, ``barron(a)``, ``scaled_barron(a, c)``...

Barron: "A General and Adaptive Robust Loss Function" (CVPR 2019). A loss scaled by c is c^2 rho(x / c^2).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from kfloc_ros.errors import ConfigError

_SHAPES = {"squared": 0, "huber": 0, "barron": 1}
"""Names, each with its number of parameters; ``scaled_`` before a name adds the scale as the last one."""

_EXPRESSION = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True)
class RobustLoss:
    """Robust loss rho(x) of the squared residual x with rho(0) = 0 and rho'(0) = 1.

    Raises:
        ConfigError: an unknown name, a parameter that is not a finite number, or a scale that is not positive.
    """

    name: str = "squared"
    alpha: float = 2.0
    """Shape of ``barron``: 2 is squared, 1 Charbonnier, 0 Cauchy, -2 Geman-McClure."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in _SHAPES:
            raise ConfigError(f"Unknown robust loss '{self.name}'; known: {', '.join(_SHAPES)}, each also scaled_.")
        if not (math.isfinite(self.alpha) and math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"A robust loss takes finite numbers and a positive scale, got {self}.")

    @classmethod
    def parse(cls, text: str) -> RobustLoss:
        """Read ``name`` or ``name(number, ...)``; nothing is evaluated.

        Raises:
            ConfigError: the text has another form, an unknown name, or a wrong number of parameters.
        """
        match = _EXPRESSION.fullmatch(text)
        if match is None:
            raise ConfigError(f"A robust loss is written 'name' or 'name(number, ...)', got '{text}'.")
        words = [word for word in (match[2] or "").split(",") if word.strip()]
        try:
            numbers = [float(word) for word in words]
        except ValueError as error:
            raise ConfigError(f"The parameters of the robust loss '{text}' must be numbers.") from error
        name = match[1].removesuffix("_loss")
        scaled = name.startswith("scaled_")
        name = name.removeprefix("scaled_")
        wanted = _SHAPES.get(name, 0) + scaled
        if name in _SHAPES and len(numbers) != wanted:
            raise ConfigError(f"The robust loss '{match[1]}' takes {wanted} parameters, got '{text}'.")
        alpha = numbers[0] if name == "barron" else 2.0
        return cls(name, alpha, numbers[-1] if scaled else 1.0)

    def __str__(self) -> str:
        scaled = self.scale != 1.0
        numbers = ([f"{self.alpha:g}"] if self.name == "barron" else []) + ([f"{self.scale:g}"] if scaled else [])
        return ("scaled_" if scaled else "") + self.name + (f"({', '.join(numbers)})" if numbers else "")

    def value(self, squared: torch.Tensor) -> torch.Tensor:
        """Return rho(x), in the shape of ``squared``."""
        s2 = self.scale**2
        x = squared / s2
        if self.name == "huber":
            return s2 * torch.where(x <= 1, x, 2 * x.clamp(min=1).sqrt() - 1)
        if self.name == "squared" or self.alpha == 2:
            return squared
        if self.alpha == 0:
            return s2 * 2 * torch.log1p(x / 2)
        b = abs(self.alpha - 2)
        return s2 * 2 * b / self.alpha * ((x / b + 1) ** (self.alpha / 2) - 1)

    def weight(self, squared: torch.Tensor) -> torch.Tensor:
        """Return rho'(x), the weight of a residual in the normal equations."""
        x = squared / self.scale**2
        if self.name == "huber":
            return x.clamp(min=1).rsqrt()
        if self.name == "squared" or self.alpha == 2:
            return torch.ones_like(squared)
        if self.alpha == 0:
            return 2 / (x + 2)
        b = abs(self.alpha - 2)
        return (x / b + 1) ** (self.alpha / 2 - 1)

    def curvature(self, squared: torch.Tensor) -> torch.Tensor:
        """Return rho''(x), zero or negative."""
        s2 = self.scale**2
        x = squared / s2
        if self.name == "huber":
            return torch.where(x <= 1, torch.zeros_like(x), -0.5 * x.clamp(min=1) ** -1.5 / s2)
        if self.name == "squared" or self.alpha == 2:
            return torch.zeros_like(squared)
        if self.alpha == 0:
            return -2 / (x + 2) ** 2 / s2
        b = abs(self.alpha - 2)
        return (self.alpha / 2 - 1) / b * (x / b + 1) ** (self.alpha / 2 - 2) / s2
