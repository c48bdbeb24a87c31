# SPDX-License-Identifier: Apache-2.0
"""SO(3) and quaternion maps on NumPy arrays (float64)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def skew(v: ArrayLike) -> Matrix:
    """Return the (3, 3) matrix with ``skew(v) @ w == cross(v, w)``."""
    x, y, z = np.asarray(v, dtype=np.float64)
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def so3_exp(v: ArrayLike) -> Matrix:
    """Return the rotation matrix (3, 3) of a rotation vector in radians."""
    v = np.asarray(v, dtype=np.float64)
    angle = float(np.linalg.norm(v))
    if angle < 1e-8:
        return np.eye(3) + skew(v)
    axis = skew(v / angle)
    return np.asarray(np.eye(3) + np.sin(angle) * axis + (1.0 - np.cos(angle)) * axis @ axis)


def so3_log(R: ArrayLike) -> Matrix:
    """Return the rotation vector (3,) in radians of a rotation matrix; exact near 0 and near pi."""
    q = matrix_to_quaternion(R)
    w, v = q[3], q[:3]
    if w < 0:
        w, v = -w, -v
    norm = float(np.linalg.norm(v))
    if norm < 1e-12:
        return 2.0 * v
    return np.asarray(2.0 * np.arctan2(norm, w) / norm * v)


def unit_quaternion(xyzw: ArrayLike) -> Matrix:
    """Return a quaternion (4,) scaled to unit length.

    Raises:
        ValueError: the quaternion has zero length or is not finite.
    """
    q = np.asarray(xyzw, dtype=np.float64)
    norm = float(np.linalg.norm(q))
    if not np.isfinite(norm) or norm < 1e-9:
        raise ValueError(f"A quaternion must be finite and non-zero, got {q}.")
    return np.asarray(q / norm)


MAX_ROTATION_ERROR = 0.02
"""Largest difference of ``R^T R`` from the identity for a matrix that a file may call a rotation."""


def is_rotation(R: ArrayLike) -> bool:
    """Return true if a matrix (3, 3) is finite, orthonormal but for rounding, and turns without mirroring."""
    matrix = np.asarray(R, dtype=np.float64)
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 2:
        return False
    return bool(np.abs(matrix.T @ matrix - np.eye(3)).max() < MAX_ROTATION_ERROR and np.linalg.det(matrix) > 0)


def quaternion_to_matrix(xyzw: ArrayLike) -> Matrix:
    """Return the rotation matrix (3, 3) of a quaternion (x, y, z, w), which is normalised first.

    Raises:
        ValueError: the quaternion has zero length or is not finite.
    """
    x, y, z, w = unit_quaternion(xyzw)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def matrix_to_quaternion(R: ArrayLike) -> Matrix:
    """Return the unit quaternion (x, y, z, w), w >= 0, of a rotation matrix."""
    m = np.asarray(R, dtype=np.float64)
    trace = np.trace(m)
    candidates = np.array([m[0, 0], m[1, 1], m[2, 2], trace])
    k = int(np.argmax(candidates))
    q = np.empty(4)
    if k == 3:
        q[:] = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], 1.0 + trace
    else:
        i, j, l = k, (k + 1) % 3, (k + 2) % 3  # noqa: E741
        q[i] = 1.0 - trace + 2.0 * m[i, i]
        q[j] = m[j, i] + m[i, j]
        q[l] = m[l, i] + m[i, l]
        q[3] = m[l, j] - m[j, l]
    q /= np.linalg.norm(q)
    return q if q[3] >= 0 else -q


def make_pose(R: ArrayLike, t: ArrayLike) -> Matrix:
    """Return the (4, 4) rigid transform of a rotation (3, 3) and a translation (3,)."""
    T = np.eye(4)
    T[:3, :3] = R
    T[:3, 3] = t
    return T


def inverse_pose(T: Matrix) -> Matrix:
    """Return the inverse of a rigid transform (4, 4)."""
    return make_pose(T[:3, :3].T, -T[:3, :3].T @ T[:3, 3])


def interpolate(T0: Matrix, T1: Matrix, share: float) -> Matrix:
    """Return the rigid transform (4, 4) at ``share`` of the way between two others (0: ``T0``, 1: ``T1``).

    The rotation has a constant rate about one axis; the translation is linear.
    """
    turn = so3_exp(share * so3_log(T0[:3, :3].T @ T1[:3, :3]))
    return make_pose(T0[:3, :3] @ turn, (1 - share) * T0[:3, 3] + share * T1[:3, 3])


def rotation_angle_deg(R: ArrayLike) -> float:
    """Return the angle of a rotation matrix in degrees."""
    return float(np.degrees(np.linalg.norm(so3_log(R))))


JUMP_M = 0.5
JUMP_DEG = 30.0
"""Limits of the change between successive poses; a pose beyond one of them belongs to another motion."""


def jumped(before: Matrix, after: Matrix) -> bool:
    """Return true if two successive poses (4, 4) are too far apart for one motion."""
    moved = inverse_pose(before) @ after
    return float(np.linalg.norm(moved[:3, 3])) > JUMP_M or rotation_angle_deg(moved[:3, :3]) > JUMP_DEG


def is_farther(a: Matrix, b: Matrix, limit_m: float, limit_deg: float) -> bool:
    """Return true if two poses (4, 4) are farther apart than one of two limits: in position, or in orientation."""
    return (
        float(np.linalg.norm(a[:3, 3] - b[:3, 3])) > limit_m or rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) > limit_deg
    )
