# SPDX-License-Identifier: Apache-2.0
"""Where the truth of a replay comes from: a pose topic of the bag, its TF, or a TUM file. Needs no ROS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.results import read_tum
from kfloc_ros.nodes.pose_messages import pose_from_message, stamp_to_ns, transform_from_message
from kfloc_ros.nodes.transform_buffer import NEWEST, TransformBuffer, TransformUnknownError, interpolate
from kfloc_ros.replay.bag_stream import BagStream
from kfloc_ros.replay.bag_topics import POSE_TYPES, TF_TYPE
from kfloc_ros.types import Matrix

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
