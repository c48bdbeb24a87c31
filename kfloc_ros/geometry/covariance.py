# SPDX-License-Identifier: Apache-2.0
"""Pose covariance in the map frame, in ROS order; and poses with their covariance on the ground plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, make_pose, skew, so3_exp, so3_log

CHI2_6_MEDIAN = 5.348
"""Median of the chi-square distribution with 6 degrees of freedom."""
CHI2_6_999 = 22.458
"""99.9 % quantile of the same."""
MAX_STD_M = 10.0
MAX_STD_RAD = np.pi


def map_frame_covariance(information: Matrix, T_camera_map: Matrix) -> Matrix | None:
    """Return the covariance of T_map_camera, given the information of a left perturbation of T_camera_map.

    The solver's tangent is (dt, dw) with P' = Exp(dw) P + dt in the camera frame. To first order the camera centre c
    moves by -R^T dt and the orientation by the fixed-axes rotation -R^T dw, where R is the rotation of T_camera_map (P
    = 0 is the camera centre, so dw does not move it).

    Args:
        information: (6, 6) inverse covariance of (dt, dw), symmetric.
        T_camera_map: (4, 4) pose at which it was computed.

    Returns:
        (6, 6) in the order of PoseWithCovariance; None if the information is singular, or a standard deviation exceeds
            10 m or half a turn.
    """
    if not np.isfinite(information).all():
        return None
    values, vectors = np.linalg.eigh((information + information.T) / 2)
    if values[0] <= 1e-12 * max(values[-1], 1e-300) or values[0] <= 0:
        return None
    camera = (vectors / values) @ vectors.T
    # P' = Exp(dw) (R X + t) + dt: the new centre solves 0 = R X + t + Exp(-dw) dt, so dX = -R^T dt.
    A = np.zeros((6, 6))
    A[:3, :3] = A[3:, 3:] = -T_camera_map[:3, :3].T
    covariance = A @ camera @ A.T
    std = np.sqrt(np.diag(covariance))
    if not np.isfinite(std).all() or std[:3].max() > MAX_STD_M or std[3:].max() > MAX_STD_RAD:
        return None
    return np.asarray((covariance + covariance.T) / 2)


def move_covariance(covariance: Matrix, T_map_camera: Matrix, T_camera_body: Matrix) -> Matrix:
    """Return the covariance of T_map_camera @ T_camera_body, given that of T_map_camera and an exact T_camera_body.

    A rotation error dr about the camera moves the body's origin by dr x (lever arm in the map frame).
    """
    lever = T_map_camera[:3, :3] @ T_camera_body[:3, 3]
    A = np.eye(6)
    A[:3, 3:] = -skew(lever)
    return np.asarray(A @ covariance @ A.T)


def camera_frame(T_map_camera: Matrix) -> Matrix:
    """Return the (6, 6) rotation of a tangent error from the map's axes to those of a camera with a pose (4, 4)."""
    return np.asarray(np.kron(np.eye(2), T_map_camera[:3, :3].T))


def sideways_factors(sideways: float) -> Matrix:
    """Return the factors (6,) on standard deviations in the camera frame: along x and about y, and the inverse along y
    and about x."""
    x, y = sideways, 1.0 / sideways
    return np.array([x, y, 1.0, y, x, 1.0])


def stretched(covariance: Matrix, T_map_camera: Matrix, sideways: float) -> Matrix:
    """Return a covariance (6, 6) of a pose (4, 4), stretched along the camera's axes by :func:`sideways_factors`."""
    if sideways == 1.0:
        return covariance
    turn = camera_frame(T_map_camera)
    A = turn.T @ (sideways_factors(sideways)[:, None] * turn)
    return np.asarray(A @ covariance @ A.T)


def at_least(covariance: Matrix, variances: Matrix) -> Matrix:
    """Return the covariance (6, 6), enlarged where independent ``variances`` (6,) exceed it, in every direction.

    Two covariances of one error are not added: in each direction, the larger one counts.
    """
    scale = np.sqrt(np.maximum(variances, 1e-18))
    values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    return np.asarray(np.outer(scale, scale) * ((vectors * np.maximum(values, 1.0)) @ vectors.T))


def probability_within(covariance: Matrix, metres: float, radians: float) -> float:
    """Return the smaller of the probabilities of a position and a rotation error below limits, for normal errors.

    The sum of squares of three normal errors is taken as a gamma variable of the same mean and variance
    (Satterthwaite), and that by the cube-root approximation of Wilson and Hilferty; right to about 0.04.

    Args:
        covariance: (6, 6) of a pose.
        metres: limit of the position error's length.
        radians: limit of the rotation error's angle.
    """
    probabilities = []
    for block, limit in ((covariance[:3, :3], metres), (covariance[3:, 3:], radians)):
        variances = np.maximum(np.linalg.eigvalsh(block), 1e-18)
        mean, spread = float(variances.sum()), 2.0 * float((variances**2).sum())
        ninth = spread / (9.0 * mean**2)
        score = ((limit**2 / mean) ** (1 / 3) - (1.0 - ninth)) / math.sqrt(ninth)
        probabilities.append(0.5 * math.erfc(-score / math.sqrt(2.0)))
    return min(probabilities)


def pose_tangent_error(estimate: Matrix, truth: Matrix) -> Matrix:
    """Return the error (dt, dr), (6,), of a pose in the tangent space of its covariance.

    Both poses are ``T_map_camera`` (4, 4). dt in metres and dr in radians lead from the estimate to the truth: t_truth
    = t_estimate + dt, R_truth = Exp(dr) R_estimate.
    """
    dR = truth[:3, :3] @ estimate[:3, :3].T
    return np.concatenate([truth[:3, 3] - estimate[:3, 3], so3_log(dR)])


@dataclass(frozen=True, eq=False)
class UncertainPose:
    """Pose with its covariance."""

    T_map_camera: Matrix
    """(4, 4)"""
    covariance: Matrix
    """(6, 6) in the order of PoseWithCovariance."""

    def chi2(self, other: UncertainPose) -> float:
        """Return the chi-square of the difference from another estimate, with 6 degrees of freedom."""
        apart = pose_tangent_error(self.T_map_camera, other.T_map_camera)
        return float(apart @ np.linalg.solve(self.covariance + other.covariance, apart))

    def intersected(self, other: UncertainPose) -> UncertainPose:
        """Return the covariance intersection with another estimate, whose errors may be correlated with these.

        Of all weights w of the other's information, and 1 - w of this one's, the one with the smallest determinant
        counts (Julier and Uhlmann, A non-divergent estimation algorithm in the presence of unknown correlations, 1997).
        """
        own, others = np.linalg.inv(self.covariance), np.linalg.inv(other.covariance)
        weights = np.linspace(0.0, 1.0, INTERSECTION_STEPS + 1)
        w = max(weights, key=lambda w: float(np.linalg.slogdet((1 - w) * own + w * others)[1]))
        covariance = np.linalg.inv((1 - w) * own + w * others)
        step = w * covariance @ others @ pose_tangent_error(self.T_map_camera, other.T_map_camera)
        T = make_pose(so3_exp(step[3:]) @ self.T_map_camera[:3, :3], self.T_map_camera[:3, 3] + step[:3])
        return UncertainPose(T, 0.5 * (covariance + covariance.T))


INTERSECTION_STEPS = 20
"""Number of steps in which the weight of an intersection is searched."""
FLOOR_SIGMA_M, FLOOR_SIGMA_DEG = 0.02, 1.0
"""Standard deviations of a real floor, of a robot's suspension and of the map's vertical axis from the ideal plane."""
CHI2_3_999 = 16.266
"""99.9 % quantile of the chi-square distribution with 3 degrees of freedom."""
_ON_PLANE, _OFF_PLANE = [0, 1, 5], [2, 3, 4]
"""Components of a pose covariance: x, y, yaw; and height, roll, pitch."""


@dataclass(frozen=True, eq=False)
class PlanarPose:
    """Pose of an upright body on the ground plane."""

    T_map_base: Matrix
    """(4, 4); turned about the map's z axis only."""
    covariance: Matrix
    """(6, 6) in the order of PoseWithCovariance; height, roll and pitch have the floor's variances."""
    fault: str = ""
    """Contradiction between the full pose and the ground plane as a sentence; empty if there is none."""


def yaw(T: Matrix) -> float:
    """Return the angle, in radians, of the rotation about z that is nearest to the rotation of a pose (4, 4)."""
    return math.atan2(T[1, 0] - T[0, 1], T[0, 0] + T[1, 1])


def planar_pose(T_map_base: Matrix, covariance: Matrix, height_m: float = 0.0) -> PlanarPose:
    """Return the projection of a pose to the ground plane.

    The position is projected along z, and the rotation to the nearest one about z. The marginal covariance of x, y and
    yaw is kept. The discarded part (height, roll, pitch) must be explained by its own covariance and the floor's
    (chi-square, 99.9 %). If it is not, the kept covariance grows by the same normalized squared error.

    Args:
        T_map_base: (4, 4); the map's z axis points up.
        covariance: (6, 6) in the order of PoseWithCovariance.
        height_m: height of the base frame's origin in the map while the robot stands on the ground.
    """
    turn = so3_exp([0.0, 0.0, yaw(T_map_base)])
    tilt = so3_log(T_map_base[:3, :3] @ turn.T)
    off = np.array([T_map_base[2, 3] - height_m, tilt[0], tilt[1]])
    floor = np.array([FLOOR_SIGMA_M**2] + 2 * [math.radians(FLOOR_SIGMA_DEG) ** 2])
    squared = float(off @ np.linalg.solve(covariance[np.ix_(_OFF_PLANE, _OFF_PLANE)] + np.diag(floor), off))
    kept = covariance[np.ix_(_ON_PLANE, _ON_PLANE)]
    fault = ""
    if not squared <= CHI2_3_999:
        kept = kept * (squared / 3.0)
        fault = (
            f"the pose is {abs(off[0]):.2f} m {'above' if off[0] > 0 else 'below'} the ground plane and tilted by "
            f"{math.degrees(float(np.linalg.norm(tilt))):.1f} deg against it, more than its covariance allows; if this "
            "is always so, correct ground_height, base_frame or the camera's mount, or set planar to false"
        )
    planar = np.diag([0.0, 0.0, *floor, 0.0])
    planar[np.ix_(_ON_PLANE, _ON_PLANE)] = kept
    position = [T_map_base[0, 3], T_map_base[1, 3], height_m]
    return PlanarPose(make_pose(turn, position), planar, fault)


def planar_map_to_odom(T_map_base: Matrix, T_odom_base: Matrix) -> Matrix:
    """Return the transform ``T_map_odom`` (4, 4) that is turned about z only and leads to a planar pose.

    Through it the base has the position and the yaw of ``T_map_base``. Roll and pitch remain the odometry's, whose
    ground plane is thereby parallel to the map's.

    Args:
        T_map_base: (4, 4) planar pose.
        T_odom_base: (4, 4) odometry at the same time.
    """
    turn = so3_exp([0.0, 0.0, yaw(T_map_base) - yaw(T_odom_base)])
    return make_pose(turn, T_map_base[:3, 3] - turn @ T_odom_base[:3, 3])


def mahalanobis(T_true: Matrix, T: Matrix | None, covariance: Matrix | None) -> float:
    """Return the squared Mahalanobis length of a pose error (NEES); not a number without a pose."""
    if T is None or covariance is None:
        return float("nan")
    error = pose_tangent_error(T, T_true)
    return float(error @ np.linalg.solve(covariance, error))


def normalised(errors: Matrix, covariances: Matrix) -> Matrix:
    """Return the squared Mahalanobis lengths (N,) of errors (N, 6)."""
    return np.asarray(np.einsum("ni,ni->n", errors, np.linalg.solve(covariances, errors[:, :, None])[:, :, 0]))


def covered(errors: Matrix, covariances: Matrix, axes: slice) -> float:
    """Return the share of errors (N, 6) inside one sigma on some axes."""
    return float((errors[:, axes] ** 2 < np.diagonal(covariances, axis1=1, axis2=2)[:, axes]).mean())


def median_scale(squared: Sequence[float] | Matrix) -> float:
    """Return the factor at which the median of squared Mahalanobis lengths is right; 1 if there are few."""
    finite = np.asarray(squared)[np.isfinite(squared)] if len(squared) else np.zeros(0)
    if len(finite) < 5:
        return 1.0
    return float(np.clip(np.median(finite) / CHI2_6_MEDIAN, 1e-3, 1e6))
