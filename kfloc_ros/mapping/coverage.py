# SPDX-License-Identifier: Apache-2.0
"""Where will a map localize well? For places and directions: is a reference view near, and how firm would the pose be?

The expected error follows from the geometry of the points in view: the information of their projections about the pose
(the Gauss-Newton matrix with a pixel's error for each point), grown by the distance to the nearest reference view,
from which things look different, and by how far the map's calibration found its poses to err. Its two constants were
fitted once (see ``docs/maps.md``); it is a forecast and no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.pixloc.cost import project, projection_jacobian
from kfloc_ros.pixloc.references import ReferencePoints, view_distances

REACH_M = 0.6
"""Views farther than this (a degree counts as 2 cm) are out of the alignment's reach."""
NUM_REFERENCES = 3
MIN_POINTS = 60
POINT_ERROR_PX = 2.4
"""Error of a point's place in the image, as if points erred independently, which neighbours do not; times the root of
the map's ``refined_covariance_scale``."""
GROWTH_PER_M = 8.0
"""Growth of the error with the distance to the nearest view."""
HEADINGS = 8
MAX_CELLS = 2500


@dataclass(frozen=True, eq=False)
class Coverage:
    """A grid over the floor plan."""

    places_m: NDArray[np.float64]
    """(N, 3) camera centres, all at the height that the map was recorded at."""
    step_m: float
    share: NDArray[np.float64]
    """(N,) share of the directions, all around, in which a pose is expected."""
    error_m: NDArray[np.float64]
    """(N,) expected position error: the median over these directions; NaN where there are none."""


def expected_error_m(scene_map: SceneMap, T_map_camera: Matrix) -> float:
    """Expected position error of a pose (4, 4), metres; NaN where none is expected to be found."""
    references = scene_map.references
    distances = view_distances(references.T_map_camera, T_map_camera)
    nearest = np.argsort(distances, kind="stable")[:NUM_REFERENCES]
    if distances[nearest[0]] > REACH_M:
        return float("nan")
    points = ReferencePoints.concatenate([references.views[k] for k in nearest]).points
    camera = scene_map.camera
    T_camera_map = torch.from_numpy(inverse_pose(T_map_camera))
    uv, P, in_front = project(points.double(), T_camera_map, camera, 1.0)
    inside = in_front & (uv >= 0).all(dim=1) & (uv[:, 0] < camera.width) & (uv[:, 1] < camera.height)
    if int(inside.sum()) < MIN_POINTS:
        return float("nan")
    J = projection_jacobian(P[inside], camera, 1.0).reshape(-1, 6).numpy()
    variance_px2 = POINT_ERROR_PX**2 * scene_map.calibration.refined_covariance_scale
    covariance = variance_px2 * np.linalg.pinv(J.T @ J, hermitian=True)
    return float(np.sqrt(np.trace(covariance[:3, :3])) * (1 + GROWTH_PER_M * distances[nearest[0]]))


def floor_coverage(scene_map: SceneMap, up_axis: int, up_sign: float, step_m: float = 0.1) -> Coverage:
    """Coverage of the floor plan around the reference views, for a level camera at their usual height.

    Args:
        scene_map: the map.
        up_axis: axis of the map frame that is vertical.
        up_sign: 1 if it points up, -1 if down.
        step_m: of the grid; larger where the place is.
    """
    centres = scene_map.references.T_map_camera[:, :3, 3]
    flat = [k for k in range(3) if k != up_axis]
    low, high = centres[:, flat].min(axis=0) - REACH_M, centres[:, flat].max(axis=0) + REACH_M
    step_m = max(step_m, float(np.sqrt(np.prod(high - low) / MAX_CELLS)))
    grid = np.stack(np.meshgrid(*(np.arange(a, b + step_m, step_m) for a, b in zip(low, high, strict=True))), axis=-1)
    places = np.full((grid.size // 2, 3), np.median(centres[:, up_axis]))
    places[:, flat] = grid.reshape(-1, 2)
    near = np.linalg.norm(places[:, None, flat] - centres[None][:, :, flat], axis=2).min(axis=1) < REACH_M
    errors = np.full((len(places), HEADINGS), np.nan)
    for place in np.flatnonzero(near):
        for heading in range(HEADINGS):
            T = level_pose(places[place], 2 * np.pi * heading / HEADINGS, up_axis, up_sign)
            errors[place, heading] = expected_error_m(scene_map, T)
    found = np.isfinite(errors)
    median = np.array([np.median(row[ok]) if ok.any() else np.nan for row, ok in zip(errors, found, strict=True)])
    return Coverage(places, step_m, found.mean(axis=1), median)


def level_pose(place: NDArray[np.float64], heading_rad: float, up_axis: int, up_sign: float) -> Matrix:
    """A camera (4, 4) at a place that looks along the floor, its image upright."""
    down = np.zeros(3)
    down[up_axis] = -up_sign
    first = np.zeros(3)
    first[(up_axis + 1) % 3] = 1.0
    ahead = np.cos(heading_rad) * first + np.sin(heading_rad) * np.cross(down, first)
    return make_pose(np.stack([np.cross(down, ahead), down, ahead], axis=1), place)
