# SPDX-License-Identifier: Apache-2.0
"""An open bag: its topics and frames, and its messages as they were recorded. Needs no ROS."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple, Self

from lz4.frame import LZ4FrameDecompressor  # type: ignore[import-untyped]  # rosbags needs it
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import reader as rosbag2_reader
from rosbags.rosbag2 import storage_mcap
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.topics import IMAGE_TYPES, TF_TYPES, Link, Topic
from kfloc_ros.errors import FrameError, KflocError, SourceError
from kfloc_ros.files import FREE_BYTES, MAX_RATIO, open_plain
from kfloc_ros.messages.images import is_depth
from kfloc_ros.messages.poses import Header, serialized_header

zstd = storage_mcap.zstd
_DESCRIBED = ("sensor_msgs/", "geometry_msgs/", "nav_msgs/")
"""Packages of messages that begin with a header."""
_ENDINGS = (".mcap", ".db3", ".bag")
_MCAP = b"\x89MCAP0\r\n"
"""Begin and end of every whole MCAP file."""
MAX_METADATA_BYTES = 500_000
"""Of a bag's metadata.yaml; that of three hundred topics has half of it, and its reader takes seconds for it."""


class Record(NamedTuple):
    """One message as the bag holds it."""

    topic: str
    kind: str
    """Message type."""
    logged_ns: int
    """When it was recorded, which is where the bag files it."""
    data: bytes
    """CDR, or ROS 1's serialization."""


class Slot(NamedTuple):
    """Where a message is: its own stamp and the time under which the bag files it."""

    stamp_ns: int
    logged_ns: int


class BagReader:
    """An open bag, usable as a context; messages are read from disk when asked for.

    Args:
        path: folder of a rosbag2, or a ``.bag`` file of ROS 1.

    Raises:
        SourceError: no readable bag there. What a damaged bag makes the library raise later becomes one, too.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SourceError(f"There is no bag '{path}'.")
        files = sorted([*path.glob("*.db3"), *path.glob("*.mcap")]) if path.is_dir() else [path]
        for file in files:
            with reading(path):
                _check_whole(file)
        if path.is_file() and path.suffix not in _ENDINGS:
            raise SourceError(f"'{path}' is no bag; give the folder that the recorder wrote, or a .bag file of ROS 1.")
        if path.is_dir() and not (path / "metadata.yaml").is_file():
            way_out = (
                f"If its recorder was killed, `ros2 bag reindex {path}` writes it."
                if files
                else "Give the folder that the recorder wrote."
            )
            raise SourceError(f"'{path}' is not a rosbag2 folder: it has no metadata.yaml. {way_out}")
        if path.is_dir() and (size := (path / "metadata.yaml").stat().st_size) > MAX_METADATA_BYTES:
            raise SourceError(
                f"'{path / 'metadata.yaml'}' has {size} bytes, more than the {MAX_METADATA_BYTES} allowed."
            )
        self.path = path
        with reading(path):
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the bag's files."""
        self._reader.close()

    @property
    def is_ros1(self) -> bool:
        """Whether it is a bag of ROS 1."""
        return not self._reader.is2

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
        counts: dict[tuple[str, str], int] = {}
        for c in self._reader.connections:
            counts[c.topic, c.msgtype] = counts.get((c.topic, c.msgtype), 0) + int(c.msgcount)
        return tuple(self._topic(name, kind, count) for (name, kind), count in sorted(counts.items()))

    def links(self) -> tuple[Link, ...]:
        """Every pair of frames in the transforms, static ones first, in the order in which they are first met."""
        found: dict[Link, None] = {}
        names = [topic.name for topic in self.topics if topic.kind in TF_TYPES]
        for name in sorted(names, key=lambda name: not name.endswith("tf_static")):
            for message in self.messages(name, *TF_TYPES):
                for item in message.transforms:
                    parent, child = item.header.frame_id.lstrip("/"), item.child_frame_id.lstrip("/")
                    found[Link(parent, child, static=name.endswith("tf_static"))] = None
        return tuple(found)

    def records(
        self, *topics: tuple[str, str], start_ns: int | None = None, stop_ns: int | None = None
    ) -> Iterator[Record]:
        """What the bag files under a time from ``start_ns`` to before ``stop_ns``, in recorded order.

        Args:
            topics: name and message type of each.
        """
        connections = [c for c in self._reader.connections if (c.topic, c.msgtype) in topics]
        if not connections:  # an empty list would mean all topics
            return
        with reading(self.path):
            for connection, logged_ns, data in self._reader.messages(connections, start_ns, stop_ns):
                yield Record(connection.topic, connection.msgtype, logged_ns, bytes(data))

    def timed(self, topic: str, *kinds: str) -> Iterator[tuple[int, Any]]:
        """When each message of a topic of one of these types was recorded, in nanoseconds, and the message."""
        for record in self.records(*((topic, kind) for kind in kinds)):
            yield record.logged_ns, self.decode(record)

    def messages(self, topic: str, *kinds: str) -> Iterator[Any]:
        """The messages of a topic of one of these types, in recorded order."""
        for _, message in self.timed(topic, *kinds):
            yield message

    def slots(self, topic: Topic) -> list[Slot]:
        """Where the messages of a topic are, in the order of their stamps.

        Raises:
            SourceError: they are of several frames: two publishers share the topic.
        """
        found: list[Slot] = []
        frames: set[str] = set()
        for record in self.records((topic.name, topic.kind)):
            header = self.header(record)
            found.append(Slot(header.stamp_ns, record.logged_ns))
            frames.add(header.frame_id)
        if len(frames - {""}) > 1:
            listed = ", ".join(sorted(frames))
            raise SourceError(f"{topic.name} of '{self.path}' mixes messages of several frames: {listed}. Record one.")
        return sorted(found)

    def message(self, topic: Topic, slot: Slot) -> Any:
        """The message of a topic that is there.

        Raises:
            SourceError: it no longer is.
        """
        where = slot.logged_ns, slot.logged_ns + 1
        for record in self.records((topic.name, topic.kind), start_ns=where[0], stop_ns=where[1]):
            if self.header(record).stamp_ns == slot.stamp_ns:
                return self.decode(record)
        raise SourceError(f"The bag '{self.path}' changed while it was read: a message on {topic.name} is gone.")

    def decode(self, record: Record) -> Any:
        """The message object of a record."""
        with reading(self.path):
            return self._reader.deserialize(record.data, record.kind)

    def header(self, record: Record) -> Header:
        """The header of a record whose type has one, read without the rest of the message."""
        try:
            return serialized_header(record.data, ros1=self.is_ros1)
        except FrameError as error:
            raise SourceError(f"The bag '{self.path}' is damaged: on {record.topic}, {error}") from error

    def _topic(self, name: str, kind: str, count: int) -> Topic:
        first = next(self.messages(name, kind), None) if count and kind.startswith(_DESCRIBED) else None
        if first is None:
            return Topic(name, kind, count)
        return Topic(
            name,
            kind,
            count,
            frame_id=str(first.header.frame_id).lstrip("/") if hasattr(first, "header") else "",
            child_frame_id=str(getattr(first, "child_frame_id", "")).lstrip("/"),
            is_depth=kind in IMAGE_TYPES and is_depth(first, name),
        )


def _check_whole(database: Path) -> None:
    """Refuse a file whose recorder was killed: an SQLite file is read without its log, an MCAP file not at all.

    Raises:
        SourceError: there is a log that has not been worked in, or the file has no end.
    """
    if database.suffix == ".mcap" and not _has_end(database):
        raise SourceError(
            f"'{database}' has no end: its recorder was killed, or it was not copied in whole. Repair it with `mcap "
            f"recover {database} -o whole.mcap`, put that in its place, and run `ros2 bag reindex {database.parent}`."
        )
    for ending in ("-wal", "-journal"):
        log = database.with_name(database.name + ending)
        if log.is_file() and log.stat().st_size:
            raise SourceError(
                f"'{database}' is whole only with '{log.name}' beside it: its recorder was killed, or it was copied "
                f"while open. Work that in with `sqlite3 {database} 'PRAGMA wal_checkpoint(TRUNCATE)'`."
            )


def _has_end(file: Path) -> bool:
    """Return whether an MCAP file ends as the format says; true if it does not begin so, which the reader tells."""
    with open_plain(file) as stream:
        if stream.read(len(_MCAP)) != _MCAP:
            return True
        stream.seek(-len(_MCAP), os.SEEK_END)
        return stream.tell() > 0 and stream.read() == _MCAP


def _limit(packed: int) -> int:
    """Return the number of bytes that so many packed ones may unpack to."""
    return MAX_RATIO * packed + FREE_BYTES


def _unpacked(make: Callable[[], Any], data: bytes, limit: int) -> bytes:
    """Return unpacked data, at most ``limit`` and one bytes of them; ``make`` returns a decompressor of one frame."""
    parts: list[bytes] = []
    left = limit + 1
    while data and left > 0:  # there may be several frames
        frame = make()
        parts.append(frame.decompress(data, max_length=left))
        left -= len(parts[-1])
        data = (frame.unused_data or b"") if frame.eof else b""
    return b"".join(parts)


def _unpacker(make: Callable[[], Any]) -> Callable[[bytes, int], bytes]:
    """Return a function that unpacks one chunk of MCAP of an announced size, and takes no more memory than that."""

    def unpack(data: bytes, size: int) -> bytes:
        if size > _limit(len(data)):
            raise ValueError(f"a chunk would unpack to {size} bytes, from {len(data)}")
        return _unpacked(make, data, size)

    return unpack


def _unpacked_message(data: bytes) -> bytes:
    message = _unpacked(zstd.ZstdDecompressor, data, _limit(len(data)))
    if len(message) > _limit(len(data)):
        raise ValueError(f"a message of {len(data)} bytes unpacks to more than {_limit(len(data))}")
    return message


class _UnpackedFile:
    """Packed file of a bag, read up to what its size allows."""

    def __init__(self, packed: Any, mode: str) -> None:
        self._file, self._size = zstd.open(packed, mode), os.fstat(packed.fileno()).st_size
        self._left = _limit(self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"a file of {self._size} bytes unpacks to more than {_limit(self._size)}")
        return data


# rosbags itself unpacks whatever a chunk, a message or a file holds
storage_mcap.DECOMPRESSORS["lz4"] = _unpacker(LZ4FrameDecompressor)
storage_mcap.DECOMPRESSORS["zstd"] = _unpacker(zstd.ZstdDecompressor)
rosbag2_reader.zstd = SimpleNamespace(open=_UnpackedFile, decompress=_unpacked_message)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What reading a damaged bag raises, as a SourceError; errors of this package pass."""
    try:
        yield
    except KflocError:
        raise
    except Exception as error:  # a library reads what may be any bytes: there is no end to the kinds
        said = f"{type(error).__name__} while reading it: {str(error).rstrip('.')}"
        raise SourceError(f"The bag '{path}' is damaged or of an unknown kind ({said}).") from error
