# SPDX-License-Identifier: Apache-2.0
"""Memory of earlier frames in a place, for the search after the pose is lost: last poses and last tentative place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, is_farther
from kfloc_ros.localization.place_search import Reach, SearchResult
from kfloc_ros.types import Alignment


@dataclass(frozen=True)
class MemorySettings:
    """Limits of the camera's motion, and the conditions under which two images confirm each other."""

    max_speed_m_s: float = 2.0
    max_speed_ratio: float = 2.0
    """The camera's speed limit is the larger of ``max_speed_m_s`` and its last speed times this ratio. After a gap,
    places beyond reach do not compete with places within reach."""
    margin_m: float = 0.5
    """Added to the distance that the camera can have moved."""
    confirm_s: float = 10.0
    confirm_apart_m: float = 1.5
    confirm_apart_deg: float = 60.0
    """Two tentative images of one place within ``confirm_s`` confirm each other if they are further apart than either
    limit, so that they show almost nothing in common. With turns of up to 35 degrees in front of a wall without
    posters, both images were tentative for the same wrong room."""


@dataclass(frozen=True, eq=False)
class _PoseRecord:
    """Accepted or tentative pose of an image."""

    stamp_ns: int
    T_place_camera: Matrix
    submap: int


class PlaceMemory:
    """Memory of the last two poses, however old, and of the last tentative place."""

    def __init__(self, settings: MemorySettings | None = None) -> None:
        self._settings = settings or MemorySettings()
        self._poses: list[_PoseRecord] = []
        self._tentative: _PoseRecord | None = None

    def observe(self, stamp_ns: int, T_place_camera: Matrix, submap: int) -> None:
        """Remember an accepted pose; it supersedes the tentative place."""
        self._poses = [*self._poses[-1:], _PoseRecord(stamp_ns, T_place_camera, submap)]
        self._tentative = None

    def reset(self) -> None:
        """Drop the poses and the tentative place."""
        self._poses, self._tentative = [], None

    def reach(self, stamp_ns: int) -> Reach | None:
        """Return the region that the camera can have reached since its last pose; None if there was none."""
        if not self._poses or stamp_ns <= self._poses[-1].stamp_ns:
            return None
        s, last = self._settings, self._poses[-1]
        speed_m_s = s.max_speed_m_s
        if len(self._poses) == 2 and last.stamp_ns > self._poses[0].stamp_ns:
            step_s = 1e-9 * (last.stamp_ns - self._poses[0].stamp_ns)
            step_m = _distance_m(self._poses[0].T_place_camera, last.T_place_camera)
            speed_m_s = max(speed_m_s, s.max_speed_ratio * step_m / step_s)
        limit_m = s.margin_m + speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        return Reach(last.T_place_camera[:3, 3], limit_m)

    def confirm(self, stamp_ns: int, result: SearchResult) -> Alignment:
        """Return the search's alignment, or the tentative one if an earlier image was tentative for the same place.

        Two images from about the same view share the same ambiguity, so they do not confirm each other. The camera must
        have moved or turned between them, and no further than it can.
        """
        tentative, s = result.tentative, self._settings
        if tentative is None or tentative.T_map_camera is None:
            return result.alignment
        last, now = self._tentative, _PoseRecord(stamp_ns, tentative.T_map_camera, result.submap)
        if last is None or last.submap != now.submap or not 0 < stamp_ns - last.stamp_ns <= s.confirm_s * 1e9:
            self._tentative = now
            return result.alignment
        limit_m = s.margin_m + s.max_speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        if _distance_m(last.T_place_camera, now.T_place_camera) > limit_m:
            self._tentative = None  # not both can be right
            return result.alignment
        if is_farther(last.T_place_camera, now.T_place_camera, s.confirm_apart_m, s.confirm_apart_deg):
            return tentative
        return result.alignment  # the older one stays: the camera has moved further since


def _distance_m(a: Matrix, b: Matrix) -> float:
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3]))
