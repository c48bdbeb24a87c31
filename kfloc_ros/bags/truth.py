# SPDX-License-Identifier: Apache-2.0
"""Poses and transforms that a bag holds: a robot's TF, to be played to the nodes, and the truth. Needs no ROS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kfloc_ros.bags.reader import BagReader
from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.bags.topics import ODOMETRY, POSE_TYPES, TF_TYPES, Option, Topic, choose_transforms, choose_truth
from kfloc_ros.errors import SourceError
from kfloc_ros.messages.poses import pose_from_message, read_tum, stamp_to_ns, transform_from_message
from kfloc_ros.messages.transforms import (
    NEWEST,
    PoseTrack,
    TransformTree,
    TransformUnknownError,
    jumps_to_and_fro,
)
from kfloc_ros.types import Matrix


@dataclass(frozen=True, eq=False)
class Edge:
    """One transform."""

    parent: str
    child: str
    stamp_ns: int
    T_parent_child: Matrix


@dataclass(frozen=True, eq=False)
class TransformEvent:
    """One recorded message of transforms."""

    log_ns: int
    edges: tuple[Edge, ...]


@dataclass(frozen=True, eq=False)
class RecordedTransforms:
    """Transforms of one tree, as they were recorded; those with no rotation, or no number, are left out."""

    static: tuple[Edge, ...]
    moving: tuple[TransformEvent, ...]

    def tree(self, **options: float) -> TransformTree:
        """The tree of all of them; ``options`` are those of :class:`TransformTree`."""
        tree = TransformTree(**options)
        for edge in self.static:
            tree.set(edge.parent, edge.child, edge.stamp_ns, edge.T_parent_child, static=True)
        for event in self.moving:
            for edge in event.edges:
                tree.set(edge.parent, edge.child, edge.stamp_ns, edge.T_parent_child)
        return tree

    def check(self, bag: Path) -> RecordedTransforms:
        """Return the same transforms.

        Raises:
            SourceError: two publishers tell them in turn.
        """
        tracks: dict[str, dict[int, Matrix]] = {}
        for edge in (edge for event in self.moving for edge in event.edges):
            tracks.setdefault(edge.child, {})[edge.stamp_ns] = edge.T_parent_child
        for child, poses in tracks.items():
            if jumps_to_and_fro(poses):
                raise SourceError(_TWO.format(f"The transforms to '{child}' in '{bag}'"))
        return self

    def without(self, frame: str) -> RecordedTransforms:
        """Those that neither lead from nor to a frame."""

        def kept(edges: Iterable[Edge]) -> tuple[Edge, ...]:
            return tuple(edge for edge in edges if frame not in (edge.parent, edge.child))

        return RecordedTransforms(
            kept(self.static), tuple(replace(event, edges=kept(event.edges)) for event in self.moving)
        )


def read_transforms(
    reader: BagReader, image: Topic, named: str | None = None, option: Option = "--tf {}".format
) -> RecordedTransforms:
    """The transforms of the robot that carries a camera.

    Args:
        image: the camera's images; their namespace decides between trees that contradict each other.
        named: the namespace of the tree, such as ``/robot1``.

    Raises:
        SourceError: there are trees of several robots with the same frames, and the choice is the user's.
    """
    events: dict[str, list[TransformEvent]] = {}
    for topic in reader.topics:
        if topic.kind in TF_TYPES and topic.count:
            timed = reader.timed(topic.name, topic.kind)
            events[topic.name] = [TransformEvent(logged_ns, _edges(message)) for logged_ns, message in timed]
    children = {name: {edge.child for event in told for edge in event.edges} for name, told in events.items()}
    static: dict[str, Edge] = {}
    moving: list[TransformEvent] = []
    for name in choose_transforms(reader.path, children, image, named, option):
        if name.endswith("tf_static"):
            static.update((edge.child, edge) for event in events[name] for edge in event.edges)
        else:
            moving += events[name]
    return RecordedTransforms(tuple(static.values()), tuple(sorted(moving, key=lambda event: event.log_ns)))


def _edges(message: Any) -> tuple[Edge, ...]:
    edges: list[Edge] = []
    for item in message.transforms:
        parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
        if not (parent and child) or parent == child:
            continue
        try:
            T = transform_from_message(item.transform)
        except ValueError:
            continue
        edges.append(Edge(parent, child, stamp_to_ns(item.header.stamp), T))
    return tuple(edges)


class BagTransforms:
    """What a bag says on TF about the robot, without what it says about the map.

    A recording of a robot that was being localized holds transforms from or to the map's frame. They are the answer
    that the nodes are to find, and are left out.

    Args:
        map_frame: the frame of the map.
        base_frame: the frame whose pose the nodes publish.

    Raises:
        SourceError: the bag's TF does not connect the camera with ``base_frame``, or it is damaged.
    """

    def __init__(self, stream: BagStream, map_frame: str, base_frame: str) -> None:
        self.map_frame, self.base_frame = map_frame.lstrip("/"), base_frame.lstrip("/")
        self.camera_frame = stream.image.frame_id
        self._start_ns = stream.start_ns
        self._recorded = read_transforms(stream, stream.image, stream.tf).without(self.map_frame).check(stream.path)
        self._tree = self.tree()
        try:
            self._tree.lookup(self.base_frame, self.camera_frame, NEWEST)
        except TransformUnknownError as error:
            raise SourceError(
                f"The TF of '{stream.path}' does not lead from '{self.base_frame}' to '{self.camera_frame}', the frame "
                f"of its images; it has {', '.join(self._tree.frames()) or 'no frames'}. Correct --base-frame, or "
                "record /tf_static."
            ) from error

    @property
    def static(self) -> tuple[Edge, ...]:
        """The last transform of every child on ``/tf_static``."""
        return self._recorded.static

    @property
    def odom_frame(self) -> str:
        """The root of the base frame's tree, in which odometry moves it; empty if it is the root itself."""
        root = self._tree.root(self.base_frame)
        return "" if root == self.base_frame else root

    def moving(self, part: ReplayRange, ahead_s: float = 0.0) -> Iterator[TransformEvent]:
        """The messages of ``/tf`` in a part of the bag, in recorded order, each as if it had been recorded earlier."""
        for event in self._recorded.moving:
            if event.edges and part.holds(event.log_ns - self._start_ns):
                yield TransformEvent(event.log_ns - int(ahead_s * 1e9), event.edges)

    def T_base_camera(self, stamp_ns: int) -> Matrix | None:
        """Where the camera was on the base frame (4, 4); None where the bag does not tell."""
        return self._tree.find(self.base_frame, self.camera_frame, stamp_ns)

    def tree(self) -> TransformTree:
        """A tree of its own with all of them."""
        return self._recorded.tree()


@dataclass(frozen=True, eq=False)
class RecordedPoses:
    """Poses of one topic by header stamp in nanoseconds; those that are none (no number, no rotation) are left out."""

    poses: Mapping[int, Matrix]
    body: str
    """``child_frame_id`` of an Odometry: the frame whose poses they are; empty where the messages do not say it."""
    unusable: int


def read_poses(reader: BagReader, topic: Topic) -> RecordedPoses:
    """The poses of a topic of one of ``POSE_TYPES``.

    Raises:
        SourceError: they are of several bodies or in several frames, so that two publishers share the topic.
    """
    poses: dict[int, Matrix] = {}
    frames: dict[tuple[str, str], None] = {}
    unusable = 0
    for message in reader.messages(topic.name, topic.kind):
        frames[message.header.frame_id.lstrip("/"), str(getattr(message, "child_frame_id", "")).lstrip("/")] = None
        try:
            T = pose_from_message(getattr(message.pose, "pose", message.pose))
        except ValueError:
            unusable += 1
            continue
        poses[stamp_to_ns(message.header.stamp)] = T
    if len(frames) > 1:
        listed = ", ".join(f"'{body or 'no child frame'}' in '{parent}'" for parent, body in frames)
        raise SourceError(
            f"{topic.name} of '{reader.path}' mixes poses of several frames: {listed}. Record one of them."
        )
    if jumps_to_and_fro(poses):
        raise SourceError(_TWO.format(f"The poses on {topic.name} of '{reader.path}'"))
    return RecordedPoses(poses, next((body for _, body in frames), ""), unusable)


_TWO = "{} jump back and forth: two publishers, such as two robots, share one name. Record one of them."


def other_times(what: str, stamps_ns: Iterable[int], images_ns: Iterable[int]) -> str:
    """Sentence that says that a topic and the images are stamped by different clocks, or empty if their times meet."""
    stamps, images = sorted(stamps_ns), sorted(images_ns)
    if not stamps or not images or (stamps[0] <= images[-1] + _SLACK_NS and images[0] <= stamps[-1] + _SLACK_NS):
        return ""

    def span(times: list[int]) -> str:
        return f"{1e-9 * times[0]:.3f} to {1e-9 * times[-1]:.3f} s"

    return (
        f"{what} are of other times than the images: {span(stamps)} against {span(images)}. Header stamps of both must "
        "come from one clock: have the driver stamp its messages with the system's time, or correct the recording."
    )


_SLACK_NS = 1_000_000_000
"""Recordings whose ends are no farther apart than this are of one clock."""


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
        SourceError: there is no such truth, or it is damaged, or of other times, or the camera's place on ``body`` is
            not known.
    """
    stamps_ns = sorted(stream.positions())
    if choice is not None and choice.startswith("tf:"):
        return Truth(choice, _of_tf(stream, choice, stamps_ns))
    name = choice or "bag"
    if choice is None:
        topic = choose_truth(stream.path, stream.topics)
        if topic is None:
            return Truth("none", {})
        try:
            poses = read_poses(stream, topic).poses
        except SourceError as error:  # such as goals that were sent to the robot
            return Truth(f"none ({error})", {})
        if clocks := other_times(f"The poses on {topic.name}", poses, stamps_ns):
            return Truth(f"none ({clocks})", {})
    elif choice.startswith("/") and not Path(choice).exists():
        poses, body = _of_topic(stream, choice, body)
    else:
        path = Path(choice)
        if not path.is_file():
            raise SourceError(f"There is no truth '{choice}': it is no topic, no tf:MAP:CAMERA, and no file.")
        name, poses = path.name, read_tum(path)
    if clocks := other_times(f"The poses of the truth '{name}'", poses, stamps_ns):
        raise SourceError(clocks)
    return Truth(name, at_stamps(_of_camera(stream, poses, body), stamps_ns))


def at_stamps(poses: Mapping[int, Matrix], stamps_ns: Iterable[int]) -> dict[int, Matrix]:
    """Poses at given stamps: exact where there is one, else between the two neighbours if they are near enough."""
    track = PoseTrack(list(poses), list(poses.values()), near_s=0.0)
    return {stamp_ns: T for stamp_ns in stamps_ns if (T := track.at(stamp_ns)) is not None}


def _of_camera(stream: BagStream, poses: Mapping[int, Matrix], body: str | None) -> Mapping[int, Matrix]:
    """Poses of the camera from those of a body that it sits on."""
    camera, body = stream.image.frame_id, (body or "").lstrip("/")
    if not body or body == camera or not poses:
        return poses
    T_body_camera = read_transforms(stream, stream.image, stream.tf).tree().fixed(body, camera)
    if T_body_camera is None:
        raise SourceError(
            f"The truth is of '{body}', the images of '{camera}', and the bag's /tf_static does not connect the two. "
            "Record /tf_static, or name the frame that the truth is of with --truth-of."
        )
    return {stamp_ns: T @ T_body_camera for stamp_ns, T in poses.items()}


def _of_topic(stream: BagStream, name: str, body: str | None) -> tuple[Mapping[int, Matrix], str]:
    """Poses of a topic that is named, and of which frame they are."""
    there = [topic for topic in stream.topics if topic.kind in POSE_TYPES]
    topic = next((topic for topic in there if topic.name == name), None)
    if topic is None:
        known = ", ".join(f"{topic.name} ({topic.kind})" for topic in there) or "none"
        raise SourceError(f"'{stream.path}' has no topic '{name}' with poses; it has {known}.")
    recorded = read_poses(stream, topic)
    if topic.kind == ODOMETRY and not (body or recorded.body):
        raise SourceError(
            f"The Odometry on {name} does not say whose poses it tells: its child_frame_id is empty. Name the frame, "
            "such as base_link, with --truth-of."
        )
    return recorded.poses, body or recorded.body


def _of_tf(stream: BagStream, choice: str, stamps_ns: Iterable[int]) -> dict[int, Matrix]:
    _, _, frames = choice.partition(":")
    target, separator, source = frames.partition(":")
    if not (separator and target and source):
        raise SourceError(f"Truth from TF is written tf:MAP:CAMERA, such as tf:map:camera_optical, not '{choice}'.")
    tree = read_transforms(stream, stream.image, stream.tf).tree()
    known = {target.lstrip("/"), source.lstrip("/")} & set(tree.frames())
    if len(known) < 2:
        raise SourceError(
            f"'{stream.path}' has no TF frames for '{choice}'; it has {', '.join(tree.frames()) or 'none'}."
        )
    found = {stamp_ns: tree.find(target, source, stamp_ns) for stamp_ns in stamps_ns}
    return {stamp_ns: T for stamp_ns, T in found.items() if T is not None}
