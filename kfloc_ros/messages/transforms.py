# SPDX-License-Identifier: Apache-2.0
"""A buffer of transforms over time that answers as tf2's does, for machines without tf2_ros; imports nothing of ROS."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp, so3_log
from kfloc_ros.types import Matrix

NEWEST = 0
"""As a time: the newest at which all transforms on the way are known."""


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
    """What a buffer can do; stamps are nanoseconds."""

    def set(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix, *, static: bool = False) -> None:
        """Add a transform; one that is older than the buffer's length is ignored."""
        ...

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        """``T_target_source`` (4, 4) at a time, or at the newest possible one for ``NEWEST``.

        Raises:
            TransformUnknownError: no chain of transforms connects the two.
            TransformTimeError: one does, but not at that time; nothing is extrapolated.
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


@dataclass(eq=False)
class _Edge:
    """The transforms from one frame to its parent, oldest first; a static one is valid at all times."""

    parent: str
    static: bool
    samples: list[tuple[int, Matrix]] = field(default_factory=list)

    def at(self, stamp_ns: int) -> Matrix | None:
        """Interpolated; None outside of what is known."""
        if self.static:
            return self.samples[-1][1]
        upper = bisect_right(self.samples, stamp_ns, key=lambda sample: sample[0])
        if upper == 0:
            return None
        t0, T0 = self.samples[upper - 1]
        if t0 == stamp_ns:
            return T0
        if upper == len(self.samples):
            return None
        t1, T1 = self.samples[upper]
        return interpolate(T0, T1, (stamp_ns - t0) / (t1 - t0))


class TransformBuffer:
    """Transforms of the last ``keep_s`` seconds. Not locked: its owner serialises the calls."""

    def __init__(self, keep_s: float = 10.0) -> None:
        self._keep_ns = int(keep_s * 1e9)
        self._edges: dict[str, _Edge] = {}

    def set(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix, *, static: bool = False) -> None:
        parent, child = parent.lstrip("/"), child.lstrip("/")
        if parent == child:
            return
        edge = self._edges.get(child)
        if edge is None or edge.parent != parent or edge.static != static:
            edge = self._edges[child] = _Edge(parent, static)
        if static:
            edge.samples = [(stamp_ns, T_parent_child)]
            return
        if edge.samples and stamp_ns < edge.samples[-1][0] - self._keep_ns:
            return
        edge.samples = [sample for sample in edge.samples if sample[0] != stamp_ns]
        insort(edge.samples, (stamp_ns, T_parent_child), key=lambda sample: sample[0])
        too_old = bisect_right(edge.samples, edge.samples[-1][0] - self._keep_ns, key=lambda sample: sample[0])
        del edge.samples[:too_old]

    def lookup(self, target: str, source: str, stamp_ns: int) -> Matrix:
        target, source = target.lstrip("/"), source.lstrip("/")
        above_target, above_source = self._ancestors(target), self._ancestors(source)
        common = next((frame for frame in above_source if frame in above_target), None)
        if common is None:
            raise unconnected(target, source, self.frames())
        up_source = above_source[: above_source.index(common)]
        up_target = above_target[: above_target.index(common)]
        if stamp_ns == NEWEST:
            moving = [self._edges[f].samples[-1][0] for f in (*up_source, *up_target) if not self._edges[f].static]
            stamp_ns = min(moving, default=NEWEST)
        return inverse_pose(self._chain(up_target, stamp_ns)) @ self._chain(up_source, stamp_ns)

    def clear(self) -> None:
        self._edges = {child: edge for child, edge in self._edges.items() if edge.static}

    def frames(self) -> tuple[str, ...]:
        return tuple(sorted({*self._edges, *(edge.parent for edge in self._edges.values())}))

    def _ancestors(self, frame: str) -> list[str]:
        """A frame and all above it; a loop ends the walk."""
        found = [frame]
        while frame in self._edges:
            frame = self._edges[frame].parent
            if frame in found:
                break
            found.append(frame)
        return found

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


def interpolate(T0: Matrix, T1: Matrix, share: float) -> Matrix:
    """Between two transforms: the rotation turns evenly, the translation goes straight."""
    turn = so3_exp(share * so3_log(T0[:3, :3].T @ T1[:3, :3]))
    return make_pose(T0[:3, :3] @ turn, (1 - share) * T0[:3, 3] + share * T1[:3, 3])


def _out_of_time(frame: str, edge: _Edge, stamp_ns: int) -> TransformTimeError:
    first_ns, last_ns = edge.samples[0][0], edge.samples[-1][0]
    ahead = stamp_ns > last_ns
    where = (
        f"{1e-9 * (stamp_ns - last_ns):.3f} s after the newest"
        if ahead
        else f"{1e-9 * (first_ns - stamp_ns):.3f} s before the oldest"
    )
    return TransformTimeError(
        f"TF has no '{edge.parent}' -> '{frame}' at the time asked for: it lies {where} one known. "
        "Is its publisher running, and do its clock and the camera's agree?",
        ahead=ahead,
    )


MAX_DEPTH = 100


class TransformTree:
    """Frames with one parent each; a static transform counts at all times, a later one replaces an earlier."""

    def __init__(self) -> None:
        self._static: dict[str, tuple[str, Matrix]] = {}
        self._moving: dict[str, tuple[str, list[int], list[Matrix]]] = {}
        self._tracks: dict[str, PoseTrack] = {}

    def add_static(self, parent: str, child: str, T_parent_child: Matrix) -> None:
        """A transform of ``/tf_static``."""
        self._static[child.lstrip("/")] = (parent.lstrip("/"), T_parent_child)

    def add(self, parent: str, child: str, stamp_ns: int, T_parent_child: Matrix) -> None:
        """A transform of ``/tf``.

        Raises:
            SourceError: the child had another parent before.
        """
        parent, child = parent.lstrip("/"), child.lstrip("/")
        known, stamps, poses = self._moving.setdefault(child, (parent, [], []))
        if known != parent:
            raise SourceError(f"In the bag's /tf the frame '{child}' has two parents, '{known}' and '{parent}'.")
        stamps.append(stamp_ns)
        poses.append(T_parent_child)

    def root(self, frame: str) -> str:
        """The last frame reached by going up from a frame."""
        return self._chain(frame)[-1]

    def moves(self, frame: str, ancestor: str) -> bool:
        """Whether some transform between a frame and an ancestor changes with time."""
        chain = self._chain(frame)
        return ancestor in chain and any(child in self._moving for child in chain[: chain.index(ancestor)])

    def fixed(self, target: str, source: str) -> Matrix | None:
        """``T_target_source`` by static transforms alone, or None where they do not connect the two."""
        up_source, up_target = self._static_chain(source.lstrip("/")), self._static_chain(target.lstrip("/"))
        common = next((frame for frame in up_source if frame in up_target), None)
        return None if common is None else inverse_pose(up_target[common]) @ up_source[common]

    def at(self, ancestor: str, frame: str, stamp_ns: int) -> Matrix | None:
        """``T_ancestor_frame`` at a time, or None where a transform is missing then."""
        chain = self._chain(frame)
        if ancestor not in chain:
            return None
        T = np.eye(4)
        for child in chain[: chain.index(ancestor)]:
            step = self._step(child, stamp_ns)
            if step is None:
                return None
            T = step @ T
        return T

    def _step(self, child: str, stamp_ns: int) -> Matrix | None:
        if child in self._moving:
            if child not in self._tracks:
                _, stamps, poses = self._moving[child]
                self._tracks[child] = PoseTrack(stamps, poses)
            return self._tracks[child].at(stamp_ns)
        return self._static[child][1]

    def _chain(self, frame: str) -> list[str]:
        chain = [frame.lstrip("/")]
        while (link := self._moving.get(chain[-1]) or self._static.get(chain[-1])) is not None:
            if link[0] in chain or len(chain) > MAX_DEPTH:
                raise SourceError(f"The bag's transforms go round in a circle at the frame '{link[0]}'.")
            chain.append(link[0])
        return chain

    def _static_chain(self, frame: str) -> dict[str, Matrix]:
        """``T_ancestor_frame`` of the frame itself and all that static transforms lead up to."""
        found, T, here = {frame: np.eye(4)}, np.eye(4), frame
        while here in self._static:
            here, step = self._static[here]
            if here in found:
                raise SourceError(f"The bag's /tf_static goes round in a circle at the frame '{here}'.")
            T = step @ T
            found[here] = T
        return found


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
