# SPDX-License-Identifier: Apache-2.0
"""The TF of a bag as the robot published it, to be played to the nodes. Needs no ROS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.bags.topics import POSE_TYPES, TF_TYPE
from kfloc_ros.errors import SourceError
from kfloc_ros.messages.poses import pose_from_message, stamp_to_ns, transform_from_message
from kfloc_ros.messages.transforms import NEWEST, TransformBuffer, TransformUnknownError, interpolate
from kfloc_ros.messages.tum import read_tum
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


MAX_GAP_S = 0.2
"""Truth is interpolated between poses no further apart than this."""


@dataclass(frozen=True)
class Truth:
    """Poses ``T_map_camera`` by image stamp in nanoseconds, and where they are from."""

    name: str
    poses: Mapping[int, Matrix]


def read_truth(stream: BagStream, choice: str | None, body: str | None = None) -> Truth:
    """The truth at the images' stamps; an image without truth near it gets none.

    Args:
        choice: None: the bag's one PoseStamped topic, if there is one; ``/topic``: PoseStamped,
            PoseWithCovarianceStamped or Odometry; ``tf:MAP:CAMERA``: two TF frames; else the path of a TUM file.
            All must be in the map's frame.
        body: the frame whose pose the truth is; ``/tf_static`` of the bag tells where the camera sits on it. None: the
            camera's optical frame; of an Odometry, its ``child_frame_id``.

    Raises:
        SourceError: there is no such truth, or it is damaged, or the camera's place on ``body`` is not known.
    """
    if choice is None:
        topic = stream.truth_topic()
        return Truth("none" if topic is None else "bag", _of_camera(stream, stream.truth(), body))
    stamps_ns = sorted(stream.positions())
    if choice.startswith("tf:"):
        return Truth(choice, _of_tf(stream, choice, stamps_ns))
    if choice.startswith("/") and not Path(choice).exists():
        topic = next((topic for topic in stream.topics if topic.name == choice), None)
        body = body or (topic.child_frame_id if topic is not None else None)
        return Truth(choice, at_stamps(_of_camera(stream, _of_topic(stream, choice), body), stamps_ns))
    path = Path(choice)
    if not path.is_file():
        raise SourceError(f"There is no truth '{choice}': it is no topic, no tf:MAP:CAMERA, and no file.")
    return Truth(path.name, at_stamps(_of_camera(stream, read_tum(path), body), stamps_ns))


def at_stamps(poses: Mapping[int, Matrix], stamps_ns: Iterable[int]) -> dict[int, Matrix]:
    """Poses at given stamps: exact where there is one, else between the two neighbours if they are near enough."""
    known = sorted(poses)
    found: dict[int, Matrix] = {}
    for stamp_ns in stamps_ns:
        if stamp_ns in poses:
            found[stamp_ns] = poses[stamp_ns]
            continue
        after = bisect_left(known, stamp_ns)
        if 0 < after < len(known) and known[after] - known[after - 1] <= MAX_GAP_S * 1e9:
            t0, t1 = known[after - 1], known[after]
            found[stamp_ns] = interpolate(poses[t0], poses[t1], (stamp_ns - t0) / (t1 - t0))
    return found


def _of_camera(stream: BagStream, poses: Mapping[int, Matrix], body: str | None) -> dict[int, Matrix]:
    """Poses of the camera from those of a body that it sits on."""
    camera, body = stream.image.frame_id, (body or "").lstrip("/")
    if not body or body == camera or not poses:
        return dict(poses)
    try:
        T_body_camera = _buffer(stream, ("/tf_static",)).lookup(body, camera, NEWEST)
    except TransformUnknownError as error:
        raise SourceError(
            f"The truth is of '{body}', the images of '{camera}', and the bag's /tf_static does not connect the two. "
            "Record /tf_static, or name the frame that the truth is of with --truth-of."
        ) from error
    return {stamp_ns: T @ T_body_camera for stamp_ns, T in poses.items()}


def _of_topic(stream: BagStream, topic: str) -> dict[int, Matrix]:
    poses: dict[int, Matrix] = {}
    for message in stream.recorded(topic, POSE_TYPES):
        pose: Any = message.pose
        poses[stamp_to_ns(message.header.stamp)] = _checked(pose_from_message, getattr(pose, "pose", pose))
    return poses


def _of_tf(stream: BagStream, choice: str, stamps_ns: Iterable[int]) -> dict[int, Matrix]:
    _, _, frames = choice.partition(":")
    target, separator, source = frames.partition(":")
    if not (separator and target and source):
        raise SourceError(f"Truth from TF is written tf:MAP:CAMERA, such as tf:map:camera_optical, not '{choice}'.")
    buffer = _buffer(stream, ("/tf_static", "/tf"))
    known = {target.lstrip("/"), source.lstrip("/")} & set(buffer.frames())
    if len(known) < 2:
        raise SourceError(
            f"'{stream.path}' has no TF frames for '{choice}'; it has {', '.join(buffer.frames()) or 'none'}."
        )
    found: dict[int, Matrix] = {}
    for stamp_ns in stamps_ns:
        try:
            found[stamp_ns] = buffer.lookup(target, source, stamp_ns)
        except TransformUnknownError:
            continue
    return found


def _buffer(stream: BagStream, topics: Iterable[str]) -> TransformBuffer:
    """The transforms on some topics of the bag."""
    buffer = TransformBuffer(keep_s=1e9)
    for topic in topics:
        for message in stream.recorded(topic, (TF_TYPE,), must=False):
            for item in message.transforms:
                T = _checked(transform_from_message, item.transform)
                stamp_ns = stamp_to_ns(item.header.stamp)
                static = topic == "/tf_static"
                buffer.set(item.header.frame_id, item.child_frame_id, stamp_ns, T, static=static)
    return buffer


def _checked(read: Any, part: Any) -> Matrix:
    try:
        return read(part)  # type: ignore[no-any-return]
    except ValueError as error:
        raise SourceError(f"The truth in the bag is damaged: {error}") from error
