# SPDX-License-Identifier: Apache-2.0
"""Any rosbag2 or rosbag1 with images, and with depth and poses where it has them, as a source of frames.

Which topics are meant is found out where only one answer is possible; between two the user has to choose, with
words after the path: ``bag:PATH?image=/front/color/image_raw&pose=/odom``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.bags.reader import BagReader, reading
from kfloc_ros.bags.topics import (
    COMPRESSED,
    ODOMETRY,
    TRUTH_TOPIC,
    Option,
    Topic,
    choose_depth,
    choose_image,
    choose_info,
    choose_pose,
    is_own,
)
from kfloc_ros.bags.truth import other_times, read_poses, read_transforms
from kfloc_ros.datasets.derived import recordings
from kfloc_ros.datasets.images import register_depth
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.camera_info import camera_from_info, in_words
from kfloc_ros.messages.images import decode_compressed, decode_depth_message, decode_image, recorded_jpeg
from kfloc_ros.messages.transforms import MAX_GAP_S, NEAR_S, PoseTrack, TransformTree, nearest_stamp
from kfloc_ros.types import Frame, Matrix

LOG = logging.getLogger(__name__)
DEPTH_TOLERANCE_NS = 20_000_000
WORDS = ("image", "info", "depth", "depth_info", "pose", "tf", "map", "body", "rectified")
"""What may follow a path: topics, the namespace of the transforms, the map's frame, the frame whose pose a pose topic
tells, and whether the images are rectified (true or false)."""


class RosBag(FrameSource):
    """A recording of a camera; images are read from disk when asked for.

    Poses come from one topic (``pose=``) or from the tree of transforms (``pose=tf``), interpolated at the images'
    stamps; extrinsics come from ``/tf_static``. A PoseStamped is taken to be of the image's own frame unless
    ``body=`` names another; an Odometry is of its ``child_frame_id``. Of a recording of ``kfloc bag make`` the topics
    are known, and depth and pose belong to the image with their stamp. ``Frame.index`` counts the bag's images.

    Args:
        path: folder of a rosbag2 or a ``.bag`` file.
        words: choices by the names of ``WORDS``.
        depth: read the depth images.

    Raises:
        SourceError: no bag there, it is damaged, it lacks what is needed, or a choice is left open.
    """

    def __init__(self, path: Path, words: dict[str, str], *, depth: bool = True) -> None:
        if unknown := sorted(set(words) - set(WORDS)):
            raise SourceError(f"After a bag's path only {', '.join(WORDS)} can be given, not {', '.join(unknown)}.")
        if words.get("rectified", "true") not in ("true", "false"):
            raise SourceError(f"After a bag's path, rectified is true or false, not '{words['rectified']}'.")
        self.name = path.resolve().stem
        self._path = path
        self._reader = BagReader(path)
        with reading(path):
            topics = [topic for topic in self._reader.topics if topic.count]
            self._exact = is_own(topics)
            if self._exact:
                truth = any(topic.name == TRUTH_TOPIC for topic in topics)
                words = {"pose": TRUTH_TOPIC if truth else "none", **words}
            self._words, self._topics = words, topics
            self._image = choose_image(path, topics, words.get("image"), _option("image"), compressed=False)
            self._slots = self._reader.slots(self._image)
            if len(self._slots) < self._image.count:
                LOG.warning(
                    "'%s' is not whole: its description says %d images on %s, and %d can be read.",
                    path, self._image.count, self._image.name, len(self._slots),
                )  # fmt: skip
            self._rectified = words.get("rectified", str(self._image.is_rectified).lower()) == "true"
            self._info = choose_info(path, topics, self._image, words.get("info"), _option("info")).name
            self._camera = self._camera_of(self._image, "info", self._rectified)
            self._check_size()
            self._tree = self._read_tree()
            self._pose_at = self._choose_poses()
            self._depth = choose_depth(path, topics, self._image, words.get("depth")) if depth else None
            self._depths = self._reader.slots(self._depth) if self._depth else []
            self._depth_stamps = [slot.stamp_ns for slot in self._depths]
            self._register = self._registration()
            if self._depth:
                self._check_times(f"The depth images on {self._depth.name}", self._depth_stamps, "depth")

    def choices(self) -> dict[str, str]:
        """What is read, by the words after a path, for people: topics, and ``tf`` or ``none``."""
        return {
            "image": self._image.name + (" (rectified)" if self._rectified else ""),
            "info": self._info,
            "depth": self._depth.name if self._depth else "none",
            "pose": self._poses,
        }

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

    def stamp_ns(self, position: int) -> int:
        return self._slots[position].stamp_ns

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self._slots))[position]
        slot = self._slots[index]
        with reading(self._path):
            message = self._reader.message(self._image, slot)
            try:
                image = self._rgb(message)
                if fault := self._size_fault(image):
                    raise FrameError(fault)
                depth_m = self._depth_at(slot.stamp_ns)
            except FrameError as error:
                raise FrameError(f"Image {index} of the bag '{self._path}' cannot be used: {error}") from error
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
        if self._image.kind != COMPRESSED:
            return None
        with reading(self._path):
            return recorded_jpeg(self._reader.message(self._image, self._slots[position]))

    def _rgb(self, message: Any) -> NDArray[np.uint8]:
        return decode_compressed(message) if self._image.kind == COMPRESSED else decode_image(message)

    def _size_fault(self, image: NDArray[np.uint8]) -> str:
        """Sentence that says that an image is not of the size that its calibration is for, or empty."""
        camera, (height, width) = self._camera, image.shape[:2]
        if (width, height) == (camera.width, camera.height):
            return ""
        return f"It is {width}x{height}, its camera_info {camera.width}x{camera.height}; name its own with ?info=."

    def _depth_at(self, stamp_ns: int) -> NDArray[np.float32] | None:
        nearest = nearest_stamp(self._depth_stamps, stamp_ns, 0 if self._exact else DEPTH_TOLERANCE_NS)
        if nearest is None or self._depth is None:
            return None
        message = self._reader.message(self._depth, self._depths[nearest])
        return self._register(decode_depth_message(message, self._depth.kind == COMPRESSED))

    def _camera_of(self, images: Topic, word: str, rectified: bool) -> Camera:
        chosen = choose_info(self._path, self._topics, images, self._words.get(word), _option(word))
        camera: Camera | None = None
        fault: FrameError | None = None
        seen: set[bytes] = set()
        for record in self._reader.records((chosen.name, chosen.kind)):
            said = record.data[self._reader.header(record).end :]
            if said in seen:
                continue
            seen.add(said)
            try:
                found = camera_from_info(_lower_case(self._reader.decode(record)), rectified=rectified)
            except FrameError as error:  # such as all zero, before the driver has loaded its calibration
                fault = fault or error
                continue
            camera = camera or found  # of those that autofocus moves, the first one counts
            if camera.is_other(found):
                at_s = 1e-9 * (record.logged_ns - self._reader.start_ns)
                raise SourceError(
                    f"The camera of '{self._path}' changes: {chosen.name} says {in_words(camera)}, and {at_s:.1f} s "
                    f"after the bag's start {in_words(found)}. Did its zoom change, or its driver load a calibration "
                    "late? Cut the bag where it changes (`ros2 bag convert`), and use one part."
                )
        if camera is None:
            raise SourceError(f"The bag '{self._path}': {fault or f'{chosen.name} has no message.'}") from fault
        return camera

    def _check_size(self) -> None:
        with contextlib.suppress(FrameError):
            fault = self._size_fault(self._rgb(self._reader.message(self._image, self._slots[0])))
            if fault:
                raise SourceError(f"The first image of '{self._path}' does not fit its calibration. {fault}")

    def _check_times(self, what: str, stamps_ns: Iterable[int], word: str) -> None:
        if clocks := other_times(what, stamps_ns, (slot.stamp_ns for slot in self._slots)):
            raise SourceError(f"In '{self._path}', {clocks[0].lower()}{clocks[1:]} Without them: ?{word}=none.")

    def _read_tree(self) -> TransformTree:
        transforms = read_transforms(self._reader, self._image, self._words.get("tf"), _option("tf")).check(self._path)
        parents: dict[str, str] = {}
        for edge in (edge for event in transforms.moving for edge in event.edges):
            if parents.setdefault(edge.child, edge.parent) != edge.parent:
                raise SourceError(
                    f"In the bag's /tf the frame '{edge.child}' has two parents, '{parents[edge.child]}' and "
                    f"'{edge.parent}'."
                )
        self._tf_stamps = [edge.stamp_ns for event in transforms.moving for edge in event.edges]
        return transforms.tree(max_gap_s=MAX_GAP_S, near_s=NEAR_S)

    def _choose_poses(self) -> Callable[[int], Matrix | None]:
        camera = self._image.frame_id
        top = self._words.get("map", "").lstrip("/") or self._tree.root(camera)
        with_tf = self._tree.moves(camera, top)
        chosen = choose_pose(self._path, self._topics, self._words.get("pose"), with_tf=with_tf)
        self._poses = chosen.name if isinstance(chosen, Topic) else chosen or "none"
        if chosen is None:
            return lambda stamp_ns: None
        if not isinstance(chosen, Topic):
            self._check_times("The transforms", self._tf_stamps, "pose")
            return lambda stamp_ns: self._tree.find(top, camera, stamp_ns)
        recorded = read_poses(self._reader, chosen)
        self._check_times(f"The poses on {chosen.name}", recorded.poses, "pose")
        if recorded.unusable:
            LOG.warning(
                "%d of %d poses on %s of '%s' are left out: they are not finite or no rotation.",
                recorded.unusable, chosen.count, chosen.name, self._path,
            )  # fmt: skip
        body = self._words.get("body") or recorded.body
        if not body and chosen.kind == ODOMETRY:
            raise SourceError(
                f"The Odometry on {chosen.name} does not say whose poses it tells: its child_frame_id is empty. Name "
                "the frame, such as base_link, with ?body=."
            )
        body = body or camera
        T_body_camera = self._tree.fixed(body, camera)
        if T_body_camera is None:
            raise SourceError(
                f"{chosen.name} tells poses of '{body}', but the bag's /tf_static does not say where '{camera}' "
                "sits on it. Name another frame with body=, or record /tf_static."
            )
        limits = {"max_gap_s": 0.0, "near_s": 0.0} if self._exact else {}
        track = PoseTrack(list(recorded.poses), list(recorded.poses.values()), **limits)

        def at(stamp_ns: int) -> Matrix | None:
            T_map_body = track.at(stamp_ns)
            return None if T_map_body is None else T_map_body @ T_body_camera

        return at

    def _registration(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """What brings a depth image to the colour camera."""
        if self._depth is None:
            return lambda depth_m: depth_m
        aligned = self._depth.frame_id == self._image.frame_id
        shape = self._camera.height, self._camera.width
        camera = self._camera if aligned else self._camera_of(self._depth, "depth_info", self._depth.is_rectified)
        T_color_depth = self._tree.fixed(self._image.frame_id, self._depth.frame_id)
        if T_color_depth is None:
            raise SourceError(
                f"The depth of the bag '{self._path}' is in the frame '{self._depth.frame_id}', and /tf_static does "
                f"not connect it with the images' frame '{self._image.frame_id}'. Without depth: ?depth=none."
            )

        def register(depth_m: NDArray[np.float32]) -> NDArray[np.float32]:
            if aligned and depth_m.shape == shape:
                return depth_m
            own = camera if depth_m.shape == (camera.height, camera.width) else camera.scaled_to(*depth_m.shape[::-1])
            return register_depth(depth_m, own, self._camera, T_color_depth)

        return register


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


def _option(word: str) -> Option:
    """Texts that choose a topic by a word after the path."""
    return f"?{word}={{}}".format


def _lower_case(info: Any) -> Any:
    """A CameraInfo with the field names of ROS 2; those of ROS 1 are D, K, R and P."""
    if hasattr(info, "k"):
        return info
    names = ("width", "height", "distortion_model", "binning_x", "binning_y", "roi")
    fields = {name: getattr(info, name) for name in names}
    return SimpleNamespace(**fields, d=info.D, k=info.K, r=info.R, p=info.P)
