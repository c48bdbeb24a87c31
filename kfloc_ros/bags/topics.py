# SPDX-License-Identifier: Apache-2.0
"""Topics of bags: those of the project's own recordings, and which of a robot's are meant where nobody says so.

Everything that reads or records a bag chooses here: the ``bag`` source, ``kfloc replay``, ``kfloc record`` and ``kfloc
bag info``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
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

COMPRESSED = "sensor_msgs/msg/CompressedImage"
RAW = "sensor_msgs/msg/Image"
IMAGE_TYPES = (RAW, COMPRESSED)
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"
ODOMETRY = "nav_msgs/msg/Odometry"
POSE_TYPES = (POSE, "geometry_msgs/msg/PoseWithCovarianceStamped", ODOMETRY)
TF_TYPE = "tf2_msgs/msg/TFMessage"
TF_TYPES = (TF_TYPE, "tf/msg/tfMessage")

TOPIC_TYPES = {
    IMAGE_TOPIC: COMPRESSED,
    CAMERA_INFO_TOPIC: CAMERA_INFO,
    DEPTH_TOPIC: COMPRESSED,
    TRUTH_TOPIC: POSE,
    TF_TOPIC: TF_TYPE,
}
"""What ``kfloc bag make`` writes."""

DEPTH_UNIT_M = 1e-3
"""Depth images are 16-bit PNG in millimetres, 0 where unknown (REP-118)."""

_TRANSPORTS = ("compressed", "compressedDepth", "zstd", "ffmpeg", "theora")
"""What image_transport puts behind the name of a topic whose images it compresses."""
_RECTIFIED, _RAW = {"rect", "rectified", "undistorted"}, "raw"
_WORD = re.compile(r"[A-Z]?[a-z]+")

THIS_MACHINE = Path("this machine's topics")
"""Named in place of a bag where the topics are those of running nodes."""

Option = Callable[[str], str]
"""Text with which a user chooses, such as ``--image-topic /a`` or ``?image=/a`` of ``/a``."""


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

    @property
    def base(self) -> str:
        """Name of the topic that this one is a compressed copy of, recorded or not; else its own."""
        parent, _, last = self.name.rpartition("/")
        return parent if self.kind == COMPRESSED and last in _TRANSPORTS else self.name

    @property
    def is_rectified(self) -> bool:
        """Whether its images are rectified, by its name: ``image_rect``, ``image_rect_color``, ``rect/image``.

        The last part of the name counts; the others, if it does not say ``raw``.
        """
        space, _, last = self.base.rpartition("/")
        words = {word.lower() for word in _WORD.findall(last)}
        parents = set(space.lower().split("/"))
        return bool(words & _RECTIFIED) or (_RAW not in words and bool(parents & _RECTIFIED))


@dataclass(frozen=True)
class Link:
    """Two TF frames that the bag connects."""

    parent: str
    child: str
    static: bool


def is_own(topics: Iterable[Topic]) -> bool:
    """Whether a bag is one of ``kfloc bag make``: its topics with its frames, and no others."""
    there = {topic.name: topic for topic in topics if topic.count}
    frames = {IMAGE_TOPIC: CAMERA_FRAME, CAMERA_INFO_TOPIC: CAMERA_FRAME, DEPTH_TOPIC: CAMERA_FRAME}
    frames[TRUTH_TOPIC] = MAP_FRAME
    return (
        {IMAGE_TOPIC, CAMERA_INFO_TOPIC} <= there.keys()
        and (TRUTH_TOPIC in there) == (TF_TOPIC in there)
        and all(TOPIC_TYPES.get(name) == topic.kind for name, topic in there.items())
        and all(there[name].frame_id == frame for name, frame in frames.items() if name in there)
    )


def choose_image(
    bag: Path,
    topics: Iterable[Topic],
    named: str | None,
    option: Option = "--image-topic {}".format,
    *,
    compressed: bool = True,
) -> Topic:
    """The topic of colour images that is named, or the only one there is; depth images are not counted.

    Of images that are there both raw and compressed, ``compressed`` says which are taken.

    Raises:
        SourceError: there is none, or several, and the choice is the user's.
    """
    pictures = [topic for topic in topics if topic.kind in IMAGE_TYPES]
    if named is not None:
        return _named(bag, pictures, named, "image")
    colours = _without_copies([topic for topic in pictures if not topic.is_depth], compressed)
    return _only(bag, colours, "image", option)


def choose_depth(
    bag: Path, topics: Iterable[Topic], image: Topic, named: str | None, option: Option = "?depth={}".format
) -> Topic | None:
    """The topic of depth images that is named, or the only one in the images' own frame, or the only one; or None.

    Named ``none`` is no depth.

    Raises:
        SourceError: there are several.
    """
    pictures = [topic for topic in topics if topic.kind in IMAGE_TYPES]
    if named == "none":
        return None
    if named is not None:
        return _named(bag, pictures, named, "depth image")
    depths = [topic for topic in pictures if topic.is_depth and topic.base != image.base]
    aligned = [topic for topic in depths if topic.frame_id == image.frame_id]
    choices = _without_copies(aligned or depths, compressed=False)
    return _only(bag, choices, "depth image", option) if choices else None


def choose_info(
    bag: Path,
    topics: Iterable[Topic],
    image: Topic,
    named: str | None,
    option: Option = "--camera-info-topic {}".format,
) -> Topic:
    """The camera_info that is named, or the one beside the images, or the only one of their frame.

    Raises:
        SourceError: none or several of them can be meant.
    """
    infos = [topic for topic in topics if topic.kind == CAMERA_INFO]
    if named is not None:
        return _named(bag, infos, named, "camera_info")
    namespace = image.base.rpartition("/")[0]
    beside = [topic for topic in infos if topic.name.rpartition("/")[0] == namespace]
    of_frame = [topic for topic in infos if topic.frame_id == image.frame_id != ""]
    chosen = _only(bag, beside or of_frame or infos, "camera_info", option)
    if not beside and "" not in (chosen.frame_id, image.frame_id) and chosen.frame_id != image.frame_id:
        raise SourceError(
            f"'{bag}' has one camera_info, {chosen.name}, but it is of the frame '{chosen.frame_id}' and {image.name} "
            f"of '{image.frame_id}'. If it is theirs all the same, say so with {option(chosen.name)}."
        )
    return chosen


def choose_truth(bag: Path, topics: Iterable[Topic]) -> Topic | None:
    """The PoseStamped topic that is the truth where none is named: a bag of our own's, or the only one.

    Raises:
        SourceError: there are several.
    """
    poses = [topic for topic in topics if topic.kind == POSE and topic.count]
    own = [topic for topic in poses if topic.name == TRUTH_TOPIC]
    return _only(bag, own or poses, "PoseStamped", "--truth {}".format) if poses else None


def choose_pose(bag: Path, topics: Iterable[Topic], named: str | None, *, with_tf: bool) -> Topic | str | None:
    """The topic of poses that is named, or the only source of them; ``tf`` for the tree of transforms; or None.

    Args:
        with_tf: the tree moves the camera. Named ``tf`` is taken in any case, and ``none`` is no poses.

    Raises:
        SourceError: there are several.
    """
    poses = [topic for topic in topics if topic.kind in POSE_TYPES and topic.count]
    if named == "none":
        return None
    if named == "tf":
        return "tf"
    if named is not None:
        return _named(bag, poses, named, "pose")
    if not poses:
        return "tf" if with_tf else None
    if len(poses) > 1 or with_tf:
        choices = [topic.name for topic in poses] + ["tf"] * with_tf
        raise _several(bag, choices, "sources of poses", "?pose={}".format)
    return poses[0]


def choose_recorded(
    topics: Sequence[Topic], image: str = "", camera_info: str = "", depth: str = "", also: Sequence[str] = ()
) -> list[Topic]:
    """The topics of a running robot that a recording for a map needs; that of the images comes first.

    All that moves is recorded on whatever topic it comes, and a depth image with the calibration beside it.

    Args:
        topics: what is published now.
        image, camera_info, depth: names; empty: chosen. Depth ``none``: none.
        also: names of more topics.

    Raises:
        SourceError: none or several can be meant.
    """
    colours = any(topic.kind in IMAGE_TYPES and not topic.is_depth for topic in topics)
    for what, is_there in (
        ("images", colours or image),
        ("camera_info", any(topic.kind == CAMERA_INFO for topic in topics)),
    ):
        if not is_there:
            domain = os.environ.get("ROS_DOMAIN_ID", "0")
            raise SourceError(
                f"No topic of {what} is published in the ROS domain {domain}. Is the camera running, and does `ros2 "
                "topic list` show its topics in this terminal?"
            )
    images = choose_image(THIS_MACHINE, topics, image or None, "--image {}".format)
    wanted = [images, choose_info(THIS_MACHINE, topics, images, camera_info or None, "--camera-info {}".format)]
    if depths := choose_depth(THIS_MACHINE, topics, images, depth or None, "--depth {}".format):
        space = depths.base.rpartition("/")[0]  # its own calibration, too: it may be of another frame
        wanted += [depths, *(t for t in topics if t.kind == CAMERA_INFO and t.name.rpartition("/")[0] == space)]
    wanted += [topic for topic in topics if topic.kind in (TF_TYPE, ODOMETRY)]
    wanted += [_named(THIS_MACHINE, topics, name, "recordable") for name in also]
    return list({topic.name: topic for topic in wanted}.values())


def choose_transforms(
    bag: Path, children: dict[str, set[str]], image: Topic, named: str | None, option: Option = "?tf={}".format
) -> list[str]:
    """The topics whose transforms are of one tree: of several robots' that name their frames alike, one robot's.

    Args:
        children: child frames by topic with transforms, such as ``/robot1/tf``.
        image: decides for the namespace that it is in.
        named: a namespace, such as ``/robot1``.

    Raises:
        SourceError: the trees contradict each other, and the choice is the user's.
    """
    spaces: dict[str, list[str]] = {}
    for topic in children:
        spaces.setdefault(topic.rpartition("/")[0], []).append(topic)
    frames = {space: set().union(*(children[topic] for topic in names)) for space, names in spaces.items()}
    if named is not None:
        first = named.rstrip("/").removesuffix("/tf_static").removesuffix("/tf")
        if first not in spaces:
            raise SourceError(f"'{bag}' has no transforms in '{named}'; it has {', '.join(children) or 'none'}.")
    elif any(frames[a] & frames[b] for a in spaces for b in spaces if a < b):
        around = [space for space in spaces if image.name.startswith(f"{space}/")]
        first = max(around, key=len, default="")
        if first not in spaces:
            raise _several(bag, [space or "/" for space in spaces], "trees of transforms", option)
    else:
        return list(children)
    # The others' frames count as far as they do not contradict: a global /tf_static beside a robot's own /robot1/tf.
    chosen = [space for space in spaces if space == first or not frames[space] & frames[first]]
    return [topic for space in chosen for topic in spaces[space]]


def _without_copies(topics: Sequence[Topic], compressed: bool) -> list[Topic]:
    """Topics without those that hold the images of another one, raw or (``compressed``) as image_transport has them."""
    names = {topic.name for topic in topics}
    copied = {topic.base for topic in topics if topic.base != topic.name}
    if compressed:
        return [topic for topic in topics if topic.name not in copied]
    return [topic for topic in topics if topic.base == topic.name or topic.base not in names]


def _named(bag: Path, topics: Sequence[Topic], name: str, what: str) -> Topic:
    for topic in topics:
        if topic.name == name:
            return topic
    there = ", ".join(topic.name for topic in topics) or "none"
    raise SourceError(f"'{bag}' has no {what} topic '{name}'; it has {there}.")


def _only(bag: Path, topics: Sequence[Topic], what: str, option: Option) -> Topic:
    if len(topics) == 1:
        return topics[0]
    if topics:
        raise _several(bag, [topic.name for topic in topics], f"{what} topics", option)
    raise SourceError(f"'{bag}' has no {what} topic: record it anew; `kfloc record` chooses the topics.")


def _several(bag: Path, names: Sequence[str], what: str, option: Option) -> SourceError:
    choices = ", ".join(map(option, names))
    return SourceError(f"'{bag}' has several {what}: {', '.join(names)}. Choose one of them: {choices}.")
