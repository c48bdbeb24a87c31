# SPDX-License-Identifier: Apache-2.0
"""An open rosbag2: its topics and frames, and its messages as they were recorded. Needs no ROS."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag2 import ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.topics import IMAGE_TYPES, TF_TYPE, Link, Topic
from kfloc_ros.bags.writer import stamp_ns_of
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.messages.images import is_depth


class BagFile:
    """An open bag; use it as a context.

    Raises:
        SourceError: no readable rosbag2 there.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SourceError(f"There is no bag '{path}'.")
        if path.suffix == ".bag" and path.is_file():
            raise SourceError(
                f"'{path}' is a rosbag1, which ROS 2 nodes cannot be played. `kfloc localize bag:{path}` reads it; "
                f"`rosbags-convert --src {path} --dst {path.with_suffix('')}` makes a rosbag2 of it."
            )
        self.path = path
        with self._reading():
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    @property
    def start_ns(self) -> int:
        """When the first message was recorded."""
        return int(self._reader.start_time)

    @property
    def duration_s(self) -> float:
        """From the first message to the last."""
        return self._reader.duration * 1e-9 if self._reader.message_count else 0.0

    @cached_property
    def topics(self) -> tuple[Topic, ...]:
        """Every topic, by name; what only a message tells is read from the first one."""
        found = {c.topic: self._topic(c) for c in sorted(self._reader.connections, key=lambda c: c.topic)}
        return tuple(found.values())

    def links(self) -> tuple[Link, ...]:
        """Every pair of frames on ``/tf`` and ``/tf_static``, in the order in which they are first met."""
        found: dict[Link, None] = {}
        for topic in ("/tf_static", "/tf"):
            for message in self.recorded(topic, (TF_TYPE,), must=False):
                for item in message.transforms:
                    parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
                    found[Link(parent, child, static=topic == "/tf_static")] = None
        return tuple(found)

    def recorded(self, topic: str, kinds: Collection[str], *, must: bool = True) -> Iterator[Any]:
        """The messages of a topic, in recorded order.

        Raises:
            SourceError: there is no topic of that name and one of those types, unless ``must`` is False.
        """
        found = [c for c in self._reader.connections if c.topic == topic and c.msgtype in kinds]
        if not found and must:
            there = ", ".join(f"{t.name} ({t.kind})" for t in self.topics if t.kind in kinds) or "none of those types"
            raise SourceError(f"'{self.path}' has no topic '{topic}' with poses; it has {there}.")
        for connection, _, data in self._messages(*found) if found else ():
            yield self._reader.deserialize(data, connection.msgtype)

    def _topic(self, connection: Any) -> Topic:
        topic = Topic(connection.topic, connection.msgtype, connection.msgcount)
        if not connection.msgcount or not connection.msgtype.startswith(
            ("sensor_msgs/", "geometry_msgs/", "nav_msgs/")
        ):
            return topic
        with self._reading():
            _, _, data = next(self._messages(connection))
            message = self._reader.deserialize(data, connection.msgtype)
        header = getattr(message, "header", None)
        return Topic(
            topic.name,
            topic.kind,
            topic.count,
            frame_id="" if header is None else str(header.frame_id).lstrip("/"),
            child_frame_id=str(getattr(message, "child_frame_id", "")).lstrip("/"),
            is_depth=topic.kind in IMAGE_TYPES and is_depth(message),
        )

    def _connections(self, topic: Topic) -> list[Any]:
        return [c for c in self._reader.connections if c.topic == topic.name and c.msgtype == topic.kind]

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


_JPEG_START = b"\xff\xd8"


class Slot(NamedTuple):
    """Where a message is: its own stamp and the time under which the bag files it."""

    stamp_ns: int
    logged_ns: int


class BagReader:
    """An open bag; its messages are read from disk when asked for.

    Everything that a damaged bag makes the reader raise becomes a SourceError inside ``with reading(path)``.

    Args:
        path: folder of a rosbag2 or a ``.bag`` file.
    """

    def __init__(self, path: Path) -> None:
        # Imported here, so that `kfloc --help` and other sources do not wait for it.
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore

        self._path = path
        self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
        self._reader.open()
        self.topics: Mapping[str, str] = {c.topic: c.msgtype for c in self._reader.connections if c.msgcount}
        """Type of the messages of each topic that has some."""

    def messages(self, topic: str, start_ns: int | None = None, stop_ns: int | None = None) -> Iterator[Any]:
        """Messages of a topic that the bag files under a time from ``start_ns`` to before ``stop_ns``.

        Raises:
            SourceError: the bag does not have the topic.
        """
        for message, _ in self._filed(topic, start_ns, stop_ns):
            yield message

    def slots(self, topic: str) -> list[Slot]:
        """Where the messages of a topic are, in the order of their stamps."""
        return sorted(Slot(stamp_ns_of(message), logged_ns) for message, logged_ns in self._filed(topic))

    def message(self, topic: str, slot: Slot) -> Any:
        """The message of a topic that is there.

        Raises:
            SourceError: it no longer is.
        """
        for message in self.messages(topic, slot.logged_ns, slot.logged_ns + 1):
            if stamp_ns_of(message) == slot.stamp_ns:
                return message
        raise SourceError(f"The bag '{self._path}' changed while it was read: a message on {topic} is gone.")

    def _filed(self, topic: str, start_ns: int | None = None, stop_ns: int | None = None) -> Iterator[tuple[Any, int]]:
        connections = [c for c in self._reader.connections if c.topic == topic]
        if not connections:  # an empty list would mean all topics
            raise SourceError(f"The bag '{self._path}' has no topic {topic}.")
        for connection, logged_ns, data in self._reader.messages(connections, start_ns, stop_ns):
            yield self._reader.deserialize(data, connection.msgtype), logged_ns


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What reading a damaged bag raises, as a SourceError; other errors of this package pass."""
    from rosbags.highlevel import AnyReaderError
    from rosbags.rosbag1 import ReaderError as ReaderError1
    from rosbags.rosbag2 import ReaderError as ReaderError2
    from rosbags.serde import SerdeError
    from rosbags.typesys import TypesysError

    own = (AnyReaderError, ReaderError1, ReaderError2, SerdeError, TypesysError, sqlite3.Error, struct.error)
    plain = (
        ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, StopIteration,
        TypeError, ValueError,
    )  # fmt: skip
    try:
        yield
    except KflocError:
        raise
    except own as error:
        raise SourceError(f"The bag '{path}' is damaged or of an unknown kind: {error}") from error
    except plain as error:
        raise SourceError(f"The bag '{path}' is damaged: {type(error).__name__} while reading it ({error}).") from error


def recorded_jpeg(message: Any) -> bytes | None:
    """The data of a ``CompressedImage`` if that is a JPEG."""
    data = bytes(message.data)
    return data if data.startswith(_JPEG_START) else None
