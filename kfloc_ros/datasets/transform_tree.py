# SPDX-License-Identifier: Apache-2.0
"""The frames of a recording: transforms of ``/tf`` and ``/tf_static``, asked along the tree and in between stamps."""

from __future__ import annotations

import numpy as np

from kfloc_ros.datasets.pose_track import PoseTrack
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.types import Matrix

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
