# SPDX-License-Identifier: Apache-2.0
"""Quaternions at ROS's border by ``tf_transformations`` where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.messages.poses import Quaternions
from kfloc_ros.types import Matrix

try:
    import tf_transformations
except ImportError:  # it, or transforms3d, which it wraps
    tf_transformations = None


def ros_quaternions(package: Any = tf_transformations) -> Quaternions:
    """Return the conversions of ``tf_transformations``, with the sign w >= 0, or our own where it is not installed."""
    if package is None:
        return Quaternions()

    def from_matrix(R: Matrix) -> Matrix:
        q = np.asarray(package.quaternion_from_matrix(make_pose(R, np.zeros(3))), dtype=np.float64)
        return q if q[3] >= 0 else -q

    def to_matrix(xyzw: ArrayLike) -> Matrix:
        return np.asarray(package.quaternion_matrix(xyzw), dtype=np.float64)[:3, :3]

    return Quaternions(from_matrix, to_matrix)
