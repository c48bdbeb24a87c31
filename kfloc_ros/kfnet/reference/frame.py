# SPDX-License-Identifier: Apache-2.0
"""Frame in which a reference SCoordNet regresses: an isometry of the map and, for large scenes, a scale.

KFNet moves the scene points to their mean and decorrelates their axes; the published transforms include reflections as
well as rotations. Large outdoor scenes are also scaled down; the sigmas must be scaled back as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.files import number_rows
from kfloc_ros.types import Matrix

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
