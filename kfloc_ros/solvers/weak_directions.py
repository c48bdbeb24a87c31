# SPDX-License-Identifier: Apache-2.0
"""A pose that matches fix, alone or together with an alignment that leaves some directions open.

Where few of a map's points are in view, the cost of an alignment hardly rises along a direction in which turning and
moving make up for each other, and the alignment ends anywhere on it. Matches of pixels with map points come from the
whole image and from other views, and know such a direction as well as any other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, so3_log
from kfloc_ros.pixloc.cost import project, projection_jacobian
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.solvers.covariance import map_frame_covariance
from kfloc_ros.types import Alignment

MATCH_SIGMA_PX = 3.0
"""Noise of a right match, on either axis: the image's features lie in cells of eight pixels."""

MATCHES_PER_WITNESS = 40.0
"""Matches that say as much as one with noise of its own, since views overlap and their points err together.

From the poses that matches alone fix: on hololens_office the square of their errors, by their covariance, has a median
of 38 times what independent noise gives.
"""

MIN_MATCHES = 8
MAX_STEPS = 30
LONGEST_STEP_M = 0.2
CONVERGED = 1e-5


def pose_by_matches(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, T_map_camera: Matrix
) -> Matrix | None:
    """The pose nearest to another at which most matches agree, or None if they are too few.

    A redescending loss (Geman and McClure's): matches off by much more than their noise have no say, and most of those
    made one by one are wrong, so that the start decides which agree.

    Args:
        pixels: (N, 2) of the image.
        points: (N, 3) metres, map frame.
        camera: of the image.
        T_map_camera: to start from.
    """
    T_camera_map = _descend(pixels, points, camera, inverse_pose(T_map_camera), None)
    return None if T_camera_map is None else inverse_pose(T_camera_map)


def with_matches(
    alignment: Alignment, pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera
) -> Alignment:
    """An alignment with its pose and covariance as they are with matches besides; cost and steps are still its own.

    The pose of both least squares together, each with its information: where the alignment fixes the pose well, nothing
    moves.
    """
    T, covariance = alignment.T_map_camera, alignment.covariance
    if T is None or covariance is None:
        return alignment
    T_camera_map = inverse_pose(T)
    A = np.kron(np.eye(2), -T[:3, :3])  # as in map_frame_covariance
    information = A.T @ np.linalg.inv(covariance) @ A
    moved = _descend(pixels, points, camera, T_camera_map, information)
    if moved is None:
        return alignment
    H, _ = _normal_equations(pixels, points, camera, moved)
    both = map_frame_covariance(information + H / MATCHES_PER_WITNESS, moved)
    return replace(alignment, T_map_camera=inverse_pose(moved), covariance=covariance if both is None else both)


def _descend(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    camera: Camera,
    start: Matrix,
    information: Matrix | None,
) -> Matrix | None:
    """``T_camera_map`` by Gauss-Newton, held at the start with an information of (dt, dw) if any."""
    T = start
    held = np.zeros((6, 6)) if information is None else information * MATCHES_PER_WITNESS
    if len(pixels) < MIN_MATCHES:
        return None
    for _ in range(MAX_STEPS):
        H, g = _normal_equations(pixels, points, camera, T)
        since_start = T @ inverse_pose(start)
        H, g = H + held, g + held @ np.concatenate([since_start[:3, 3], so3_log(since_start[:3, :3])])
        try:
            delta = -np.linalg.solve(H + 1e-6 * np.diag(np.diag(H)), g)
        except np.linalg.LinAlgError:
            return None  # no match is near
        delta *= min(1.0, LONGEST_STEP_M / max(float(np.linalg.norm(delta[:3])), 1e-12))
        T = left_update(T, delta)
        if np.abs(delta).max() < CONVERGED:
            break
    return T if np.isfinite(T).all() else None


def _normal_equations(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, T_camera_map: Matrix
) -> tuple[Matrix, NDArray[np.float64]]:
    """(6, 6) and (6,) of the left perturbation (dt, dw)."""
    at, P, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_map), camera, 1.0)
    J = projection_jacobian(P, camera, 1.0).numpy()
    error_px = at.numpy() - pixels
    squared = (error_px**2).sum(axis=1) / MATCH_SIGMA_PX**2
    weight = in_front.numpy() / (1 + squared / 4) ** 2 / MATCH_SIGMA_PX**2
    JW = (J * weight[:, None, None]).reshape(-1, 6)
    return JW.T @ J.reshape(-1, 6), JW.T @ error_px.reshape(-1)
