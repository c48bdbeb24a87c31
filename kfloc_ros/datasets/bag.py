# SPDX-License-Identifier: Apache-2.0
"""Rosbag2 folders (mcap or sqlite3) with the topics of :mod:`kfloc_ros.bags.topics` as a source of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kfloc_ros.bags.reader import BagReader, reading, recorded_jpeg
from kfloc_ros.bags.topics import CAMERA_INFO_TOPIC, DEPTH_TOPIC, IMAGE_TOPIC, TOPIC_TYPES, TRUTH_TOPIC
from kfloc_ros.bags.writer import decode_depth, decode_jpeg, pose_of, stamp_ns_of
from kfloc_ros.datasets.derived import recordings
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.camera_info import camera_from_info
from kfloc_ros.types import Frame, Matrix


class BagSource(FrameSource):
    """A recording as ``kfloc bag make`` writes it; images are read from disk when asked for.

    Unlike those of other bags (:class:`kfloc_ros.datasets.ros_bag.RosBag`) its topics are known, and depth and truth
    belong to the image with the same stamp. ``Frame.index`` counts the bag's images.

    Args:
        path: the bag's folder.
        depth: read the depth images.

    Raises:
        SourceError: no bag there, it is damaged, or it lacks images or a usable camera_info.
    """

    def __init__(self, path: Path, *, depth: bool = True) -> None:
        if not (path / "metadata.yaml").is_file():
            raise SourceError(f"'{path}' is not a rosbag2 folder: it has no metadata.yaml.")
        self.name = path.resolve().name
        self._path = path
        with reading(path):
            self._reader = BagReader(path)
            self._camera = self._read_camera()
            self._slots = self._reader.slots(self._need(IMAGE_TOPIC))
            has_depth = depth and self._has(DEPTH_TOPIC)
            self._depths = {slot.stamp_ns: slot for slot in self._reader.slots(DEPTH_TOPIC)} if has_depth else {}
            self._truth = self._read_truth()

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._slots)

    def indices(self) -> Sequence[int]:
        return range(len(self._slots))

    def sequences(self) -> Sequence[int]:
        return recordings([0] * len(self), [slot.stamp_ns for slot in self._slots])

    def __getitem__(self, position: int) -> Frame:
        slot = self._slots[position]
        with reading(self._path):
            image = decode_jpeg(self._reader.message(IMAGE_TOPIC, slot).data)
            depth_slot = self._depths.get(slot.stamp_ns)
            depth_m = decode_depth(self._reader.message(DEPTH_TOPIC, depth_slot).data) if depth_slot else None
        index = range(len(self._slots))[position]
        if image is None:
            raise SourceError(f"Image {index} of the bag '{self._path}' cannot be decoded.")
        if depth_slot and depth_m is None:
            raise SourceError(f"The depth of image {index} of the bag '{self._path}' is not a 16-bit PNG.")
        return Frame(
            image=image,
            camera=self._camera,
            stamp_ns=slot.stamp_ns,
            index=index,
            name=f"{self.name}/{index:06d}",
            depth_m=depth_m,
            T_map_camera=self.pose(position),
        )

    def encoded_image(self, position: int) -> bytes | None:
        with reading(self._path):
            return recorded_jpeg(self._reader.message(IMAGE_TOPIC, self._slots[position]))

    def pose(self, position: int) -> Matrix | None:
        return self._truth.get(self._slots[position].stamp_ns)

    def _has(self, topic: str) -> bool:
        return self._reader.topics.get(topic) == TOPIC_TYPES[topic]

    def _need(self, topic: str) -> str:
        if not self._has(topic):
            raise SourceError(f"The bag '{self._path}' has no {TOPIC_TYPES[topic]} on {topic}.")
        return topic

    def _read_camera(self) -> Camera:
        try:
            return camera_from_info(next(self._reader.messages(self._need(CAMERA_INFO_TOPIC))))
        except FrameError as error:
            raise SourceError(f"The bag '{self._path}': {error}") from error

    def _read_truth(self) -> dict[int, Matrix]:
        if not self._has(TRUTH_TOPIC):
            return {}
        poses = self._reader.messages(TRUTH_TOPIC)
        return {stamp_ns_of(m): pose_of(m.pose.position, m.pose.orientation) for m in poses}


def is_own_bag(path: Path) -> bool:
    """Whether a rosbag2's description names the topics that ``kfloc bag make`` writes, or is too damaged to tell."""
    if path.suffix == ".bag":
        return False
    try:
        text = (path / "metadata.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    return IMAGE_TOPIC in text or "topic_metadata" not in text
