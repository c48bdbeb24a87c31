# SPDX-License-Identifier: Apache-2.0
"""Reads what a replay plays from a rosbag2: images and camera_info as raw bytes, and the truth. Needs no ROS."""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag2 import ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.topics import IMAGE_TOPIC, TRUTH_TOPIC
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix
from kfloc_ros.nodes.image_messages import decode_compressed, decode_image
from kfloc_ros.types import Matrix

COMPRESSED = "sensor_msgs/msg/CompressedImage"
RAW = "sensor_msgs/msg/Image"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
POSE = "geometry_msgs/msg/PoseStamped"


@dataclass(frozen=True)
class BagEvent:
    """One recorded message as the bag holds it."""

    log_ns: int
    """When it was recorded."""
    stamp_ns: int
    """Its header stamp."""
    is_image: bool
    data: bytes
    """CDR serialisation."""


@dataclass(frozen=True)
class ReplayRange:
    """The part of a bag to play, in seconds from its first message."""

    start_s: float = 0.0
    duration_s: float | None = None

    def holds(self, offset_ns: int) -> bool:
        """Whether a message this long after the start of the bag is played."""
        after_start = offset_ns - self.start_s * 1e9
        return after_start >= 0 and (self.duration_s is None or after_start < self.duration_s * 1e9)


class BagStream:
    """An open bag; use it as a context.

    Raises:
        SourceError: no readable bag there, or its image or camera_info topic is missing or ambiguous.
    """

    def __init__(self, path: Path, *, image_topic: str | None = None) -> None:
        if not path.exists():
            raise SourceError(f"There is no bag '{path}'.")
        self.path = path
        with self._reading():
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()
        try:
            self._image = self._pick_image(image_topic)
            self._info = self._pick(CAMERA_INFO, self._image.topic.removesuffix("/compressed").rpartition("/")[0])
        except SourceError:
            self._reader.close()
            raise
        self._truth = [c for c in self._reader.connections if c.msgtype == POSE]

    def __enter__(self) -> BagStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    @property
    def transport(self) -> str:
        """``compressed`` or ``raw``: the ``image_transport`` that the nodes need."""
        return "compressed" if self._image.msgtype == COMPRESSED else "raw"

    def events(self, part: ReplayRange) -> Iterator[BagEvent]:
        """Images and camera_info of the part, in recorded order.

        The last camera_info before the part comes first, so that a bag with a single one can be
        entered in its middle.
        """
        skipped_info: BagEvent | None = None
        first_ns = self._reader.start_time
        for connection, log_ns, data in self._messages(self._image, self._info):
            event = self._event(connection, log_ns, data)
            if part.holds(log_ns - first_ns):
                if skipped_info is not None:
                    yield BagEvent(log_ns, skipped_info.stamp_ns, False, skipped_info.data)
                    skipped_info = None
                yield event
            elif log_ns - first_ns < part.start_s * 1e9 and not event.is_image:
                skipped_info = event

    def image_count(self, part: ReplayRange) -> int:
        """How many images the part has."""
        first_ns = self._reader.start_time
        return sum(part.holds(log_ns - first_ns) for _, log_ns, _ in self._messages(self._image))

    def positions(self) -> dict[int, int]:
        """Number in the bag of every image, by header stamp in nanoseconds."""
        return {_header_stamp_ns(data): number for number, (_, _, data) in enumerate(self._messages(self._image))}

    def images(self, stamps_ns: Collection[int]) -> dict[int, NDArray[np.uint8]]:
        """RGB images (H, W, 3) by stamp; one that cannot be decoded is left out."""
        decode = decode_compressed if self.transport == "compressed" else decode_image
        found: dict[int, NDArray[np.uint8]] = {}
        for _, _, data in self._messages(self._image):
            stamp_ns = _header_stamp_ns(data)
            if stamp_ns in stamps_ns:
                with contextlib.suppress(FrameError):
                    found[stamp_ns] = decode(self._reader.deserialize(data, self._image.msgtype))
        return found

    def recorded(self, topic: str, kinds: Collection[str], *, must: bool = True) -> Iterator[Any]:
        """The messages of a topic, in recorded order.

        Raises:
            SourceError: there is no topic of that name and one of those types, unless ``must`` is False.
        """
        found = [c for c in self._reader.connections if c.topic == topic and c.msgtype in kinds]
        if not found and must:
            raise SourceError(f"'{self.path}' has no topic '{topic}' with poses; it has {self._topics()}.")
        for connection, _, data in self._messages(*found) if found else ():
            yield self._reader.deserialize(data, connection.msgtype)

    def truth(self) -> dict[int, Matrix]:
        """``T_map_camera`` by stamp in nanoseconds, from the bag's PoseStamped topic; empty without one.

        Raises:
            SourceError: there are several such topics.
        """
        if not self._truth:
            return {}
        connection = self._pick(POSE, TRUTH_TOPIC.rpartition("/")[0])
        poses: dict[int, Matrix] = {}
        for _, _, data in self._messages(connection):
            message: Any = self._reader.deserialize(data, POSE)
            p, q = message.pose.position, message.pose.orientation
            rotation = quaternion_to_matrix([q.x, q.y, q.z, q.w])
            poses[_stamp_ns(message.header.stamp)] = make_pose(rotation, [p.x, p.y, p.z])
        return poses

    def _messages(self, *connections: Any) -> Iterator[tuple[Any, int, bytes]]:
        with self._reading():
            for connection, log_ns, data in self._reader.messages(list(connections)):
                yield connection, log_ns, bytes(data)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Everything that a damaged bag can make the reader raise, as a sentence."""
        try:
            yield
        except (AnyReaderError, ReaderError, SerdeError, OSError, EOFError, sqlite3.Error, struct.error) as error:
            raise SourceError(f"'{self.path}' is not a rosbag2 or is damaged: {str(error).rstrip('.')}.") from error
        except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise SourceError(f"'{self.path}' is damaged: {kind} while reading it ({error}).") from error

    def _event(self, connection: Any, log_ns: int, data: bytes) -> BagEvent:
        return BagEvent(log_ns, _header_stamp_ns(data), connection.id == self._image.id, data)

    def _pick_image(self, topic: str | None) -> Any:
        if topic is not None:
            for connection in self._reader.connections:
                if connection.topic == topic and connection.msgtype in (COMPRESSED, RAW):
                    return connection
            raise SourceError(f"'{self.path}' has no image topic '{topic}'; it has {self._topics()}.")
        kinds = {connection.topic: connection.msgtype for connection in self._reader.connections}
        if kinds.get(IMAGE_TOPIC) == COMPRESSED:  # a bag of our own, which also has compressed depth
            return self._pick_image(IMAGE_TOPIC)
        return self._pick(COMPRESSED if COMPRESSED in kinds.values() else RAW, "")

    def _pick(self, kind: str, near: str) -> Any:
        """The one connection of a type; with several topics, the one in the namespace ``near``."""
        found = [connection for connection in self._reader.connections if connection.msgtype == kind]
        topics = {connection.topic for connection in found}
        if len(topics) > 1 and near:
            found = [connection for connection in found if connection.topic.rpartition("/")[0] == near]
        if len({connection.topic for connection in found}) == 1:
            return found[0]
        how = "several topics" if topics else "no topic"
        raise SourceError(f"'{self.path}' has {how} of type {kind}; it has {self._topics()}.")

    def _topics(self) -> str:
        return ", ".join(sorted(f"{c.topic} ({c.msgtype})" for c in self._reader.connections)) or "no topics"


def _stamp_ns(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def _header_stamp_ns(cdr: bytes) -> int:
    """Stamp of a serialised message that begins with a std_msgs/Header: two 32-bit numbers after the CDR header."""
    seconds, nanoseconds = struct.unpack_from("<iI" if cdr[1] & 1 else ">iI", cdr, 4)
    return int(seconds) * 10**9 + int(nanoseconds)
