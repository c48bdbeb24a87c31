# SPDX-License-Identifier: Apache-2.0
"""How far an alignment can be trusted: a success score and the covariance of its pose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.geometry.pose import Pose
from kfloc_ros.pixloc.feature_cost import NormalEquations
from kfloc_ros.pixloc.losses import RobustLoss
from kfloc_ros.solvers.covariance import map_frame_covariance

UNRELATED = 2.0
"""Squared distance of two unit features that have nothing to do with each other."""
WELL_CONDITIONED = 1e-3
"""Smallest eigenvalue of the scaled system from which on every direction counts as fixed."""


@dataclass(frozen=True)
class Score:
    """Three figures in [0, 1], and their product."""

    valid_ratio: float
    """Share of the reference points that are in view."""
    likeness: float
    """1 where features are equal, 0 where they are as different as unrelated ones."""
    conditioning: float
    """1 where every direction is fixed by the image, 0 where one is free."""

    @property
    def value(self) -> float:
        return self.valid_ratio * self.likeness * self.conditioning


def score_of(at: NormalEquations, loss: RobustLoss, point_count: int) -> Score:
    """Score of the first element at its final pose; likeness supposes unit features."""
    cost = float(at.mean_cost[0])
    worst = float(loss.value(torch.tensor(UNRELATED, dtype=torch.float64)))
    likeness = 1 - cost / worst if np.isfinite(cost) else 0.0
    H = at.H[0].cpu().numpy()
    diagonal = np.sqrt(np.maximum(np.diag(H), 0))
    conditioning = 0.0
    if np.isfinite(H).all() and (diagonal > 0).all():
        smallest = float(np.linalg.eigvalsh(H / np.outer(diagonal, diagonal))[0])
        conditioning = min(max(smallest / WELL_CONDITIONED, 0.0), 1.0)
    return Score(int(at.valid_count[0]) / max(point_count, 1), min(max(likeness, 0.0), 1.0), conditioning)


def pose_covariance(at: NormalEquations, T_camera_map: Pose) -> Matrix | None:
    """(6, 6) covariance of T_map_camera, in the order of ``PoseWithCovariance``, of the first element.

    The sandwich of an M-estimator, H^-1 (sum g_n g_n^T) H^-1, with each point's own part g_n of the gradient: it
    needs no residual variance, and the channels of one point may err together. Points are taken as independent.

    Returns:
        None where the image does not fix the pose in every direction.
    """
    H, scatter = at.H[0].cpu().numpy(), at.scatter[0].cpu().numpy()
    if not (np.isfinite(H).all() and np.isfinite(scatter).all()):
        return None
    try:
        information = H @ np.linalg.solve(scatter, H)
    except np.linalg.LinAlgError:
        return None
    return map_frame_covariance(np.asarray(information), T_camera_map.matrix_numpy()[0])
