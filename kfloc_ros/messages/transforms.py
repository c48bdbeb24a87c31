# SPDX-License-Identifier: Apache-2.0
"""Transforms over time: one tree of frames, live and of recordings, that answers as tf2's buffer does; pose tracks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.geometry.lie import interpolate, inverse_pose
from kfloc_ros.types import Matrix

NEWEST = 0
"""As a time: the newest at which all transforms on the way are known."""
MAX_GAP_S = 0.2
"""In recorded trajectories, nothing is interpolated between poses farther apart than this."""
NEAR_S = 0.02
"""Outside of a recorded trajectory and in its gaps, a pose this near in time still counts."""
_FEWEST, _OFTEN = 5, 0.2
"""Poses that a judgement takes, and the share of them that must be away from their neighbours."""
_JUMP_M, _JUMP_M_S = 0.5, 10.0
"""Away is this far, and faster than this."""


class TransformUnknownError(KflocError):
    """Two TF frames are not connected; the message names those that are known."""


class TransformTimeError(TransformUnknownError):
    """Two TF frames are connected, but not at the time asked for.

    ``ahead``: the time is later than the newest transform, so that waiting may help.
    """

    def __init__(self, message: str, *, ahead: bool) -> None:
        super().__init__(message)
        self.ahead = ahead


class TransformStore(Protocol):
    """Store of transforms by frame and time; stamps are nanoseconds."""

    def set(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix, *, static: bool = False) -> None:
        """Add a transform; one that is older than the store's length is ignored."""
        ...

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        """``T_target_source`` (4, 4) at a time, or at the newest possible one for ``NEWEST``.

        Raises:
            TransformUnknownError: no chain of transforms connects the two.
            TransformTimeError: one does, but not at that time; nothing is extrapolated.
        """
        ...

    def newest_ns(self, target: str, source: str) -> int:
        """The newest stamp at which ``lookup`` succeeds; 0 if all transforms on the way are static.

        Raises:
            TransformUnknownError: no chain of transforms connects the two.
        """
        ...

    def clear(self) -> None:
        """Forget everything but the static transforms."""
        ...

    def frames(self) -> tuple[str, ...]:
        """The frames that are known, sorted."""
        ...


def unconnected(target: str, source: str, frames: tuple[str, ...]) -> TransformUnknownError:
    """The error for two frames that nothing connects."""
    return TransformUnknownError(
        f"TF does not connect '{source}' and '{target}'. Known frames: {', '.join(frames) or 'none'}. Publish the "
        "missing transform (the camera's mount on /tf_static, odometry on /tf), or correct base_frame or odom_frame."
    )


class PoseTrack:
    """Trajectory; between two poses it moves on a straight line and turns at a constant rate.

    Args:
        stamps_ns: any order; of equal stamps the last pose counts.
        poses: (4, 4) each.
        max_gap_s: between poses farther apart nothing is interpolated.
        near_s: outside of the track and in its gaps, a pose this near in time still counts.

    Raises:
        SourceError: a pose is not finite.
    """

    def __init__(
        self,
        stamps_ns: Sequence[int] = (),
        poses: Sequence[Matrix] = (),
        *,
        max_gap_s: float = MAX_GAP_S,
        near_s: float = NEAR_S,
    ) -> None:
        self._max_gap_ns, self._near_ns = max_gap_s * 1e9, int(near_s * 1e9)
        self._stamps: list[int] = []
        self._poses: list[Matrix] = []
        for stamp_ns, T in zip(stamps_ns, poses, strict=True):
            self.add(stamp_ns, T)

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def span_ns(self) -> tuple[int, int]:
        """The first and the last stamp of a track that has poses."""
        return self._stamps[0], self._stamps[-1]

    def add(self, stamp_ns: int, T: Matrix) -> None:
        """Add a pose; adding the newest takes the same time however long the track is."""
        if not np.isfinite(T).all():
            raise SourceError("A trajectory has a pose that is not finite.")
        if not self._stamps or stamp_ns > self._stamps[-1]:
            self._stamps.append(stamp_ns)
            self._poses.append(T)
            return
        at = bisect_left(self._stamps, stamp_ns)
        if self._stamps[at] == stamp_ns:
            self._poses[at] = T
        else:
            self._stamps.insert(at, stamp_ns)
            self._poses.insert(at, T)

    def forget(self, until_ns: int) -> None:
        """Forget the poses up to a time, as soon as they are half of the track: so that adding stays cheap."""
        count = bisect_right(self._stamps, until_ns)
        if 2 * count >= len(self._stamps):
            del self._stamps[:count], self._poses[:count]

    def at(self, stamp_ns: int) -> Matrix | None:
        """The pose (4, 4) at a time, or None where the track says nothing about it."""
        stamps = self._stamps
        after = bisect_left(stamps, stamp_ns)
        if after < len(stamps) and stamps[after] == stamp_ns:
            return self._poses[after]
        if 0 < after < len(stamps) and (gap_ns := stamps[after] - stamps[after - 1]) <= self._max_gap_ns:
            share = (stamp_ns - stamps[after - 1]) / gap_ns
            return interpolate(self._poses[after - 1], self._poses[after], share)
        nearest = nearest_stamp(stamps, stamp_ns, self._near_ns) if self._near_ns else None
        return None if nearest is None else self._poses[nearest]


def jumps_to_and_fro(poses: Mapping[int, Matrix]) -> bool:
    """Whether poses by stamp come from two bodies in turn: often one is far from its neighbours, which are near."""
    stamps = sorted(poses)
    if len(stamps) < _FEWEST:
        return False
    t = np.array(stamps) * 1e-9
    places = np.array([poses[stamp][:3, 3] for stamp in stamps])
    step_m = np.linalg.norm(np.diff(places, axis=0), axis=1)
    fast = step_m > np.maximum(_JUMP_M, _JUMP_M_S * np.diff(t))
    back_m = np.linalg.norm(places[2:] - places[:-2], axis=1)
    away = fast[:-1] & fast[1:] & (back_m < 0.25 * np.minimum(step_m[:-1], step_m[1:]))
    return float(away.mean()) > _OFTEN


def nearest_stamp(stamps_ns: Sequence[int], stamp_ns: int, tolerance_ns: int) -> int | None:
    """Position in sorted stamps of the one nearest to a time, or None if it is farther than a tolerance."""
    after = bisect_left(stamps_ns, stamp_ns)
    choices = [k for k in (after - 1, after) if 0 <= k < len(stamps_ns)]
    best = min(choices, key=lambda k: abs(stamps_ns[k] - stamp_ns), default=None)
    return best if best is not None and abs(stamps_ns[best] - stamp_ns) <= tolerance_ns else None


@dataclass(eq=False)
class _Edge:
    """The transforms from one frame to its parent; a static one has one pose, which is valid at all times."""

    parent: str
    static: bool
    track: PoseTrack

    def at(self, stamp_ns: int) -> Matrix | None:
        return self.track.at(self.track.span_ns[0] if self.static else stamp_ns)


class TransformTree:
    """Frames with one parent each, the last one told. Not locked: its owner serialises the calls.

    Args:
        keep_s: how much of the past is kept; at most twice as much is.
        max_gap_s, near_s: see :class:`PoseTrack`. The defaults are tf2's: any gap, and nothing beyond what is known.
    """

    def __init__(self, keep_s: float = math.inf, *, max_gap_s: float = math.inf, near_s: float = 0.0) -> None:
        self._keep_ns = keep_s * 1e9
        self._max_gap_s, self._near_s = max_gap_s, near_s
        self._edges: dict[str, _Edge] = {}

    def set(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix, *, static: bool = False) -> None:
        parent, child = parent.lstrip("/"), child.lstrip("/")
        if parent == child:
            return
        edge = self._edges.get(child)
        if edge is None or static or edge.static or edge.parent != parent:
            track = PoseTrack(max_gap_s=self._max_gap_s, near_s=self._near_s)
            edge = self._edges[child] = _Edge(parent, static, track)
        elif stamp_ns < edge.track.span_ns[1] - self._keep_ns:
            return
        edge.track.add(stamp_ns, T_parent_child)
        if self._keep_ns < math.inf:
            edge.track.forget(edge.track.span_ns[1] - int(self._keep_ns))

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        up_target, up_source = self._ways_up(target, source)
        if stamp_ns == NEWEST:
            stamp_ns = self._newest_ns(*up_target, *up_source)
        return inverse_pose(self._chain(up_target, stamp_ns)) @ self._chain(up_source, stamp_ns)

    def newest_ns(self, target: str, source: str) -> int:
        up_target, up_source = self._ways_up(target, source)
        return self._newest_ns(*up_target, *up_source)

    def find(self, target: str, source: str, stamp_ns: int) -> Matrix | None:
        """``T_target_source`` (4, 4) at a time, or None where :meth:`lookup` raises."""
        try:
            return self.lookup(target, source, stamp_ns)
        except TransformUnknownError:
            return None

    def fixed(self, target: str, source: str) -> Matrix | None:
        """``T_target_source`` by static transforms alone, or None where they do not connect the two."""
        return self._static().find(target, source, NEWEST)

    def parent(self, frame: str) -> str | None:
        """The parent of a frame, or None."""
        edge = self._edges.get(frame.lstrip("/"))
        return None if edge is None else edge.parent

    def root(self, frame: str) -> str:
        """The last frame reached by going up from a frame.

        Raises:
            SourceError: the way up goes round in a circle.
        """
        top = self._ancestors(frame.lstrip("/"))[-1]
        if top in self._edges:
            raise SourceError(f"The transforms go round in a circle at the frame '{self._edges[top].parent}'.")
        return top

    def moves(self, frame: str, ancestor: str) -> bool:
        """Whether some transform between a frame and an ancestor changes with time."""
        above = self._ancestors(frame.lstrip("/"))
        return ancestor in above and not all(self._edges[child].static for child in above[: above.index(ancestor)])

    def clear(self) -> None:
        self._edges = self._static()._edges

    def frames(self) -> tuple[str, ...]:
        return tuple(sorted({*self._edges, *(edge.parent for edge in self._edges.values())}))

    def _static(self) -> TransformTree:
        tree = TransformTree(max_gap_s=self._max_gap_s, near_s=self._near_s)
        tree._edges = {child: edge for child, edge in self._edges.items() if edge.static}
        return tree

    def _ways_up(self, target: str, source: str) -> tuple[list[str], list[str]]:
        """Return the frames below the first common ancestor of two frames, of the target and of the source."""
        target, source = target.lstrip("/"), source.lstrip("/")
        above_target, above_source = self._ancestors(target), self._ancestors(source)
        common = next((frame for frame in above_source if frame in above_target), None)
        if common is None:
            raise unconnected(target, source, self.frames())
        return above_target[: above_target.index(common)], above_source[: above_source.index(common)]

    def _newest_ns(self, *frames: str) -> int:
        edges = (self._edges[frame] for frame in frames)
        return min((edge.track.span_ns[1] for edge in edges if not edge.static), default=NEWEST)

    def _ancestors(self, frame: str) -> list[str]:
        """A frame and all above it; a circle ends the walk."""
        found = {frame: None}
        while (edge := self._edges.get(frame)) is not None and edge.parent not in found:
            frame = edge.parent
            found[frame] = None
        return list(found)

    def _chain(self, frames: list[str], stamp_ns: int) -> Matrix:
        """``T_top_bottom`` over the edges of frames that follow each other upwards."""
        T = np.eye(4)
        for frame in frames:
            edge = self._edges[frame]
            at = edge.at(stamp_ns)
            if at is None:
                raise _out_of_time(frame, edge, stamp_ns)
            T = at @ T
        return T


def _out_of_time(frame: str, edge: _Edge, stamp_ns: int) -> TransformTimeError:
    first_ns, last_ns = edge.track.span_ns
    ahead = stamp_ns > last_ns
    if ahead:
        where = f"{1e-9 * (stamp_ns - last_ns):.3f} s after the newest one known"
    elif stamp_ns < first_ns:
        where = f"{1e-9 * (first_ns - stamp_ns):.3f} s before the oldest one known"
    else:
        where = "in a gap between two that are known"
    return TransformTimeError(
        f"TF has no '{edge.parent}' -> '{frame}' at the time asked for: it lies {where}. "
        "Is its publisher running, and do its clock and the camera's agree?",
        ahead=ahead,
    )
