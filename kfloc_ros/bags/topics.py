# SPDX-License-Identifier: Apache-2.0
"""What the project's bags hold: topic names, message types and frame names, for writer, reader and replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfloc_ros.errors import SourceError

IMAGE_TOPIC = "/camera/image/compressed"
CAMERA_INFO_TOPIC = "/camera/camera_info"
DEPTH_TOPIC = "/camera/depth/compressed"
TRUTH_TOPIC = "/ground_truth/pose"
TF_TOPIC = "/tf"

MAP_FRAME = "map"
CAMERA_FRAME = "camera"
"""Optical frame of the camera (x right, y down, z forward)."""
TRUTH_FRAME = "camera_ground_truth"
"""The true camera frame in /tf: a name of its own, so that it never gets two parents beside a localizer's output."""

TOPIC_TYPES = {
    IMAGE_TOPIC: "sensor_msgs/msg/CompressedImage",
    CAMERA_INFO_TOPIC: "sensor_msgs/msg/CameraInfo",
    DEPTH_TOPIC: "sensor_msgs/msg/CompressedImage",
    TRUTH_TOPIC: "geometry_msgs/msg/PoseStamped",
    TF_TOPIC: "tf2_msgs/msg/TFMessage",
}

DEPTH_UNIT_M = 1e-3
"""Depth images are 16-bit PNG in millimetres, 0 where unknown (REP-118)."""


COMPRESSED = "sensor_msgs/msg/CompressedImage"
RAW = "sensor_msgs/msg/Image"
IMAGE_TYPES = (RAW, COMPRESSED)
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"
POSE_TYPES = (POSE, "geometry_msgs/msg/PoseWithCovarianceStamped", "nav_msgs/msg/Odometry")
TF_TYPE = "tf2_msgs/msg/TFMessage"


@dataclass(frozen=True)
class Topic:
    """One topic of a bag."""

    name: str
    kind: str
    """Message type."""
    count: int
    frame_id: str = ""
    """Of its first message; empty where there is none, or it has no header."""
    child_frame_id: str = ""
    is_depth: bool = False


@dataclass(frozen=True)
class Link:
    """Two TF frames that the bag connects."""

    parent: str
    child: str
    static: bool


def choose_image(bag: Path, topics: Iterable[Topic], named: str | None) -> Topic:
    """The topic of colour images that is named, or the only one there is.

    A topic with a compressed copy is played compressed. Depth images are not counted.

    Raises:
        SourceError: there is none, or several, and the choice is the user's.
    """
    pictures = [topic for topic in topics if topic.kind in IMAGE_TYPES]
    if named is not None:
        return _named(bag, pictures, named, "image")
    colours = [topic for topic in pictures if not topic.is_depth]
    copied = {topic.name.removesuffix("/compressed") for topic in colours if topic.kind == COMPRESSED}
    colours = [topic for topic in colours if topic.kind == COMPRESSED or topic.name not in copied]
    own = [topic for topic in colours if topic.name == IMAGE_TOPIC]  # a bag of our own
    return _only(bag, own or colours, "image", "--image-topic")


def choose_info(bag: Path, topics: Iterable[Topic], image: Topic, named: str | None) -> Topic:
    """The camera_info that is named, or the one beside the images, or the only one of their frame.

    Raises:
        SourceError: none or several of them can be meant.
    """
    infos = [topic for topic in topics if topic.kind == CAMERA_INFO]
    if named is not None:
        return _named(bag, infos, named, "camera_info")
    namespace = image.name.removesuffix("/compressed").rpartition("/")[0]
    beside = [topic for topic in infos if topic.name.rpartition("/")[0] == namespace]
    chosen = _only(bag, beside or infos, "camera_info", "--camera-info-topic")
    if not beside and "" not in (chosen.frame_id, image.frame_id) and chosen.frame_id != image.frame_id:
        raise SourceError(
            f"'{bag}' has one camera_info, {chosen.name}, but it is of the frame '{chosen.frame_id}' and {image.name} "
            f"of '{image.frame_id}'. If it is theirs all the same, say so with --camera-info-topic {chosen.name}."
        )
    return chosen


def choose_truth(bag: Path, topics: Iterable[Topic]) -> Topic | None:
    """The PoseStamped topic that is the truth where none is named: a bag of our own's, or the only one.

    Raises:
        SourceError: there are several.
    """
    poses = [topic for topic in topics if topic.kind == POSE and topic.count]
    own = [topic for topic in poses if topic.name.rpartition("/")[0] == TRUTH_TOPIC.rpartition("/")[0]]
    return _only(bag, own or poses, "PoseStamped", "--truth") if poses else None


def is_rectified(image: Topic) -> bool:
    """Whether images are rectified already, as image_proc names them: ``image_rect``, ``image_rect_color``."""
    return "rect" in image.name.removesuffix("/compressed").rpartition("/")[2]


def _named(bag: Path, topics: Sequence[Topic], name: str, what: str) -> Topic:
    for topic in topics:
        if topic.name == name:
            return topic
    there = ", ".join(topic.name for topic in topics) or "none"
    raise SourceError(f"'{bag}' has no {what} topic '{name}'; it has {there}.")


def _only(bag: Path, topics: Sequence[Topic], what: str, option: str) -> Topic:
    if len(topics) == 1:
        return topics[0]
    if topics:
        there = ", ".join(topic.name for topic in topics)
        raise SourceError(f"'{bag}' has several {what} topics: {there}. Choose one with {option}.")
    raise SourceError(f"'{bag}' has no {what} topic; `kfloc bag info {bag}` lists what it has.")
