# SPDX-License-Identifier: Apache-2.0
"""The filter's pictures of one frame as a live viewer shows them: no axes, few words, the cells as blocks."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.stages import CoarseResult
from kfloc_ros.visualization.cells import NO_VALUE, SIGMA, CellPicture, flow_picture, flow_wheel, sigma_picture

FLOW_CELL_PX = 8
NOISE_CELL_PX = 5
_CAPTION_PX = 22


def flow_view(result: CoarseResult) -> NDArray[np.uint8] | None:
    """Where each cell was in the frame before, with the key in the corner; None at a fresh start."""
    picture = flow_picture(result.filtered.flow) if result.filtered is not None else None
    if picture is None:
        return None
    image = _blocks(picture, FLOW_CELL_PX)
    wheel = flow_wheel(max(min(image.shape[:2]) // 6, 16))
    image[-len(wheel) :, -len(wheel) :] = wheel
    return image


def noise_view(result: CoarseResult) -> NDArray[np.uint8] | None:
    """Standard deviations of measurement, process and posterior side by side, in the same colours; grey: none there."""
    filtered, measurement = result.filtered, result.measurement
    if filtered is None or measurement is None:
        return None
    prior = filtered.prior
    panels: list[tuple[str, torch.Tensor | None, torch.Tensor | None]] = [
        ("measurement", measurement.variance, measurement.valid),
        ("process", None if prior is None else prior.process_variance, None if prior is None else prior.valid),
        ("posterior", filtered.posterior.variance, filtered.posterior.valid),
    ]
    return np.concatenate([_panel(*panel, measurement.variance.shape) for panel in panels], axis=1)


def _panel(
    title: str, variance: torch.Tensor | None, valid: torch.Tensor | None, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    picture = sigma_picture(title, variance, valid)
    if picture is None:
        picture = CellPicture(title, np.full((*shape, 3), NO_VALUE, np.uint8))
        caption = f"{title}: none"
    else:
        assert variance is not None
        typical = 100 * float(variance.detach().float().clamp(min=0).sqrt().median())
        caption = f"{title}: median {typical:.1f} cm"
    image = _blocks(picture, NOISE_CELL_PX)
    strip = np.zeros((_CAPTION_PX, image.shape[1], 3), np.uint8)
    cv2.putText(strip, caption, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
    scale = SIGMA.rgb(np.geomspace(SIGMA.low, SIGMA.high, image.shape[1]))
    strip[-3:] = scale
    return np.concatenate([strip, image])


def _blocks(picture: CellPicture, cell_px: int) -> NDArray[np.uint8]:
    height, width = picture.rgb.shape[:2]
    return picture.enlarged(cell_px * width, cell_px * height)
