# SPDX-License-Identifier: Apache-2.0
"""Event files for TensorBoard: read back here by the format's own rules, and by TensorBoard where it is installed."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfloc_ros.training.event_log import EventLog, crc32c


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of every field of a protocol-buffer message."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    at = 0
    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        yield number, data[at : at + length]
        at += length


def records(path: Path) -> Iterator[dict[int, int | bytes]]:
    """The events of a file, their checksums compared."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for part, checksum in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            rotated = (struct.unpack("<I", checksum)[0] - 0xA282EAD8) & 0xFFFFFFFF
            assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == crc32c(part)
        yield dict(fields(data[12 : 12 + length]))
        data = data[16 + length :]


def test_checksum_has_the_published_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_figures_are_read_back(tmp_path: Path) -> None:
    with EventLog(tmp_path, 0) as log:
        log.add(50, {"loss": -1.25, "nan": math.nan})
        log.add(100_000, {"loss": 0.5, "median_error_m": 0.25})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    first, second, third = records(path)
    assert first[3] == b"brain.Event:2"
    assert [event[2] for event in (first, second, third)] == [0, 50, 100_000]
    for event, expected in ((second, {"loss": -1.25}), (third, {"loss": 0.5, "median_error_m": 0.25})):
        content = event[5]
        assert isinstance(content, bytes)
        values = {}
        for _, value in fields(content):
            assert isinstance(value, bytes)
            parts = dict(fields(value))
            assert isinstance(parts[1], bytes) and isinstance(parts[2], bytes)
            values[parts[1].decode()] = struct.unpack("<f", parts[2])[0]
        assert values == expected


def test_a_continued_training_takes_back_what_the_killed_one_wrote(tmp_path: Path) -> None:
    for start in (0, 2000):
        with EventLog(tmp_path, start) as log:
            log.add(start + 50, {"loss": 1.0})
    paths = sorted(tmp_path.glob("events.out.tfevents.*"))
    assert len(paths) == 2
    assert [event[2] for event in records(paths[1])] == [0, 2001, 2050]
    assert list(records(paths[1]))[1][7] == b"\x08\x01"  # the session starts: later steps seen before are forgotten


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    with EventLog(tmp_path, 0) as log:
        for step in (50, 100, 150):
            log.add(step, {"loss": 1.0 / step})
    with EventLog(tmp_path, 100) as log:
        log.add(150, {"loss": 5.0})
    accumulator = accumulators.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [(event.step, round(event.value, 4)) for event in accumulator.Scalars("loss")] == [
        (50, 0.02),
        (100, 0.01),
        (150, 5.0),
    ]
