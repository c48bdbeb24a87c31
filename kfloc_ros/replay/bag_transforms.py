# SPDX-License-Identifier: Apache-2.0
"""The TF of a bag as the robot published it, to be played to the nodes. Needs no ROS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kfloc_ros.errors import SourceError
from kfloc_ros.nodes.pose_messages import stamp_to_ns, transform_from_message
from kfloc_ros.nodes.transform_buffer import NEWEST, TransformBuffer, TransformUnknownError
from kfloc_ros.replay.bag_stream import BagStream, ReplayRange
from kfloc_ros.replay.bag_topics import TF_TYPE
from kfloc_ros.types import Matrix

TF, TF_STATIC = "/tf", "/tf_static"


@dataclass(frozen=True, eq=False)
class Edge:
    """One transform."""

    parent: str
    child: str
    stamp_ns: int
    T_parent_child: Matrix


@dataclass(frozen=True, eq=False)
class TransformEvent:
    """One recorded message of ``/tf``."""

    log_ns: int
    edges: tuple[Edge, ...]


class BagTransforms:
    """What a bag says on TF about the robot, without what it says about the map.

    A recording of a robot that was being localized holds transforms from or to the map's frame. They are the answer
    that the nodes are to find, and are left out; a transform with no rotation, or no number, is left out, too.

    Args:
        map_frame: the frame of the map.
        base_frame: the frame whose pose the nodes publish.

    Raises:
        SourceError: the bag's TF does not connect the camera with ``base_frame``, or it is damaged.
    """

    def __init__(self, stream: BagStream, map_frame: str, base_frame: str) -> None:
        self.map_frame, self.base_frame = map_frame.lstrip("/"), base_frame.lstrip("/")
        self.camera_frame = stream.image.frame_id
        found = (self._edges(message) for message in stream.recorded(TF_STATIC, (TF_TYPE,), must=False))
        self.static = tuple({edge.child: edge for edges in found for edge in edges}.values())
        """The last transform of every child on ``/tf_static``."""
        self._start_ns = stream.start_ns
        self._moving = [(offset_ns, self._edges(message)) for offset_ns, message in stream.timed(TF, (TF_TYPE,))]
        self._parents = {link.child: link.parent for link in stream.links() if self._counts(link.parent, link.child)}
        self._store = TransformBuffer(keep_s=1e9)
        self.add_to(self._store)
        try:
            self._store.lookup(self.base_frame, self.camera_frame, NEWEST)
        except TransformUnknownError as error:
            raise SourceError(
                f"The TF of '{stream.path}' does not lead from '{self.base_frame}' to '{self.camera_frame}', the frame "
                f"of its images; it has {', '.join(self._store.frames()) or 'no frames'}. Correct --base-frame, or "
                "record /tf_static."
            ) from error

    @property
    def odom_frame(self) -> str:
        """The root of the base frame's tree, in which odometry moves it; empty if it is the root itself."""
        frame, seen = self.base_frame, {self.base_frame}
        while (parent := self._parents.get(frame)) is not None and parent not in seen:
            seen.add(frame := parent)
        return "" if frame == self.base_frame else frame

    def moving(self, part: ReplayRange, ahead_s: float = 0.0) -> Iterator[TransformEvent]:
        """The messages of ``/tf`` in a part of the bag, in recorded order, each as if it had been recorded earlier."""
        for offset_ns, edges in self._moving:
            if edges and part.holds(offset_ns):
                yield TransformEvent(self._start_ns + offset_ns - int(ahead_s * 1e9), edges)

    def T_base_camera(self, stamp_ns: int) -> Matrix | None:
        """Where the camera was on the base frame (4, 4); None where the bag does not tell."""
        try:
            return self._store.lookup(self.base_frame, self.camera_frame, stamp_ns)
        except TransformUnknownError:
            return None

    def add_to(self, store: TransformBuffer) -> None:
        """Put everything into a buffer."""
        for edge in self.static:
            store.set(edge.parent, edge.child, edge.stamp_ns, edge.T_parent_child, static=True)
        for event in self.moving(ReplayRange()):
            for edge in event.edges:
                store.set(edge.parent, edge.child, edge.stamp_ns, edge.T_parent_child)

    def _edges(self, message: Any) -> tuple[Edge, ...]:
        edges: list[Edge] = []
        for item in message.transforms:
            parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
            if not self._counts(parent, child):
                continue
            try:
                T = transform_from_message(item.transform)
            except ValueError:
                continue
            edges.append(Edge(parent, child, stamp_to_ns(item.header.stamp), T))
        return tuple(edges)

    def _counts(self, parent: str, child: str) -> bool:
        return bool(parent and child) and parent != child and self.map_frame not in (parent, child)
