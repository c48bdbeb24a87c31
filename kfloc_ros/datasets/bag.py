# SPDX-License-Identifier: Apache-2.0
"""Rosbag2 folders (mcap or sqlite3) with the topics of :mod:`kfloc_ros.bags.topics` as a source of frames."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kfloc_ros.bags.messages import MessageCodec, decode_depth, decode_jpeg, pose_of, stamp_ns_of
from kfloc_ros.bags.topics import CAMERA_INFO_TOPIC, DEPTH_TOPIC, IMAGE_TOPIC, TOPIC_TYPES, TRUTH_TOPIC
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.nodes.camera_messages import camera_from_info  # imports nothing of ROS
from kfloc_ros.types import Frame, Matrix


class _Slot(NamedTuple):
    """Where an image is: its own stamp and the time under which the bag files it."""

    stamp_ns: int
    logged_ns: int


class BagSource(FrameSource):
    """A recording as ``kfloc bag make`` writes it; images are read from disk when asked for.

    Depth and truth belong to the image with the same stamp. ``Frame.index`` counts the bag's images.

    Args:
        path: the bag's folder.
        depth: read the depth images.

    Raises:
        SourceError: no bag there, it is damaged, or it lacks images or a usable camera_info.
    """

    def __init__(self, path: Path, *, depth: bool = True) -> None:
        # Imported here, so that `kfloc --help` and other sources do not wait for it.
        from rosbags.rosbag2 import Reader

        if not (path / "metadata.yaml").is_file():
            raise SourceError(f"'{path}' is not a rosbag2 folder: it has no metadata.yaml.")
        self.name = path.resolve().name
        self._path = path
        self._codec = MessageCodec()
        with self._reading():
            self._reader = Reader(path)
            self._reader.open()
            self._connections = {
                topic: [c for c in self._reader.connections if c.topic == topic and c.msgtype == message_type]
                for topic, message_type in TOPIC_TYPES.items()
            }
            self._camera = self._read_camera()
            self._slots = self._scan(IMAGE_TOPIC)
            self._depths = {slot.stamp_ns: slot for slot in self._scan(DEPTH_TOPIC)} if depth else {}
            self._truth = self._read_truth()
        if not self._slots:
            raise SourceError(f"The bag '{path}' has no {TOPIC_TYPES[IMAGE_TOPIC]} on {IMAGE_TOPIC}.")

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._slots)

    def indices(self) -> Sequence[int]:
        return range(len(self._slots))

    def __getitem__(self, position: int) -> Frame:
        slot = self._slots[position]
        with self._reading():
            image = decode_jpeg(self._message(IMAGE_TOPIC, slot).data)
            depth_slot = self._depths.get(slot.stamp_ns)
            depth_m = decode_depth(self._message(DEPTH_TOPIC, depth_slot).data) if depth_slot else None
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
            T_map_camera=self._truth.get(slot.stamp_ns),
        )

    def encoded_image(self, position: int) -> bytes | None:
        with self._reading():
            message = self._message(IMAGE_TOPIC, self._slots[position])
        return bytes(message.data) if "png" not in message.format else None

    def _message(self, topic: str, slot: _Slot) -> Any:
        for message, _ in self._messages(topic, slot.logged_ns, slot.logged_ns + 1):
            if stamp_ns_of(message) == slot.stamp_ns:
                return message
        raise SourceError(f"The bag '{self._path}' changed while it was read: a message on {topic} is gone.")

    def _messages(self, topic: str, start: int | None = None, stop: int | None = None) -> Iterator[tuple[Any, int]]:
        connections = self._connections[topic]
        if not connections:  # an empty list would mean all topics
            return
        for connection, logged_ns, data in self._reader.messages(connections, start, stop):
            yield self._codec.decode(data, connection.msgtype), logged_ns

    def _scan(self, topic: str) -> list[_Slot]:
        slots = [_Slot(stamp_ns_of(message), logged_ns) for message, logged_ns in self._messages(topic)]
        return sorted(slots)

    def _read_camera(self) -> Camera:
        for message, _ in self._messages(CAMERA_INFO_TOPIC):
            try:
                return camera_from_info(message)
            except FrameError as error:
                raise SourceError(f"The bag '{self._path}': {error}") from error
        raise SourceError(f"The bag '{self._path}' has no {TOPIC_TYPES[CAMERA_INFO_TOPIC]} on {CAMERA_INFO_TOPIC}.")

    def _read_truth(self) -> dict[int, Matrix]:
        return {stamp_ns_of(message): pose_of(message) for message, _ in self._messages(TRUTH_TOPIC)}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Everything that a damaged bag can make the reader raise, as a sentence."""
        from rosbags.rosbag2 import ReaderError
        from rosbags.serde import SerdeError

        try:
            yield
        except (ReaderError, SerdeError, sqlite3.Error, struct.error, EOFError, AssertionError, TypeError) as error:
            raise SourceError(f"The bag '{self._path}' is damaged or of an unknown kind: {error}") from error
        except (KeyError, IndexError, ValueError, UnicodeDecodeError) as error:
            raise SourceError(
                f"The bag '{self._path}' is damaged: {type(error).__name__} while reading it ({error})."
            ) from error


def is_own_bag(path: Path) -> bool:
    """Whether a rosbag2's description names the topics that ``kfloc bag make`` writes, or is too damaged to tell."""
    if path.suffix == ".bag":
        return False
    try:
        text = (path / "metadata.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    return IMAGE_TOPIC in text or "topic_metadata" not in text
