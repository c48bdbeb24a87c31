# SPDX-License-Identifier: Apache-2.0
"""Least squares over SE(3): Levenberg-Marquardt on the features of one level, and Gauss-Newton on points' matches.

Also the settings of the alignment, and what reference views disagree by at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


MEASURED_M = 0.6
"""Distance from the nearest reference view up to which the growth of errors is measured when a map is built; beyond
it, the scale of the covariance does not grow any more."""


@dataclass(frozen=True)
class RefinerSettings:
    """Settings of the alignment, and the conditions for accepting its result."""

    num_references: int = 3
    loss_scale: float = 0.3
    max_iterations: int = 20
    """Largest number of iterations per level."""
    min_points: int = 60
    """Smallest number of reference points in view at the start; with fewer, the alignment fails."""
    min_remaining: float = 0.3
    """Smallest share of the points in view at the start that must be in view at the end."""
    max_tries: int = 2
    """Largest number of starting poses that are refined, one after another until one succeeds."""
    max_cost: float = 1.0
    """Largest accepted mean robust cost at the finest level; calibrated when a map is built."""
    certain_support: float = 3.0
    """Support by the points' own matches, in standard deviations, from which a pose is certain."""
    settled_support: float = 6.0
    """Support by the map's points from which they settle the pose, and no other is tried."""
    max_supported_cost: float = 0.28
    """Largest accepted cost of a certain pose. Right poses cost more than the map's limit where lighting or content
    have changed; the cost of unrelated images is 0.29 and more, in every map."""
    max_correction_m: float = 0.5
    max_correction_deg: float = 15.0
    """A result further than either limit from its start is rejected."""
    covariance_scale: float = 1.0
    """Scale of the covariance, from the map's calibration; neighbouring residuals share errors."""
    covariance_doubling_m: float = math.inf
    """Distance from the nearest reference view at which that scale is twice as large, from the map's calibration."""
    own_error_m: float = 0.0
    own_error_rad: float = 0.0
    """Standard deviations of the map's own error, on each axis, from its calibration."""
    own_error_growth: float = 0.0
    """Standard deviation of a rotation that is added to it, on each axis, rad per metre from the nearest view."""
    sideways: float = 1.0
    """Factor on standard deviations sideways, from the map's calibration; see ``stretched``."""

    def own_covariance_at(self, distance_m: float) -> Matrix:
        """Return the covariance (6, 6) of the map's own error at a distance from the nearest reference view."""
        turned = self.own_error_rad**2 + (self.own_error_growth * distance_m) ** 2
        return np.diag(np.repeat([self.own_error_m**2, turned], 3))

    def scale_at(self, distance_m: float) -> float:
        """Return the scale of the covariance at a distance from the nearest reference view, see ``view_distances``."""
        return self.covariance_scale * (1.0 + min(distance_m, MEASURED_M) / self.covariance_doubling_m)


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


DAMPING = 0.3
"""Share of the views' mean matrix that is added to each view's own: what a view does not fix it says nothing about."""
MIN_VIEW_POINTS = 30
"""Fewest points in view of a reference view whose own pose is asked for."""


def disagreement(views: Sequence[Linearization]) -> Matrix:
    """Return the second moment (6, 6) of the steps (dt, dw) that reference views would take on their own.

    At the pose on which views agree as a whole, each has a gradient of its own: its points, its pose in the map and its
    depth are not exact, and features change with the viewpoint. The residuals of one view share these errors, so they
    show between views alone, as in covariances that are robust to clusters.

    Args:
        views: linearizations of the points of each view, at the common pose. Zeros are returned for fewer than two.
    """
    used = [view for view in views if view.valid_count >= MIN_VIEW_POINTS]
    if len(used) < 2:
        return np.zeros((6, 6))
    H = np.stack([view.weight_sum * view.H for view in used])
    g = np.stack([view.weight_sum * view.g for view in used])
    mean = H.mean(axis=0)
    if not np.trace(mean) > 0.0:  # nothing in the image changes with the pose, as where the camera is covered
        return np.zeros((6, 6))
    damped = H + DAMPING * mean + DAMPING_FLOOR * np.trace(mean) * np.eye(6)
    steps = np.linalg.solve(damped, g[:, :, None])[:, :, 0]
    return np.asarray(steps.T @ steps / len(used))


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
    from kfloc_ros.pixloc import kernels

    intrinsics = np.array([camera.fx, camera.fy, camera.cx, camera.cy])
    T, limits = np.array(T_camera_local, dtype=np.float64), (np.array(SCALES_PX), STEPS_PER_SCALE, CONVERGED, NEAR_M)
    return T if kernels.fit_matches(pixels, points, weights, T, intrinsics, *limits, squared) else None


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
        from kfloc_ros.pixloc import kernels

        intrinsics = np.array([camera.fx, camera.fy, camera.cx, camera.cy])
        T = np.ascontiguousarray(T_camera_local, dtype=np.float64)
        H, g = kernels.match_equations(pixels, points, weights, T, intrinsics, scale_px, NEAR_M, squared)
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
