# SPDX-License-Identifier: Apache-2.0
"""Pose covariance: conversion from the solver's tangent space to the map frame, in ROS order."""

from __future__ import annotations

import numpy as np

from kfloc_ros.geometry.lie import Matrix, skew, so3_log

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


def pose_tangent_error(estimate: Matrix, truth: Matrix) -> Matrix:
    """Return the error (dt, dr), (6,), of a pose in the tangent space of its covariance.

    Both poses are ``T_map_camera`` (4, 4). dt in metres and dr in radians lead from the estimate to the truth: t_truth
    = t_estimate + dt, R_truth = Exp(dr) R_estimate.
    """
    dR = truth[:3, :3] @ estimate[:3, :3].T
    return np.concatenate([truth[:3, 3] - estimate[:3, 3], so3_log(dR)])
