# SPDX-License-Identifier: Apache-2.0
"""Poses that an image's matches with reference views speak for: where the search of the map starts to align."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import poselib

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.fix_choice import FirstFixSettings, apart
from kfloc_ros.mapping.view_matching import Matches
from kfloc_ros.pixloc.references import ReferenceViews


@dataclass(frozen=True, eq=False)
class _Supported:
    """A pose and how many cells of the image agree with it."""

    T_map_camera: Matrix
    support: int


class StartingPoses:
    """Solves matches with the reference views of a map for poses of a camera."""

    def __init__(self, references: ReferenceViews, camera: Camera, settings: FirstFixSettings) -> None:
        self._references, self._camera, self._settings = references, camera, settings

    def of(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """Poses that the matches of views, the likeliest first, speak for, the best supported first."""
        chosen: list[Matrix] = []
        for place in sorted(self._supported(matches, min_inliers), key=lambda place: -place.support):
            near = (self._settings.same_start_m, self._settings.same_start_deg)
            if all(apart(place.T_map_camera, T, *near) for T in chosen):
                chosen.append(place.T_map_camera)
        return chosen[: self._settings.places]

    def together(self, matches: Mapping[int, Matches], min_inliers: int) -> list[Matrix]:
        """The one pose that the matches of all views together speak for, if any."""
        place = self._solve(list(matches.values()), min_inliers)
        return [] if place is None else [place.T_map_camera]

    def _supported(self, matches: Mapping[int, Matches], min_inliers: int) -> Iterator[_Supported]:
        """Poses from the views, in order: each view that is in no earlier group by its group, and by itself.

        A group's views see one place and support each other; but where one view alone shows what the image shows, the
        others' matches, all wrong, drown it.
        """
        centres = self._references.T_map_camera[:, :3, 3]
        left = list(matches)
        for _ in range(self._settings.groups):
            if not left:
                return
            away_m = np.linalg.norm(centres - centres[left[0]], axis=1)
            group = [k for k in matches if away_m[k] <= self._settings.group_radius_m]
            for views in (group, left[:1])[: 1 if len(group) == 1 else 2]:
                place = self._solve([matches[k] for k in views], min_inliers)
                if place is not None:
                    yield place
            left = [k for k in left if k not in group]

    def _solve(self, parts: Sequence[Matches], min_inliers: int) -> _Supported | None:
        pixels = np.concatenate([m.pixels for m in parts])
        points = np.concatenate([m.points for m in parts])
        if len(pixels) < min_inliers:
            return None
        camera = {"model": "PINHOLE", "width": self._camera.width, "height": self._camera.height}
        camera["params"] = [self._camera.fx, self._camera.fy, self._camera.cx, self._camera.cy]
        ransac = {"max_reproj_error": self._settings.max_error_px, "max_iterations": 3000, "seed": 0}
        # RANSAC near the group: a map may lie kilometres from its own origin
        origin = points.mean(axis=0)
        pose, info = poselib.estimate_absolute_pose(pixels, points - origin, camera, ransac, {})
        inlier_cells = {tuple(p) for p in pixels[np.asarray(info["inliers"], dtype=bool)]}
        if len(inlier_cells) < min_inliers:
            return None
        T_map_camera = inverse_pose(make_pose(pose.R, pose.t))
        T_map_camera[:3, 3] += origin
        return _Supported(T_map_camera, len(inlier_cells))
