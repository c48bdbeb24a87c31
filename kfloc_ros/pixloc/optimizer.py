# SPDX-License-Identifier: Apache-2.0
"""Levenberg-Marquardt over SE(3) with accept/reject, one feature level at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.pixloc.cost import Linearization

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
