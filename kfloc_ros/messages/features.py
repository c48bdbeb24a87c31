# SPDX-License-Identifier: Apache-2.0
"""Backbone features over topics, so that only one process runs the backbone: two ``sensor_msgs/Image`` of signed bytes.

``frame/features_coarse`` has one channel more than the features, the reliability; one byte a channel is also how maps
store features. Nothing here imports ROS: a message is whatever has the fields of the ROS message.
"""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import torch

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import COARSE_CHANNELS, COARSE_STRIDE, FINE_CHANNELS, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera

_STEPS = 127


def fill_coarse(message: Any, features: BackboneFeatures) -> Any:
    """Put the coarse features and the reliability into an ``Image`` and return it."""
    return _fill(message, features.coarse[0], features.reliability[:1])


def fill_fine(message: Any, features: BackboneFeatures) -> Any:
    """Put the fine features into an ``Image`` and return it."""
    return _fill(message, features.fine[0])


def read_features(coarse: Any, fine: Any, camera: Camera) -> BackboneFeatures:
    """What the refiner needs of a frame's features, on the CPU; the context is empty.

    Raises:
        FrameError: a message does not hold features of that camera's images.
    """
    coarse_cells = _read(coarse, camera, COARSE_STRIDE, COARSE_CHANNELS + 1)
    fine_cells = _read(fine, camera, FINE_STRIDE, FINE_CHANNELS)
    return BackboneFeatures(
        coarse=_unit(coarse_cells[..., :COARSE_CHANNELS]),
        fine=_unit(fine_cells),
        context=torch.empty(1, 0, *coarse_cells.shape[:2]),
        reliability=(coarse_cells[None, ..., COARSE_CHANNELS] / _STEPS).clamp(0.0, 1.0),
    )


def _fill(message: Any, *grids: torch.Tensor) -> Any:
    """Put grids (C, H, W) into an ``Image``, one after the other in its channels."""
    (_, message.height, message.width), channels = grids[0].shape, sum(len(grid) for grid in grids)
    message.encoding, message.is_bigendian = f"8SC{channels}", 0
    message.step = message.width * channels
    quantized, first = torch.empty(message.height, message.width, channels, dtype=torch.int8), 0
    for grid in grids:  # in the backbone's memory layout, channels last; joined first, they would be moved twice
        quantized[..., first : first + len(grid)] = (grid.permute(1, 2, 0).cpu() * _STEPS).round_()
        first += len(grid)
    # An array.array is taken over as it is; any other sequence is checked byte by byte in Python.
    data = array.array("B")
    data.frombytes(quantized.numpy().tobytes())
    message.data = data
    return message


def _unit(cells: torch.Tensor) -> torch.Tensor:
    """Return (1, C, H, W) unit features, channels last in memory, of cells (H, W, C) of any scale."""
    length = torch.linalg.vector_norm(cells, dim=-1, keepdim=True).clamp_(min=1e-12)
    unit: torch.Tensor = cells / length
    return unit.permute(2, 0, 1)[None]


def _read(message: Any, camera: Camera, stride: int, channels: int) -> torch.Tensor:
    """(H, W, C) float32 in steps: [-127, 127]."""
    height, width = camera.height // stride, camera.width // stride
    values = np.frombuffer(message.data, dtype=np.int8)
    if (
        (message.height, message.width, message.encoding) != (height, width, f"8SC{channels}")
        or message.step != width * channels
        or values.size != height * width * channels
    ):
        raise FrameError(
            f"A features message is {message.width}x{message.height} '{message.encoding}' with {values.size} bytes, "
            f"expected {width}x{height} '8SC{channels}'; filter_node and refiner_node must be given the same map."
        )
    return torch.from_numpy(values.reshape(height, width, channels).astype(np.float32))
