# SPDX-License-Identifier: Apache-2.0
"""Messages of a rosbag2 or rosbag1 by topic, found again where they are; whatever is damaged is told in a sentence."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kfloc_ros.bags.messages import stamp_ns_of
from kfloc_ros.errors import KflocError, SourceError

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
