# SPDX-License-Identifier: Apache-2.0
"""Registration of two maps: reference points are matched by features, and a rigid motion is fitted; leveling.

No images are needed. Reference points of two sessions are rarely the same point, only near each other on the same
surface, so that single pairs differ by centimetres; thousands of pairs from many views determine the motion to
millimetres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews
from kfloc_ros.relocalization.retrieval import ReferenceIndex

VIEWS_TRIED = 60
RETRIEVED = 5
MIN_SIMILARITY = 0.75
INLIER_M = 0.15
"""Largest distance of matching points, in metres: neighbouring points of one cell, and errors of depth."""
MIN_VIEW_INLIERS = 20
MIN_VIEWS = 3
"""Number of views that must agree on a motion: a single one may show a poster that hangs in both places."""
TRIPLES = 200
LAST_INLIER_M = 0.04
REFINEMENTS = 15
MIN_PAIRS = 300
"""Fewest pairs down to which the inlier limit shrinks. On RedKitchen, shrinking halves the error, to 2 and 3 mm for
halves of
the recording that overlap well.
"""
MAX_SCALE_ERROR = 0.05
FLOOR_BAND_M, FLOOR_NOISE_M, FLOOR_STEPS = 0.04, 0.003, 15
"""Largest distance of points that the floor is fitted to, their least noise, and steps of the robust fit."""
Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Registration:
    """Rigid motion between two maps, with its support."""

    T_fixed_moving: Matrix
    views: int
    """Number of views of the moving map that agree with it."""
    pairs: int
    """Number of pairs of points within ``INLIER_M``."""
    residual_m: float
    """Median distance of these pairs, in metres."""


def register(fixed: ReferenceViews, moving: ReferenceViews, *, seed: int = 0) -> Registration:
    """Return the frame of ``moving`` in that of ``fixed``.

    Args:
        fixed: reference views of the map that keeps its frame.
        moving: reference views of the other map.
        seed: seed of the random triples.

    Raises:
        MapError: the maps share too little, or differ in scale.
    """
    rng = np.random.default_rng(seed)
    index = ReferenceIndex(fixed)
    selected = np.unique(np.linspace(0, len(moving.views) - 1, min(VIEWS_TRIED, len(moving.views))).round().astype(int))
    pairs = [_pairs(index, fixed, moving.views[k]) for k in selected]
    votes = [T for a, b in pairs if (T := _vote(a, b, rng)) is not None]
    if not votes:
        raise MapError(_nothing_shared(0))
    fixed_points, moving_points = (np.concatenate(column) for column in zip(*pairs, strict=True))
    best = max(votes, key=lambda T: int(_near(fixed_points, moving_points, T).sum()))
    for limit_m in np.geomspace(INLIER_M, LAST_INLIER_M, REFINEMENTS):
        near = _near(fixed_points, moving_points, best, limit_m)
        if near.sum() < MIN_PAIRS:
            break
        best = fit_rigid(fixed_points[near], moving_points[near])
    agreeing = sum(int(_near(a, b, best).sum()) >= MIN_VIEW_INLIERS for a, b in pairs)
    if agreeing < MIN_VIEWS:
        raise MapError(_nothing_shared(agreeing))
    near = _near(fixed_points, moving_points, best)
    a, b = fixed_points[near], moving_points[near]
    scale = float(np.sqrt((a - a.mean(0)).var() / (b - b.mean(0)).var()))
    if abs(scale - 1) > MAX_SCALE_ERROR:
        raise MapError(
            f"The second map is {scale:.2f} times too small: its lengths are not metres, or the first map's are not. "
            "Build it again from poses in metres."
        )
    return Registration(best, agreeing, int(near.sum()), float(np.median(_distances(a, b, best))))


def fit_rigid(fixed: Points, moving: Points) -> Matrix:
    """Return the rigid motion (4, 4) that brings points (N, 3) nearest to others (Kabsch, Acta Cryst. 1976)."""
    a, b = fixed.mean(axis=0), moving.mean(axis=0)
    U, _, Vt = np.linalg.svd((fixed - a).T @ (moving - b))
    R = U @ np.diag([1.0, 1.0, np.sign(np.linalg.det(U @ Vt))]) @ Vt
    return make_pose(R, a - R @ b)


def _pairs(index: ReferenceIndex, fixed: ReferenceViews, view: ReferencePoints) -> tuple[Points, Points]:
    """Return pairs of points: of the views most similar to a view, matched with its own points by features."""
    fixed_points, own_points = [np.zeros((0, 3))], [np.zeros((0, 3))]
    for item in index.search_view(view, RETRIEVED):
        other = fixed.views[item.position]
        similarity = other.coarse @ view.coarse.t()
        value, own = similarity.max(dim=1)
        mutual = (similarity.argmax(dim=0)[own] == torch.arange(len(own))) & (value > MIN_SIMILARITY)
        fixed_points.append(other.points[mutual].double().numpy())
        own_points.append(view.points[own[mutual]].double().numpy())
    return np.concatenate(fixed_points), np.concatenate(own_points)


def _vote(fixed: Points, moving: Points, rng: np.random.Generator) -> Matrix | None:
    """Return the motion that most pairs of one view agree with, from random triples."""
    if len(fixed) < MIN_VIEW_INLIERS:
        return None
    best: tuple[int, Matrix | None] = (MIN_VIEW_INLIERS - 1, None)
    for _ in range(TRIPLES):
        triple = rng.choice(len(fixed), 3, replace=False)
        a, b = fixed[triple], moving[triple]
        sides = [np.linalg.norm(p - np.roll(p, 1, axis=0), axis=1) for p in (a, b)]
        if np.abs(sides[0] - sides[1]).max() > 2 * INLIER_M or sides[0].min() < 2 * INLIER_M:
            continue  # not a rigid motion, or the triple is degenerate
        T = fit_rigid(a, b)
        count = int(_near(fixed, moving, T).sum())
        if count > best[0]:
            best = (count, T)
    return best[1]


def _distances(fixed: Points, moving: Points, T: Matrix) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(moving @ T[:3, :3].T + T[:3, 3] - fixed, axis=1))


def _near(fixed: Points, moving: Points, T: Matrix, limit_m: float = INLIER_M) -> NDArray[np.bool_]:
    return _distances(fixed, moving, T) < limit_m


def _nothing_shared(agreeing: int) -> str:
    return (
        f"The two maps do not show the same place: {agreeing} views agree on the transformation between them, "
        f"{MIN_VIEWS} are needed. If they already have the same frame, pass --same-frame."
    )


def average_pose(motions: Sequence[Matrix], centre: NDArray[np.float64]) -> Matrix:
    """Return the mean of similar motions (4, 4), equally weighted, by their effect around a point (3,)."""
    U, _, Vt = np.linalg.svd(np.mean([T[:3, :3] for T in motions], axis=0))
    R = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
    moved = np.median([T[:3, :3] @ centre + T[:3, 3] for T in motions], axis=0)
    return make_pose(R, moved - R @ centre)


def reference_points(scene_map: SceneMap) -> Points:
    """Return all reference points (N, 3) of a map."""
    return np.concatenate([view.points.double().cpu().numpy() for view in scene_map.references.views])


def level(scene_map: SceneMap) -> Matrix:
    """Return the rigid motion (4, 4) that makes a map's floor the plane z = 0, with z up.

    The floor is the plane with the most points among those whose normal is within 20 degrees of the mean upward
    direction of the images, and below the cameras. Without such a plane the mean direction counts, and the lowest
    points.
    """
    T, points = scene_map.references.T_map_camera, reference_points(scene_map)
    up = -T[:, :3, 1].mean(axis=0)
    up = up / np.linalg.norm(up)
    below = points[(points @ up) < np.median(T[:, :3, 3] @ up) - 0.3]
    normal, offset = up, float(np.quantile(points @ up, 0.02))
    if len(below) >= 30:
        normal, offset = _floor(below, up, offset)
    axis = np.cross(normal, [0.0, 0.0, 1.0])
    size = float(np.linalg.norm(axis))
    angle = math.atan2(size, normal[2])
    turn = so3_exp(axis / size * angle if size > 1e-12 else [angle, 0.0, 0.0])
    return make_pose(turn, [0.0, 0.0, -offset])


def _floor(points: Points, up: Points, lowest: float) -> tuple[Points, float]:
    """Return normal (3,) and offset of the floor by RANSAC, refined by robust least squares."""
    rng = np.random.default_rng(0)
    best: tuple[int, Points, float] = (0, up, lowest)
    for _ in range(400):
        a, b, c = points[rng.choice(len(points), 3, replace=False)]
        normal = np.cross(b - a, c - a)
        length = float(np.linalg.norm(normal))
        if length < 1e-6:
            continue
        normal = normal / length * (np.sign(normal @ up) or 1.0)
        if normal @ up < math.cos(math.radians(20.0)):
            continue
        heights = (points - a) @ normal
        # The floor is low: a table with as many points has others below it.
        count = int((np.abs(heights) < 0.03).sum()) - 2 * int((heights < -0.1).sum())
        if count > best[0]:
            best = count, normal, float(a @ normal)
    count, normal, offset = best
    near = points[np.abs(points @ normal - offset) < FLOOR_BAND_M]
    if count < 20 or len(near) < 20:
        return up, lowest
    fitted, height = normal, offset
    for _ in range(FLOOR_STEPS):  # a robust fit: the feet of walls and furniture are near the floor, on one side of it
        squared = (near @ fitted - height) ** 2
        scale = max(2.0 * float(np.median(squared)), FLOOR_NOISE_M**2)
        weights = 1.0 / (1.0 + squared / scale) ** 2
        center = weights @ near / weights.sum()
        fitted = np.linalg.svd((near - center) * np.sqrt(weights)[:, None], full_matrices=False)[2][2]
        fitted = fitted * (np.sign(fitted @ up) or 1.0)
        height = float(center @ fitted)
    if fitted @ up < math.cos(math.radians(20.0)):
        return normal, offset
    return fitted, height
