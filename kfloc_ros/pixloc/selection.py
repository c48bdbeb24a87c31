# SPDX-License-Identifier: Apache-2.0
"""Which reference images a query is aligned with, and where from: retrieval, inliers, covisibility, pose averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import Matrix, make_pose, matrix_to_quaternion, quaternion_to_matrix
from kfloc_ros.pixloc.scene import ReferenceScene

SIMILARITY_POWER = 8
"""Exponent of descriptor similarities as weights of poses (Pion et al., 3DV 2020)."""


def rank_by_inliers(inliers: Mapping[int, int], min_matches: int, num_dbs: int) -> list[int]:
    """Images with more than ``min_matches`` inliers, most first, at most ``num_dbs``."""
    enough = [(count, position) for position, count in inliers.items() if count > min_matches]
    return [position for _, position in sorted(enough, key=lambda row: -row[0])[:num_dbs]]


def largest_cluster(scene: ReferenceScene, positions: Sequence[int]) -> list[int]:
    """Those of ``positions``, in their order, that make up the largest group linked by common points.

    Of equally large groups the one with the image named first wins.
    """
    linked = scene.covisibility(positions) > 0
    group = np.arange(len(positions))
    for i in range(len(positions)):
        for j in range(i):
            if linked[i, j]:
                group[group == max(group[i], group[j])] = min(group[i], group[j])
    best = max(dict.fromkeys(group.tolist()), key=lambda g: int((group == g).sum()), default=0)
    return [position for position, g in zip(positions, group, strict=True) if g == best]


def average_pose(T_map_camera: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Weighted mean of camera centres and of orientations (dominant eigenvector of the sum of w q q^T).

    Raises:
        MapError: no pose, or no weight.
    """
    w = np.asarray(weights, dtype=np.float64)
    if not len(w) or len(w) != len(T_map_camera) or not np.isfinite(w).all() or w.sum() <= 0 or (w < 0).any():
        raise MapError("Poses can be averaged only with as many weights, none negative and not all zero.")
    w = w / w.sum()
    centre = sum(weight * T[:3, 3] for weight, T in zip(w, T_map_camera, strict=True))
    quaternions = np.array([matrix_to_quaternion(T[:3, :3]) for T in T_map_camera])
    _, vectors = np.linalg.eigh(np.einsum("n,ni,nj->ij", w, quaternions, quaternions))
    return make_pose(quaternion_to_matrix(vectors[:, -1]), np.asarray(centre))


def similarity_weights(query: NDArray[np.floating], references: NDArray[np.floating]) -> NDArray[np.float64]:
    """(K,) weights of reference images from global descriptors (D,) and (K, D): their similarity to the eighth."""
    a = np.asarray(query, dtype=np.float64)
    b = np.asarray(references, dtype=np.float64)
    similarity = b @ a / np.maximum(np.linalg.norm(b, axis=1) * np.linalg.norm(a), 1e-12)
    weights: NDArray[np.float64] = np.clip(similarity, 0, None) ** SIMILARITY_POWER
    return weights
