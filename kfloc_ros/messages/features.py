# SPDX-License-Identifier: Apache-2.0
"""Backbone features over a topic, so that only one process runs the backbone: a ``sensor_msgs/CompressedImage``.

Its data are two grids of cells, row by row, one signed byte a channel: the coarse features with the reliability as a
last channel, then the fine features. One byte a channel is also how maps store features. One message costs a third of a
millisecond less than two. Nothing here imports ROS: a message is whatever has the fields of the ROS message.
"""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop, runs_compiled
from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import COARSE_CHANNELS, COARSE_STRIDE, FINE_CHANNELS, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera

_STEPS = 127


def fill_features(message: Any, features: BackboneFeatures) -> Any:
    """Put features and reliability into a ``CompressedImage`` and return it."""
    coarse, fine, reliability = (grid[0].cpu() for grid in (features.coarse, features.fine, features.reliability))
    grids = [(coarse.permute(1, 2, 0), reliability), (fine.permute(1, 2, 0), None)]
    parts = [np.empty((*grid.shape[:2], grid.shape[2] + (last is not None)), np.int8) for grid, last in grids]
    for (grid, last), cells in zip(grids, parts, strict=True):
        if runs_compiled(grid, *([] if last is None else [last])):
            extra = np.empty(grid.shape[:2], np.float32) if last is None else last.contiguous().numpy()
            byte_cells(grid.contiguous().numpy(), extra, cells)
            continue
        cells[..., : grid.shape[2]] = (grid * _STEPS).round().to(torch.int8).numpy()
        if last is not None:
            cells[..., -1] = (last * _STEPS).round().to(torch.int8).numpy()
    # An array.array is taken over as it is; any other sequence is checked byte by byte in Python.
    data = array.array("B")
    for cells in parts:
        data.frombytes(cells.data.cast("B"))
    message.data, message.format = data, _format(coarse.shape[2], coarse.shape[1], fine.shape[2], fine.shape[1])
    return message


def read_features(message: Any, camera: Camera) -> BackboneFeatures:
    """Return what the refiner needs of a frame's features, on the CPU; the context is empty.

    Raises:
        FrameError: the message does not hold features of that camera's images.
    """
    width, height = camera.width // COARSE_STRIDE, camera.height // COARSE_STRIDE
    fine_width, fine_height = camera.width // FINE_STRIDE, camera.height // FINE_STRIDE
    values = np.frombuffer(message.data, dtype=np.int8)
    coarse_size = height * width * (COARSE_CHANNELS + 1)
    expected = _format(width, height, fine_width, fine_height)
    if message.format != expected or values.size != coarse_size + fine_height * fine_width * FINE_CHANNELS:
        raise FrameError(
            f"A features message is '{message.format}' with {values.size} bytes, expected '{expected}'; filter_node "
            "and refiner_node must be given the same map."
        )
    cells = values[:coarse_size].reshape(height, width, COARSE_CHANNELS + 1)
    reliability = torch.from_numpy(cells[None, ..., COARSE_CHANNELS].astype(np.float32) / _STEPS)
    return BackboneFeatures(
        coarse=_unit(cells, COARSE_CHANNELS),
        fine=_unit(values[coarse_size:].reshape(fine_height, fine_width, FINE_CHANNELS), FINE_CHANNELS),
        context=torch.empty(1, 0, height, width),
        reliability=reliability.clamp_(0.0, 1.0),
    )


def warm_up(message: Any, camera: Camera) -> None:
    """Read features of zeros once, so that no frame waits for the compiled loop; the message is overwritten."""

    def zeros(channels: int, stride: int) -> torch.Tensor:
        return torch.zeros(1, channels, camera.height // stride, camera.width // stride)

    coarse = zeros(COARSE_CHANNELS, COARSE_STRIDE)
    features = BackboneFeatures(coarse, zeros(FINE_CHANNELS, FINE_STRIDE), coarse[:, :0], coarse[:, 0])
    read_features(fill_features(message, features), camera)


def _format(width: int, height: int, fine_width: int, fine_height: int) -> str:
    """Return the format of the two grids in words."""
    return f"8SC{COARSE_CHANNELS + 1} {width}x{height}, 8SC{FINE_CHANNELS} {fine_width}x{fine_height}"


def _unit(cells: NDArray[np.int8], channels: int) -> torch.Tensor:
    """Return (1, C, H, W) unit features, channels last in memory, of the first channels of cells (H, W, >= C)."""
    if runs_compiled():
        unit = torch.from_numpy(unit_cells(cells.reshape(-1, cells.shape[2]), channels))
        return unit.reshape(*cells.shape[:2], channels).permute(2, 0, 1)[None]
    values = torch.from_numpy(cells[..., :channels].astype(np.float32))
    length = torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_(min=1e-12)
    scaled: torch.Tensor = values / length
    return scaled.permute(2, 0, 1)[None]


@compiled_loop
def unit_cells(cells: NDArray[np.int8], channels: int) -> NDArray[np.float32]:
    """Return the first channels of cells (N, >= C) scaled to unit length, (N, C); zeros stay."""
    out = np.empty((len(cells), channels), np.float32)
    for n in range(len(cells)):
        squared = np.float32(0.0)  # whole numbers below 2^24, which are exact
        for c in range(channels):
            squared += np.float32(cells[n, c]) * np.float32(cells[n, c])
        scale = np.float32(1.0) / np.sqrt(max(squared, np.float32(1.0)))
        for c in range(channels):
            out[n, c] = np.float32(cells[n, c]) * scale
    return out


@compiled_loop
def byte_cells(grid: NDArray[np.float32], last: NDArray[np.float32], cells: NDArray[np.int8]) -> None:
    """Write cells (H, W, C) as signed bytes; if ``cells`` have one channel more, it is the values (H, W)."""
    rows, columns, channels = grid.shape
    for i in range(rows):
        for j in range(columns):
            for c in range(channels):
                cells[i, j, c] = np.int8(np.rint(grid[i, j, c] * np.float32(_STEPS)))
            if cells.shape[2] > channels:
                cells[i, j, channels] = np.int8(np.rint(last[i, j] * np.float32(_STEPS)))
