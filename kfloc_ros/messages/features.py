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
import torch.nn.functional as F

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import COARSE_CHANNELS, COARSE_STRIDE, FINE_CHANNELS, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera

_STEPS = 127


def fill_coarse(message: Any, features: BackboneFeatures) -> Any:
    """Put the coarse features and the reliability into an ``Image`` and return it."""
    return _fill(message, torch.cat([features.coarse[0], features.reliability[:1].to(features.coarse)]))


def fill_fine(message: Any, features: BackboneFeatures) -> Any:
    """Put the fine features into an ``Image`` and return it."""
    return _fill(message, features.fine[0])


def read_features(coarse: Any, fine: Any, camera: Camera) -> BackboneFeatures:
    """What the refiner needs of a frame's features, on the CPU; the context is empty.

    Raises:
        FrameError: a message does not hold features of that camera's images.
    """
    coarse_grid = _read(coarse, camera, COARSE_STRIDE, COARSE_CHANNELS + 1)
    fine_grid = _read(fine, camera, FINE_STRIDE, FINE_CHANNELS)
    return BackboneFeatures(
        coarse=F.normalize(coarse_grid[None, :COARSE_CHANNELS], dim=1),
        fine=F.normalize(fine_grid[None], dim=1),
        context=torch.empty(1, 0, *coarse_grid.shape[1:]),
        reliability=coarse_grid[None, COARSE_CHANNELS].clamp(0.0, 1.0),
    )


def _fill(message: Any, grid: torch.Tensor) -> Any:
    channels, message.height, message.width = grid.shape
    message.encoding, message.is_bigendian = f"8SC{channels}", 0
    message.step = message.width * channels
    quantized = (grid.permute(1, 2, 0) * _STEPS).round().to(torch.int8).contiguous()
    # An array.array is taken over as it is; any other sequence is checked byte by byte in Python.
    data = array.array("B")
    data.frombytes(quantized.cpu().numpy().tobytes())
    message.data = data
    return message


def _read(message: Any, camera: Camera, stride: int, channels: int) -> torch.Tensor:
    """(C, H, W) float32 in [-1, 1]."""
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
    grid = torch.from_numpy(values.reshape(height, width, channels).copy())
    return grid.permute(2, 0, 1).float() / _STEPS
