# SPDX-License-Identifier: Apache-2.0
"""How images are resized for the U-Net."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import ConfigError, FrameError

RESIZE_BY = ("max", "max_force")


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image for the network."""

    pixels: torch.Tensor
    """(1, 3, h, w) float in [0, 1]."""
    scale: float
    """Factor of the camera. Sides are rounded to whole pixels and the factor is not, as in the original."""


@dataclass(frozen=True)
class ImageSize:
    """The longer side that images are brought to.

    Raises:
        ConfigError: a side below 16 pixels, or an unknown rule.
    """

    resize: int = 1024
    resize_by: str = "max"
    """``max``: larger images are made smaller; ``max_force``: smaller ones are made larger, too."""

    def __post_init__(self) -> None:
        if self.resize < 16 or self.resize_by not in RESIZE_BY:
            raise ConfigError(
                f"Images are resized to 16 pixels or more by one of {', '.join(RESIZE_BY)}, got {self.resize} by "
                f"'{self.resize_by}'."
            )

    def prepare(self, image: NDArray[np.uint8], image_scale: int = 1) -> PreparedImage:
        """Resize an RGB image (H, W, 3) to ``resize // image_scale``.

        Raises:
            FrameError: not an RGB image.
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
