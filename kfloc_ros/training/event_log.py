# SPDX-License-Identifier: Apache-2.0
"""Scalars in TensorBoard's file format, written without TensorBoard: it is needed only to look at them.

A file is a sequence of records, each framed by its length and checksums (CRC-32C, rotated and offset so that records
inside records do not look alike). A record is a protocol-buffer ``Event``; the few fields used here are written by
hand: 1 wall time (double), 2 step (varint), 3 file version (text), 5 summary, 7 session log.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

FILE_VERSION = "brain.Event:2"
CRC_POLYNOMIAL = 0x82F63B78
CRC_MASK_OFFSET = 0xA282EAD8
SESSION_STARTS = b"\x08\x01"


class EventLog:
    """One event file of a training; a training that is continued writes another beside it.

    Args:
        folder: what ``tensorboard --logdir`` is to be pointed at.
        step: after which this run goes on; what an earlier, killed run wrote of later steps is not shown any more.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names
        self._stream = (folder / f"events.out.tfevents.{now:017.6f}.kfloc").open("wb")
        self._write(_event(now, 0, _field(3, FILE_VERSION.encode())))
        if step:
            self._write(_event(now, step + 1, _field(7, SESSION_STARTS)))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step; those that are not finite are left out."""
        values = b"".join(
            _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in figures.items()
            if math.isfinite(value)
        )
        self._write(_event(time.time(), step, _field(5, values)))
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._stream.write(length + _checksum(length) + data + _checksum(data))


def crc32c(data: bytes) -> int:
    """Castagnoli's cyclic redundancy check."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _table_entry(index: int) -> int:
    for _ in range(8):
        index = (index >> 1) ^ (CRC_POLYNOMIAL if index & 1 else 0)
    return index


_TABLE = tuple(_table_entry(index) for index in range(256))


def _checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + CRC_MASK_OFFSET) & 0xFFFFFFFF)


def _event(wall_time_s: float, step: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time_s) + b"\x10" + _varint(step) + content


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: text, or a message in the message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
