# SPDX-License-Identifier: Apache-2.0
"""Confidence of a pose: the probability that it is right, from what speaks for and against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.pixloc.camera_fit import FittedCamera
from kfloc_ros.types import Matrix, PoseEstimate

GOOD_M, GOOD_DEG = 0.10, 5.0
"""Errors below which a pose is right, in the meaning of its confidence."""
_EVIDENCE = {
    "cost_ratio": (0.88, -0.3),
    "missing_share": (0.18, -1.2),
    "camera_score": (2.71, -0.25),
    "sigma_score": (-0.91, -0.74),
    "shift_score": (1.35, -0.36),
    "fit_score": (-0.76, -1.44),
}
"""Mean and weight of each value that the confidence depends on."""
_BIAS = 2.23
EVIDENCE = tuple(_EVIDENCE)
"""Names of the values that the confidence depends on; see :func:`confidence_of`."""


def confidence_of(evidence: Mapping[str, float], odds: float = 1.0) -> float:
    """Return the probability that a pose is right: errors below 10 cm and 5 deg.

    The model is a logistic regression on treated frames of four maps; see ``docs/results/trust.md``.

    Args:
        evidence: values by name; one that is not known counts as the mean. ``cost_ratio``: cost relative to the map's
            limit. ``missing_share``: blocks that do not match. ``camera_score``: log(1 + chi-square) of the camera's
            offsets. ``sigma_score``: log of the standard deviation relative to 10 cm or 5 deg. ``shift_score``: log(1 +
            ``shift_chi2``). ``fit_score``: see :func:`fit_score`.
        odds: factor on the odds, from the map's calibration.
    """
    weighted = sum(weight * (evidence.get(k, mean) - mean) for k, (mean, weight) in _EVIDENCE.items())
    total = _BIAS + math.log(odds) + weighted
    return 1.0 / (1.0 + math.exp(-max(min(total, 30.0), -30.0)))


def fit_score(T_map_camera: Matrix, fitted: FittedCamera) -> float:
    """Return the log of the distance between an aligned pose (4, 4) and that of the fitted camera.

    It is relative to 10 cm or 5 deg, together with the standard deviation of the fitted pose. A pose that holds moves
    little where the camera is free as well; one in a wrong minimum moves far.
    """
    apart, variance = pose_tangent_error(T_map_camera, fitted.T_map_camera), np.diag(fitted.covariance)
    far = 0.0
    for axes, limit in ((slice(0, 3), GOOD_M), (slice(3, 6), math.radians(GOOD_DEG))):
        far = max(far, float(apart[axes] @ apart[axes]) / (limit**2 + float(variance[axes].sum())))
    return 0.5 * math.log(min(max(far, 4e-4), 16.0))


def widened(estimate: PoseEstimate, moved: NDArray[np.float64], covariance: Matrix, share: float = 0.3) -> PoseEstimate:
    """Return an estimate whose covariance also covers another pose.

    Args:
        estimate: estimate with a covariance; one without is returned as it is.
        moved: (6,) tangent error between the poses.
        covariance: (6, 6) covariance of the other pose.
        share: share of the distance that is added in all directions.
    """
    if estimate.covariance is None:
        return estimate
    around = share**2 * np.repeat([moved[:3] @ moved[:3], moved[3:] @ moved[3:]], 3)
    wider = estimate.covariance + np.outer(moved, moved) + np.diag(around) + covariance
    return replace(estimate, covariance=0.5 * (wider + wider.T))
