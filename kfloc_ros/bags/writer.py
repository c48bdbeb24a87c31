# SPDX-License-Identifier: Apache-2.0
"""Writes a source of frames as a rosbag2 (mcap) folder, whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer

from kfloc_ros.bags.messages import MessageCodec
from kfloc_ros.bags.topics import TOPIC_TYPES
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import SourceError

BAG_VERSION = 9


@dataclass(frozen=True)
class BagReport:
    """What was written."""

    path: Path
    frames: int
    with_depth: int
    with_truth: int
    duration_s: float
    size_bytes: int


def write_bag(
    source: FrameSource,
    out: Path,
    *,
    depth: bool = True,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> BagReport:
    """Write every frame of ``source`` with its own stamp, as it would have been recorded.

    The bag grows in a hidden folder beside ``out`` and is moved there when it is complete, so that an
    interruption or an error leaves nothing behind and never harms what ``out`` held before.

    Args:
        source: frames in temporal order; images it has as JPEG are stored as they are.
        out: folder of the bag.
        depth: store depth, where the source has it.
        force: replace a bag that is at ``out``.
        progress: called with the number of frames done after every frame.

    Raises:
        SourceError: ``out`` exists, or the source's stamps do not increase.
        OSError: the disk is full or not writable.
    """
    out = out.absolute()
    _refuse_overwriting(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        # The storage file takes the folder's name, so the bag has its final name in a folder of its own.
        report = _write(source, workspace / out.name, depth, progress)
        if out.exists():
            out.rename(workspace / "replaced")
        (workspace / out.name).rename(out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return BagReport(
        path=out,
        frames=report.frames,
        with_depth=report.with_depth,
        with_truth=report.with_truth,
        duration_s=report.duration_s,
        size_bytes=sum(file.stat().st_size for file in out.iterdir()),
    )


@dataclass(frozen=True)
class _Counts:
    frames: int
    with_depth: int
    with_truth: int
    duration_s: float


def _write(source: FrameSource, path: Path, depth: bool, progress: Callable[[int], None] | None) -> _Counts:
    codec = MessageCodec()
    with_depth = with_truth = 0
    first_ns = last_ns = -1
    with Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Connection] = {}
        for position in range(len(source)):
            frame = source[position]
            if frame.stamp_ns <= last_ns:
                raise SourceError(
                    f"The stamps of '{source.name}' do not increase: frame {frame.index} is at {frame.stamp_ns} ns, "
                    f"the one before at {last_ns} ns."
                )
            first_ns = frame.stamp_ns if position == 0 else first_ns
            last_ns = frame.stamp_ns
            for topic, data in codec.encode_frame(frame, jpeg=source.encoded_image(position), depth=depth):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, TOPIC_TYPES[topic], typestore=codec.typestore)
                writer.write(connections[topic], frame.stamp_ns, data)
            with_depth += depth and frame.depth_m is not None
            with_truth += frame.T_map_camera is not None
            if progress is not None:
                progress(position + 1)
    return _Counts(len(source), with_depth, with_truth, (last_ns - first_ns) * 1e-9)


def _refuse_overwriting(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise SourceError(f"'{out}' exists already; name another --out or replace it with --force.")
    if not (out / "metadata.yaml").is_file():
        raise SourceError(f"'{out}' is not a rosbag2 folder, so --force does not replace it; name another --out.")
