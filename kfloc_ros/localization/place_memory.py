# SPDX-License-Identifier: Apache-2.0
"""What earlier frames say of where a camera is in a place, while it has no pose: where it was, and where it leant."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, is_farther
from kfloc_ros.localization.place_search import Found, Reach
from kfloc_ros.types import Alignment


@dataclass(frozen=True)
class MemorySettings:
    """How far a camera moves, and when two images confirm each other."""

    max_speed_m_s: float = 2.0
    max_speed_ratio: float = 2.0
    """No camera moves faster than the one, or than the other times its last speed: after a gap, what it cannot have
    reached is no rival of what it can."""
    margin_m: float = 0.5
    lean_s: float = 10.0
    lean_apart_m: float = 1.5
    lean_apart_deg: float = 60.0
    """Two images that lean to one place within this time confirm each other if they are further apart than either: if
    they show nearly nothing in common. Over 35 degrees of a wall without posters they leant to one wrong room."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A pose of an image, claimed or only leant to."""

    stamp_ns: int
    T_place_camera: Matrix
    submap: int


class PlaceMemory:
    """The last two poses, however long ago, and the last image that leant to a place without being clear."""

    def __init__(self, settings: MemorySettings | None = None) -> None:
        self._settings = settings or MemorySettings()
        self._poses: list[_Seen] = []
        self._leaning: _Seen | None = None

    def observe(self, stamp_ns: int, T_place_camera: Matrix, submap: int) -> None:
        """Remember a pose; what was leant to before no longer matters."""
        self._poses = [*self._poses[-1:], _Seen(stamp_ns, T_place_camera, submap)]
        self._leaning = None

    def forget(self) -> None:
        """The camera may be anywhere."""
        self._poses, self._leaning = [], None

    def reach(self, stamp_ns: int) -> Reach | None:
        """Where the camera can have come since its last pose; None if there was none."""
        if not self._poses or stamp_ns <= self._poses[-1].stamp_ns:
            return None
        s, last = self._settings, self._poses[-1]
        speed_m_s = s.max_speed_m_s
        if len(self._poses) == 2 and last.stamp_ns > self._poses[0].stamp_ns:
            step_s = 1e-9 * (last.stamp_ns - self._poses[0].stamp_ns)
            step_m = _way_m(self._poses[0].T_place_camera, last.T_place_camera)
            speed_m_s = max(speed_m_s, s.max_speed_ratio * step_m / step_s)
        limit_m = s.margin_m + speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        return Reach(last.T_place_camera[:3, 3], limit_m)

    def confirm(self, stamp_ns: int, found: Found) -> Alignment:
        """What was found, or, where the image only leans to a place, that place if an image before leant there, too.

        From about the same view an image leans to the same place for the same reason, be it right or wrong; so the
        camera must have moved or turned in between, and no further than it can.
        """
        leaning, s = found.leaning, self._settings
        if leaning is None or leaning.T_map_camera is None:
            return found.alignment
        last, now = self._leaning, _Seen(stamp_ns, leaning.T_map_camera, found.submap)
        if last is None or last.submap != now.submap or not 0 < stamp_ns - last.stamp_ns <= s.lean_s * 1e9:
            self._leaning = now
            return found.alignment
        limit_m = s.margin_m + s.max_speed_m_s * 1e-9 * (stamp_ns - last.stamp_ns)
        if _way_m(last.T_place_camera, now.T_place_camera) > limit_m:
            self._leaning = None  # they cannot both be right
            return found.alignment
        if is_farther(last.T_place_camera, now.T_place_camera, s.lean_apart_m, s.lean_apart_deg):
            return leaning
        return found.alignment  # the older one stays: there is more way from it


def _way_m(a: Matrix, b: Matrix) -> float:
    return float(np.linalg.norm(a[:3, 3] - b[:3, 3]))
