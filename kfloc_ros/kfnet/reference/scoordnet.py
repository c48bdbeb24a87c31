# SPDX-License-Identifier: Apache-2.0
"""Published SCoordNet: twelve convolutions that regress a scene coordinate and its sigma for every 8x8 cell.

Cell (r, c) stands for the image pixel (u, v) = (8 c, 8 r), as in the original's labels. Source: the layers of KFNet's
released code; sigma = exp(u) with u the fourth output.

It regresses in a frame of its own, an isometry of the map: KFNet moves the scene points to their mean and decorrelates
their axes, and the published transforms include reflections as well as rotations. Large outdoor scenes are also scaled
down; the sigmas must be scaled back as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.errors import SourceError
from kfloc_ros.files import number_rows
from kfloc_ros.kfnet.reference.layers import Conv, Padding, image_to_input
from kfloc_ros.types import Matrix, SceneCoordinates

ISOMETRY_TOLERANCE = 1e-3
"""Largest deviation of R'R from the identity: the files have only a few digits."""


@dataclass(frozen=True, eq=False)
class NetworkFrame:
    """Transform ``x_network = scale * (R x_map + t)`` with R a rotation or a reflection.

    Raises:
        SourceError: the matrix is not an isometry, or the scale is not positive.
    """

    T_network_map: Matrix = field(default_factory=lambda: np.eye(4))
    """(4, 4) isometry, metres."""
    scale: float = 1.0
    """Network units per metre."""

    def __post_init__(self) -> None:
        T = self.T_network_map
        if T.shape != (4, 4) or not np.isfinite(T).all() or not np.allclose(T[3], [0, 0, 0, 1], atol=1e-6):
            raise SourceError("A scene transform must be a finite 4x4 matrix whose last row is 0 0 0 1.")
        if not np.allclose(T[:3, :3].T @ T[:3, :3], np.eye(3), atol=ISOMETRY_TOLERANCE):
            raise SourceError(
                "A scene transform must be a rotation or a reflection and a shift; this one stretches or shears."
            )
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise SourceError(f"The scale of a scene must be positive, got {self.scale}.")

    @classmethod
    def of_points(cls, points: NDArray[np.floating], scale: float = 1.0) -> NetworkFrame:
        """Return the frame at the mean of map points (N, 3), axes along their principal directions, largest first."""
        points = np.asarray(points, dtype=np.float64)
        mean = points.mean(0)
        _, axes = np.linalg.eigh(np.cov((points - mean).T))
        T = np.eye(4)
        T[:3, :3] = axes.T[::-1]
        T[:3, 3] = -T[:3, :3] @ mean
        return cls(T, scale)

    def to_network(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return network coordinates (..., 3) of map points (..., 3)."""
        T = self.T_network_map
        return np.asarray(self.scale * (points @ T[:3, :3].T + T[:3, 3]), dtype=np.float64)

    def to_map(self, coordinates: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return map points (..., 3), metres, of network coordinates (..., 3)."""
        T = np.linalg.inv(self.T_network_map)
        return np.asarray((coordinates / self.scale) @ T[:3, :3].T + T[:3, 3], dtype=np.float64)


def read_transform(path: Path, scale: float = 1.0) -> NetworkFrame:
    """Read KFNet's ``transform.txt``, which maps world points to the network's frame.

    Raises:
        SourceError: the file is missing, or is not an isometry of 4x4 numbers.
    """
    try:
        return NetworkFrame(np.array(number_rows(path), dtype=np.float64, ndmin=2), scale)
    except FileNotFoundError as error:
        raise SourceError(f"There is no '{path}'.") from error
    except (OSError, ValueError, SourceError) as error:
        raise SourceError(f"'{path}' is not a scene transform: {error}") from error


def write_transform(path: Path, frame: NetworkFrame) -> None:
    """Write ``transform.txt``; reading it back gives the same doubles. The format has no scale."""
    np.savetxt(path, frame.T_network_map, fmt="%.17g")


STRIDE = 8
CELL_PIXEL_OFFSET = 0.0
"""Pixel of cell 0, in x and in y."""
MIN_SIGMA = 1e-5
"""Smallest sigma that losses and the filter use, in network units."""

_LAYERS = (
    ("conv1a", 3, 64, 1),
    ("conv1b", 3, 64, 1),
    ("conv2a", 3, 256, 2),
    ("conv2b", 3, 256, 1),
    ("conv3a", 3, 512, 2),
    ("conv3b", 3, 512, 1),
    ("conv4a", 3, 1024, 2),
    ("conv4b", 3, 1024, 1),
    ("conv5", 3, 512, 1),
    ("conv6", 3, 256, 1),
    ("conv7", 1, 128, 1),
)
"""Name, kernel, channels at full width, stride; a ReLU after each."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Output of a batch, in the network's frame and units."""

    coordinates: torch.Tensor
    """(B, 3, h, w)"""
    log_sigma: torch.Tensor
    """(B, h, w) logarithm of the standard deviation per axis."""


class ReferenceSCoordNet(nn.Module):
    """KFNet's measurement network.

    Args:
        padding: ``TENSORFLOW`` for weights trained by the original, else ``CENTRED``.
        width: share of the published channels, for machines that cannot train all of them.
        frame: transform from the map to the frame of the output.
        image_size: width and height of the training images, pixels; None: unknown.
    """

    def __init__(
        self,
        padding: Padding = Padding.CENTRED,
        width: float = 1.0,
        frame: NetworkFrame | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.padding, self.width, self.image_size = padding, width, image_size
        inputs = 3
        for name, kernel, channels, stride in _LAYERS:
            outputs = max(4, round(channels * width))
            self.add_module(name, Conv(inputs, outputs, kernel=kernel, stride=stride, padding=padding))
            inputs = outputs
        self.prediction = Conv(inputs, 4, kernel=1, padding=padding)
        self.register_buffer("T_network_map", torch.eye(4, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        if frame is not None:
            self.set_frame(frame)

    T_network_map: torch.Tensor
    scale: torch.Tensor
    converted = False
    """The weights are published ones, not trained further here."""

    def set_frame(self, frame: NetworkFrame) -> None:
        """Set the frame of the output; it is part of the saved state."""
        self.T_network_map.copy_(torch.from_numpy(frame.T_network_map))
        self.scale.fill_(frame.scale)

    @property
    def frame(self) -> NetworkFrame:
        """Transform from the map to the frame of the output."""
        return NetworkFrame(self.T_network_map.cpu().numpy(), float(self.scale))

    def forward(self, images: torch.Tensor) -> Prediction:
        """Return coordinates of RGB images (B, 3, H, W) with values 0..255."""
        x = image_to_input(images)
        for name, _, _, _ in _LAYERS:
            x = F.relu(self.get_submodule(name)(x))
        # the last layer stays in float32: half precision would round a coordinate at 3 m to millimetres
        with torch.autocast(x.device.type, enabled=False):
            out = self.prediction(x.float())
        return Prediction(out[:, :3], out[:, 3])

    @torch.inference_mode()
    def measure(self, image: NDArray[np.uint8], variance_scale: float = 1.0) -> SceneCoordinates:
        """Return scene coordinates, metres in the map frame, of one RGB image (H, W, 3).

        Args:
            image: image of the camera that the network was trained for.
            variance_scale: from calibration on views that it was not trained on.
        """
        pixels = torch.from_numpy(image).to(self.T_network_map.device).permute(2, 0, 1)[None].float()
        predicted: Prediction = self(pixels)
        mean = self.to_map(predicted.coordinates[0])
        sigma_m = predicted.log_sigma[0].exp() / self.scale.float()
        variance = variance_scale * sigma_m.square()
        valid = torch.isfinite(mean).all(0) & torch.isfinite(variance)
        return SceneCoordinates(mean, variance, valid, STRIDE, CELL_PIXEL_OFFSET)

    def to_map(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return map points (3, ...) in metres of network coordinates (3, ...)."""
        T = torch.linalg.inv(self.T_network_map)
        flat = coordinates.reshape(3, -1).double() / self.scale
        points: torch.Tensor = T[:3, :3] @ flat + T[:3, 3:]
        return points.to(coordinates.dtype).reshape(coordinates.shape)
