# SPDX-License-Identifier: Apache-2.0
"""Reads what a replay plays from a rosbag2: images and camera_info as raw bytes, and the truth. Needs no ROS."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.bags.reader import BagFile
from kfloc_ros.bags.topics import COMPRESSED, POSE, Topic, choose_image, choose_info, choose_truth, is_rectified
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix
from kfloc_ros.messages.images import decode_compressed, decode_image
from kfloc_ros.types import Matrix


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


class BagStream(BagFile):
    """An open bag of which one camera is played; use it as a context.

    Args:
        path: folder of a rosbag2.
        image_topic: which images; needed where the bag has several cameras.
        info_topic: which camera_info; needed where it does not follow from the images.

    Raises:
        SourceError: no readable bag there, or its image or camera_info topic is missing or ambiguous.
    """

    def __init__(self, path: Path, *, image_topic: str | None = None, info_topic: str | None = None) -> None:
        super().__init__(path)
        try:
            self.image = choose_image(path, self.topics, image_topic)
            self.info = choose_info(path, self.topics, self.image, info_topic)
        except SourceError:
            self._reader.close()
            raise
        self._image, self._info = self._connections(self.image)[0], self._connections(self.info)[0]

    @property
    def transport(self) -> str:
        """``compressed`` or ``raw``: the ``image_transport`` that the nodes need."""
        return "compressed" if self.image.kind == COMPRESSED else "raw"

    @property
    def rectified(self) -> bool:
        """Whether the images are rectified already, by the name of their topic."""
        return is_rectified(self.image)

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

    def timed(self, topic: str, kinds: Collection[str]) -> Iterator[tuple[int, Any]]:
        """How long after the bag's start each message of a topic was recorded, in nanoseconds, and the message."""
        first_ns = self._reader.start_time
        found = [c for c in self._reader.connections if c.topic == topic and c.msgtype in kinds]
        for connection, log_ns, data in self._messages(*found) if found else ():
            with self._reading():
                message = self._reader.deserialize(data, connection.msgtype)
            yield log_ns - first_ns, message

    def image_count(self, part: ReplayRange) -> int:
        """How many images the part has."""
        first_ns = self._reader.start_time
        return sum(part.holds(log_ns - first_ns) for _, log_ns, _ in self._messages(self._image))

    def positions(self) -> dict[int, int]:
        """Number in the bag of every image, by header stamp in nanoseconds."""
        return {_header_stamp_ns(data): number for number, (_, _, data) in enumerate(self._messages(self._image))}

    def message(self, event: BagEvent) -> Any:
        """An event's message, deserialised."""
        with self._reading():
            return self._reader.deserialize(event.data, (self.image if event.is_image else self.info).kind)

    def decode(self, message: Any) -> NDArray[np.uint8]:
        """RGB image (H, W, 3) of one of the played messages. Raises FrameError if it is none."""
        return decode_compressed(message) if self.transport == "compressed" else decode_image(message)

    def images(self, stamps_ns: Collection[int]) -> dict[int, NDArray[np.uint8]]:
        """RGB images (H, W, 3) by stamp; one that cannot be decoded is left out."""
        found: dict[int, NDArray[np.uint8]] = {}
        for _, log_ns, data in self._messages(self._image):
            stamp_ns = _header_stamp_ns(data)
            if stamp_ns in stamps_ns:
                with contextlib.suppress(FrameError):
                    found[stamp_ns] = self.decode(self.message(BagEvent(log_ns, stamp_ns, True, data)))
        return found

    def truth_topic(self) -> Topic | None:
        """Where :meth:`truth` is from, or None. Raises SourceError if there are several candidates."""
        return choose_truth(self.path, self.topics)

    def truth(self) -> dict[int, Matrix]:
        """``T_map_camera`` by stamp in nanoseconds, from the bag's PoseStamped topic; empty without one.

        Raises:
            SourceError: there are several such topics.
        """
        topic = self.truth_topic()
        poses: dict[int, Matrix] = {}
        for message in self.recorded(topic.name, (POSE,)) if topic is not None else ():
            p, q = message.pose.position, message.pose.orientation
            rotation = quaternion_to_matrix([q.x, q.y, q.z, q.w])
            poses[_stamp_ns(message.header.stamp)] = make_pose(rotation, [p.x, p.y, p.z])
        return poses

    def _event(self, connection: Any, log_ns: int, data: bytes) -> BagEvent:
        return BagEvent(log_ns, _header_stamp_ns(data), connection.id == self._image.id, data)


def _stamp_ns(stamp: Any) -> int:
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def _header_stamp_ns(cdr: bytes) -> int:
    """Stamp of a serialised message that begins with a std_msgs/Header: two 32-bit numbers after the CDR header."""
    seconds, nanoseconds = struct.unpack_from("<iI" if cdr[1] & 1 else ">iI", cdr, 4)
    return int(seconds) * 10**9 + int(nanoseconds)
