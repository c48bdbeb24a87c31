# SPDX-License-Identifier: Apache-2.0
"""Poses with time stamps, asked at other times: what ties a motion-capture file or a topic to images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import make_pose, so3_exp, so3_log
from kfloc_ros.types import Matrix

MAX_GAP_NS = 200_000_000
"""Between poses farther apart than this nothing is interpolated."""
NEAR_NS = 20_000_000
"""Outside of the track and in its gaps, a pose this near in time still counts."""


class PoseTrack:
    """A trajectory; between two poses it moves on a straight line and turns at a constant rate.

    Args:
        stamps_ns: any order; of equal stamps the last pose counts.
        poses: (4, 4) each.

    Raises:
        SourceError: a pose is not finite.
    """

    def __init__(self, stamps_ns: Sequence[int], poses: Sequence[Matrix]) -> None:
        by_stamp = dict(zip(stamps_ns, poses, strict=True))
        self._stamps = np.array(sorted(by_stamp), dtype=np.int64)
        self._poses = [by_stamp[int(stamp)] for stamp in self._stamps]
        if not all(np.isfinite(T).all() for T in self._poses):
            raise SourceError("A trajectory has a pose that is not finite.")

    def __len__(self) -> int:
        return len(self._poses)

    def at(self, stamp_ns: int) -> Matrix | None:
        """The pose at a time, or None where the track says nothing about it."""
        if not len(self._poses):
            return None
        after = int(np.searchsorted(self._stamps, stamp_ns))
        if after < len(self._stamps) and self._stamps[after] == stamp_ns:
            return self._poses[after]
        if 0 < after < len(self._stamps) and self._stamps[after] - self._stamps[after - 1] <= MAX_GAP_NS:
            a, b = self._poses[after - 1], self._poses[after]
            gap = int(self._stamps[after] - self._stamps[after - 1])
            share = (stamp_ns - int(self._stamps[after - 1])) / gap
            R = a[:3, :3] @ so3_exp(share * so3_log(a[:3, :3].T @ b[:3, :3]))
            return make_pose(R, (1 - share) * a[:3, 3] + share * b[:3, 3])
        nearest = nearest_stamp(self._stamps, stamp_ns, NEAR_NS)
        return None if nearest is None else self._poses[nearest]


def nearest_stamp(stamps_ns: Sequence[int] | np.ndarray, stamp_ns: int, tolerance_ns: int) -> int | None:
    """Position in sorted stamps of the one nearest to a time, or None if it is farther than a tolerance."""
    if not len(stamps_ns):
        return None
    after = int(np.searchsorted(stamps_ns, stamp_ns))
    choices = [k for k in (after - 1, after) if 0 <= k < len(stamps_ns)]
    best = min(choices, key=lambda k: abs(int(stamps_ns[k]) - stamp_ns))
    return best if abs(int(stamps_ns[best]) - stamp_ns) <= tolerance_ns else None
