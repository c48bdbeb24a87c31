# SPDX-License-Identifier: Apache-2.0
"""Any rosbag2 or rosbag1 with images, and with depth and poses where it has them, as a source of frames.

Which topics are meant is found out where only one answer is possible; between two the user has to choose, with
words after the path: ``bag:PATH?image=/front/color/image_raw&pose=/odom``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.bags.reader import BagReader, reading, recorded_jpeg
from kfloc_ros.bags.writer import pose_of, stamp_ns_of
from kfloc_ros.datasets.depth import register_depth
from kfloc_ros.datasets.derived import recordings
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.camera_info import camera_from_info
from kfloc_ros.messages.images import decode_compressed, decode_depth_message, decode_image, is_depth
from kfloc_ros.messages.transforms import PoseTrack, TransformTree, nearest_stamp
from kfloc_ros.types import Frame, Matrix

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
CAMERA_INFO, TF = "sensor_msgs/msg/CameraInfo", "tf2_msgs/msg/TFMessage"
POSE_TYPES = (
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "nav_msgs/msg/Odometry",
)
DEPTH_TOLERANCE_NS = 20_000_000
WORDS = ("image", "info", "depth", "depth_info", "pose", "map", "body")
"""What may follow a path: topics, the map's frame, and the frame whose pose a pose topic tells."""


class RosBag(FrameSource):
    """A recording of a camera; images are read from disk when asked for.

    Poses come from one topic (``pose=``) or from the tree of transforms (``pose=tf``), interpolated at the images'
    stamps; extrinsics come from ``/tf_static``. A PoseStamped is taken to be of the image's own frame unless
    ``body=`` names another; an Odometry is of its ``child_frame_id``.

    Args:
        path: folder of a rosbag2 or a ``.bag`` file.
        words: choices by the names of ``WORDS``.
        depth: read the depth images.

    Raises:
        SourceError: no bag there, it is damaged, it lacks what is needed, or a choice is left open.
    """

    def __init__(self, path: Path, words: dict[str, str], *, depth: bool = True) -> None:
        if not path.exists():
            raise SourceError(f"There is no bag '{path}'.")
        if unknown := sorted(set(words) - set(WORDS)):
            raise SourceError(f"After a bag's path only {', '.join(WORDS)} can be given, not {', '.join(unknown)}.")
        self.name = path.resolve().stem
        self._path, self._words = path, words
        with reading(path):
            self._reader = BagReader(path)
            self._topics = self._reader.topics
            self._image_topic, self._depth_topic = self._choose_images(depth)
            self._slots = self._reader.slots(self._image_topic)
            self._frame_id = self._frame_of(self._image_topic)
            self._camera = self._camera_of(self._image_topic, "info")
            self._tree = self._read_tree()
            self._pose_at = self._choose_poses()
            self._depths = self._reader.slots(self._depth_topic) if self._depth_topic else []
            self._depth_stamps = [slot.stamp_ns for slot in self._depths]
            self._register = self._registration()

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._slots)

    def indices(self) -> Sequence[int]:
        return range(len(self._slots))

    def sequences(self) -> Sequence[int]:
        return recordings([0] * len(self), [slot.stamp_ns for slot in self._slots])

    def pose(self, position: int) -> Matrix | None:
        return self._pose_at(self._slots[position].stamp_ns)

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self._slots))[position]
        slot = self._slots[index]
        with reading(self._path):
            message = self._reader.message(self._image_topic, slot)
            image = (
                decode_compressed(message) if self._topics[self._image_topic] == COMPRESSED else decode_image(message)
            )
            depth_m = self._depth(slot.stamp_ns)
        return Frame(
            image=image,
            camera=self._camera,
            stamp_ns=slot.stamp_ns,
            index=index,
            name=f"{self.name}/{index:06d}",
            depth_m=depth_m,
            T_map_camera=self.pose(index),
        )

    def encoded_image(self, position: int) -> bytes | None:
        if self._topics[self._image_topic] != COMPRESSED:
            return None
        with reading(self._path):
            return recorded_jpeg(self._reader.message(self._image_topic, self._slots[position]))

    def _depth(self, stamp_ns: int) -> NDArray[np.float32] | None:
        nearest = nearest_stamp(self._depth_stamps, stamp_ns, DEPTH_TOLERANCE_NS)
        if nearest is None or self._depth_topic is None:
            return None
        message = self._reader.message(self._depth_topic, self._depths[nearest])
        return self._register(decode_depth_message(message, self._topics[self._depth_topic] == COMPRESSED))

    def _choose_images(self, depth: bool) -> tuple[str, str | None]:
        """The topics of colour and of depth images."""
        pictures = [topic for topic, kind in self._topics.items() if kind in (IMAGE, COMPRESSED)]
        depths = [topic for topic in pictures if is_depth(next(self._reader.messages(topic)))]
        colours = [topic for topic in pictures if topic not in depths]
        image = self._choose("image", "image", _without_copies(colours))
        if image is None:
            raise SourceError(
                f"The bag '{self._path}' has no images; it has {', '.join(sorted(self._topics)) or 'nothing'}."
            )
        if not depth:
            return image, None
        frame = self._frame_of(image)
        aligned = [topic for topic in depths if self._frame_of(topic) == frame]
        return image, self._choose("depth", "depth image", _without_copies(aligned or depths))

    def _choose(self, word: str, what: str, choices: Sequence[str]) -> str | None:
        """The one choice there is, or the one that the user named.

        Raises:
            SourceError: the bag does not have what is named, or several are left.
        """
        if word in self._words:
            named = self._words[word]
            if named != "tf" and named not in self._topics:
                raise SourceError(
                    f"The bag '{self._path}' has no topic {named}; it has {', '.join(sorted(self._topics))}."
                )
            return named
        if len(choices) > 1:
            listed = ", ".join(f"?{word}={choice}" for choice in choices)
            raise SourceError(f"The bag '{self._path}' has several {what}s; add one of these to its path: {listed}.")
        return choices[0] if choices else None

    def _camera_of(self, topic: str, word: str) -> Camera:
        infos = [name for name, kind in self._topics.items() if kind == CAMERA_INFO]
        beside = [name for name in infos if name.rpartition("/")[0] in _namespaces(topic)]
        chosen = self._choose(word, "camera_info", beside or infos)
        if chosen is None:
            raise SourceError(f"The bag '{self._path}' has no camera_info for {topic}.")
        try:
            return camera_from_info(
                _lower_case(next(self._reader.messages(chosen))), rectified="rect" in _last_word(topic)
            )
        except FrameError as error:
            raise SourceError(f"The bag '{self._path}': {error}") from error

    def _choose_poses(self) -> Callable[[int], Matrix | None]:
        choices = [topic for topic, kind in self._topics.items() if kind in POSE_TYPES]
        top = self._words.get("map", "").lstrip("/") or self._tree.root(self._frame_id)
        if self._tree.moves(self._frame_id, top):
            choices.append("tf")
        chosen = self._choose("pose", "source of pose", choices)
        if chosen is None:
            return lambda stamp_ns: None
        if chosen == "tf":
            return lambda stamp_ns: self._tree.at(top, self._frame_id, stamp_ns)
        stamps, poses, body = [], [], self._words.get("body", "")
        for message in self._reader.messages(chosen):
            body = body or str(getattr(message, "child_frame_id", "")) or self._frame_id
            pose = message.pose.pose if hasattr(message.pose, "pose") else message.pose
            stamps.append(stamp_ns_of(message))
            poses.append(pose_of(pose.position, pose.orientation))
        T_body_camera = self._tree.fixed(body, self._frame_id)
        if T_body_camera is None:
            raise SourceError(
                f"{chosen} tells poses of '{body}', but the bag's /tf_static does not say where '{self._frame_id}' "
                "sits on it. Name another frame with body=, or record /tf_static."
            )
        track = PoseTrack(stamps, poses)

        def at(stamp_ns: int) -> Matrix | None:
            T_map_body = track.at(stamp_ns)
            return None if T_map_body is None else T_map_body @ T_body_camera

        return at

    def _registration(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """What brings a depth image to the colour camera."""
        if self._depth_topic is None:
            return lambda depth_m: depth_m
        frame = self._frame_of(self._depth_topic)
        shape = self._camera.height, self._camera.width
        camera = self._camera if frame == self._frame_id else self._camera_of(self._depth_topic, "depth_info")
        T_color_depth = self._tree.fixed(self._frame_id, frame)
        if T_color_depth is None:
            raise SourceError(
                f"The depth of the bag '{self._path}' is in the frame '{frame}', and /tf_static does not connect it "
                f"with the images' frame '{self._frame_id}'."
            )

        def register(depth_m: NDArray[np.float32]) -> NDArray[np.float32]:
            if frame == self._frame_id and depth_m.shape == shape:
                return depth_m
            own = camera if depth_m.shape == (camera.height, camera.width) else camera.scaled_to(*depth_m.shape[::-1])
            return register_depth(depth_m, own.pinhole(), self._camera.pinhole(), T_color_depth)

        return register

    def _read_tree(self) -> TransformTree:
        tree = TransformTree()
        for topic, kind in self._topics.items():
            if kind not in (TF, "tf/msg/tfMessage"):
                continue
            for message in self._reader.messages(topic):
                for link in message.transforms:
                    T = pose_of(link.transform.translation, link.transform.rotation)
                    if topic.endswith("tf_static"):
                        tree.add_static(link.header.frame_id, link.child_frame_id, T)
                    else:
                        tree.add(link.header.frame_id, link.child_frame_id, stamp_ns_of(link), T)
        return tree

    def _frame_of(self, topic: str) -> str:
        return str(next(self._reader.messages(topic)).header.frame_id).lstrip("/")


def split_words(path: str) -> tuple[Path, dict[str, str]]:
    """Path and choices of ``PATH?word=value&word=value``.

    Raises:
        SourceError: a part is not ``word=value``.
    """
    folder, mark, text = path.partition("?")
    words = {}
    for part in text.split("&") if mark else []:
        word, equals, value = part.partition("=")
        if not (word and equals and value):
            raise SourceError(f"After a bag's path comes ?word=value&word=value; '{part}' is not of that form.")
        words[word] = value
    return Path(folder), words


def _without_copies(topics: Sequence[str]) -> list[str]:
    """Topics without those that are a compressed copy of another."""
    return [topic for topic in topics if topic.rpartition("/")[0] not in topics]


def _namespaces(topic: str) -> tuple[str, str]:
    """Where a camera_info may be: beside the topic or, of a compressed one, beside what it is a copy of."""
    beside = topic.rpartition("/")[0]
    return beside, beside.rpartition("/")[0] if _last_word(topic).startswith("compressed") else beside


def _last_word(topic: str) -> str:
    return topic.rpartition("/")[2]


def _lower_case(info: Any) -> Any:
    """A CameraInfo with the field names of ROS 2; those of ROS 1 are D, K, R and P."""
    if hasattr(info, "k"):
        return info
    names = ("width", "height", "distortion_model", "binning_x", "binning_y", "roi")
    fields = {name: getattr(info, name) for name in names}
    return SimpleNamespace(**fields, d=info.D, k=info.K, r=info.R, p=info.P)
