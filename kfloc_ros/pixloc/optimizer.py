# SPDX-License-Identifier: Apache-2.0
"""Least squares over SE(3): Levenberg-Marquardt on the features of one level, and Gauss-Newton on points' matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import has_numba, runs_compiled
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.pixloc.cost import (
    NEAR_M,
    POSE,
    FeatureImage,
    Intrinsics,
    Linearization,
    RobustLoss,
    linearize,
    project,
    projection_jacobian,
)

LAMBDA_START = 1e-3
LAMBDA_MIN = 1e-7
LAMBDA_MAX = 1e3
DAMPING_FLOOR = 1e-9
"""Added to the diagonal, so that the pose does not move in directions that the image does not constrain."""


@dataclass(frozen=True)
class StopRule:
    """Conditions of convergence of a level."""

    max_iterations: int
    step_m: float = 2e-4
    step_deg: float = 0.005
    cost_ratio: float = 1e-5


@dataclass(frozen=True, eq=False)
class LevelResult:
    """Result of one level."""

    T_camera_map: Matrix
    start: Linearization
    end: Linearization
    iterations: int
    poses: tuple[Matrix, ...]
    """Start and every accepted pose."""
    costs: tuple[float, ...]
    """Cost at each of these poses."""


def left_update(T_camera_map: Matrix, delta: np.ndarray) -> Matrix:
    """Apply (dt, dw) on the left, decoupled: P' = Exp(dw) P + dt."""
    return make_pose(so3_exp(delta[3:]), delta[:3]) @ T_camera_map


def descend(
    image: FeatureImage,
    points: torch.Tensor,
    features: torch.Tensor,
    confidence: torch.Tensor,
    T_camera_map: Matrix,
    camera: Camera,
    loss: RobustLoss,
    rule: StopRule,
) -> LevelResult:
    """Minimise the cost of one feature level from a pose: :func:`minimize`, where possible as one compiled loop.

    The two differ by rounding.

    Args:
        image, points, features, confidence, T_camera_map, camera, loss: as of :func:`~kfloc_ros.pixloc.cost.linearize`.
        rule: conditions of convergence.
    """
    if not runs_compiled(image.features, image.confidence, points, features, confidence):

        def at(pose: Matrix) -> Linearization:
            return linearize(image, points, features, confidence, pose, camera, loss)

        return minimize(at, T_camera_map, rule)
    from kfloc_ros.pixloc import kernels

    size = rule.max_iterations + 1
    poses, costs, ends = np.empty((size, 4, 4)), np.empty(size), np.empty((2, 3 + POSE * POSE + POSE))
    limits = rule.max_iterations, rule.step_m, np.radians(rule.step_deg), rule.cost_ratio
    iterations, accepted = kernels.descend(
        image.features.numpy(),
        image.confidence.numpy(),
        points.contiguous().numpy(),
        features.contiguous().numpy(),
        confidence.contiguous().numpy(),
        np.ascontiguousarray(T_camera_map, dtype=np.float64),
        Intrinsics.of(camera, image.stride).as_array(),
        loss.scale,
        NEAR_M,
        np.array([*limits, LAMBDA_START, LAMBDA_MIN, LAMBDA_MAX, DAMPING_FLOOR]),
        poses,
        costs,
        ends,
    )
    start, end = (
        Linearization.of_sums(at[0], at[1], int(at[2]), at[3:-POSE].reshape(POSE, POSE), at[-POSE:]) for at in ends
    )
    path, their_costs = tuple(poses[: accepted + 1]), tuple(costs[: accepted + 1].tolist())
    return LevelResult(path[-1], start, end, iterations, path, their_costs)


def minimize(
    linearize_at: Callable[[Matrix], Linearization],
    T_camera_map: Matrix,
    rule: StopRule,
) -> LevelResult:
    """Minimise the cost from a pose; the result is never worse than the start.

    A step is accepted only if it lowers the cost and loses no more than a third of the valid points.

    Args:
        linearize_at: returns the cost and its normal equations at a pose.
        T_camera_map: pose to start from, (4, 4).
        rule: conditions of convergence.
    """
    current = linearize_at(T_camera_map)
    start, poses, costs, damping, iterations = current, [T_camera_map], [current.cost], LAMBDA_START, 0
    while iterations < rule.max_iterations and current.valid_count > 0:
        iterations += 1
        delta = _step(current, damping)
        if delta is None:
            break
        candidate_pose = left_update(T_camera_map, delta)
        candidate = linearize_at(candidate_pose)
        if candidate.cost < current.cost and candidate.valid_count * 3 >= current.valid_count * 2:
            gain = (current.cost - candidate.cost) / max(current.cost, 1e-12)
            T_camera_map, current = candidate_pose, candidate
            poses.append(T_camera_map)
            costs.append(current.cost)
            damping = max(damping / 10, LAMBDA_MIN)
            small = np.linalg.norm(delta[:3]) < rule.step_m and np.degrees(np.linalg.norm(delta[3:])) < rule.step_deg
            if small or gain < rule.cost_ratio:
                break
        else:
            damping = damping * 10
            small = np.linalg.norm(delta[:3]) < rule.step_m and np.degrees(np.linalg.norm(delta[3:])) < rule.step_deg
            if damping > LAMBDA_MAX or small:
                break
    return LevelResult(T_camera_map, start, current, iterations, tuple(poses), tuple(costs))


def _step(at: Linearization, damping: float) -> np.ndarray | None:
    """Return the damped Gauss-Newton step, or None if the system cannot be solved."""
    damped = at.H.copy()
    damped[np.diag_indices_from(damped)] += np.diag(at.H) * damping + DAMPING_FLOOR
    try:
        np.linalg.cholesky(damped)  # only a positive definite system has a minimum
        delta = -np.linalg.solve(damped, at.g)
    except np.linalg.LinAlgError:
        return None
    return delta if np.isfinite(delta).all() else None


def information_of(at: Linearization) -> Matrix:
    """Return the information (6, 6) of (dt, dw): the Gauss-Newton matrix over the residual variance.

    With weights that sum to one, n equal residuals have information n H / cost.
    """
    return np.asarray(at.H * at.valid_count / max(at.cost, 1e-9))


SCALES_PX = (12.0, 6.0, 3.0)
"""Scales of the redescending loss, one after another; the last one is the noise of a match."""
STEPS_PER_SCALE = 6
CONVERGED = 1e-6
"""Largest step, in metres and radians, after which a scale has converged."""


def fitted(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    weights: NDArray[np.float64],
    T_camera_local: Matrix,
    camera: Camera,
    squared: NDArray[np.float64],
) -> Matrix | None:
    """Return the pose fitted to matches, None if they do not fix it; arguments as of :func:`match_equations`."""
    if not has_numba():
        return fitted_step_by_step(pixels, points, weights, T_camera_local, camera, squared)
    from kfloc_ros.pixloc import point_kernels

    intrinsics = np.array([camera.fx, camera.fy, camera.cx, camera.cy])
    T, limits = np.array(T_camera_local, dtype=np.float64), (np.array(SCALES_PX), STEPS_PER_SCALE, CONVERGED, NEAR_M)
    return T if point_kernels.fit_matches(pixels, points, weights, T, intrinsics, *limits, squared) else None


def fitted_step_by_step(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    weights: NDArray[np.float64],
    T_camera_local: Matrix,
    camera: Camera,
    squared: NDArray[np.float64],
) -> Matrix | None:
    """Return what the compiled loop returns, but for rounding; arguments as of :func:`match_equations`."""
    T = T_camera_local
    for scale_px in SCALES_PX:
        for _ in range(STEPS_PER_SCALE):
            H, g = match_equations(pixels, points, weights, T, camera, scale_px, squared)
            step = _solve(H, g)
            if step is None:
                return None
            T = left_update(T, step)
            if np.abs(step).max() < CONVERGED:
                break
    return T


def match_equations(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    weights: NDArray[np.float64],
    T_camera_local: Matrix,
    camera: Camera,
    scale_px: float,
    squared: NDArray[np.float64],
) -> tuple[Matrix, NDArray[np.float64]]:
    """Return H (6, 6) and g (6,) of the matches over the left perturbation (dt, dw); write squared errors (N,), px^2.

    Args:
        pixels: (N, 2) places of the points in the image.
        points: (N, 3) metres, in the local frame.
        weights: (N,) weights of the matches.
        T_camera_local: pose, (4, 4).
        camera: pinhole camera of the image.
        scale_px: scale of the loss of Geman and McClure.
        squared: (N,) written.
    """
    if has_numba():
        from kfloc_ros.pixloc import point_kernels

        intrinsics = np.array([camera.fx, camera.fy, camera.cx, camera.cy])
        T = np.ascontiguousarray(T_camera_local, dtype=np.float64)
        H, g = point_kernels.match_equations(pixels, points, weights, T, intrinsics, scale_px, NEAR_M, squared)
        return H, g
    at, P, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_local), camera, 1.0)
    J = projection_jacobian(P, camera, 1.0).numpy()
    error_px = at.numpy() - pixels
    squared[:] = (error_px**2).sum(axis=1)
    weight = weights * in_front.numpy() / (1 + squared / scale_px**2) ** 2
    JW = (J * weight[:, None, None]).reshape(-1, 6)
    return JW.T @ J.reshape(-1, 6), JW.T @ error_px.reshape(-1)


def _solve(H: Matrix, g: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the Gauss-Newton step (dt, dw), or None if the matches do not fix the pose."""
    try:
        step = np.asarray(-np.linalg.solve(H + 1e-6 * np.diag(np.diag(H)) + 1e-9 * np.eye(6), g), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    return step if np.isfinite(step).all() else None
