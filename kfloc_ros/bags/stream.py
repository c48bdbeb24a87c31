# SPDX-License-Identifier: Apache-2.0
"""One camera of a bag, as a replay plays it: images and camera_info as raw bytes, in parts. Needs no ROS."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.bags.reader import BagReader, Record
from kfloc_ros.bags.topics import COMPRESSED, choose_image, choose_info
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.messages.images import decode_compressed, decode_image


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


class BagStream(BagReader):
    """An open rosbag2 of which one camera is played; use it as a context.

    Args:
        path: folder of a rosbag2.
        image_topic: which images; needed where the bag has several cameras.
        info_topic: which camera_info; needed where it does not follow from the images.
        tf: namespace of the transforms, such as ``/robot1``; needed where the bag has those of several robots.

    Raises:
        SourceError: no readable rosbag2 there, or its image or camera_info topic is missing or ambiguous.
    """

    def __init__(
        self, path: Path, *, image_topic: str | None = None, info_topic: str | None = None, tf: str | None = None
    ) -> None:
        if path.suffix == ".bag" and path.is_file():
            raise SourceError(
                f"'{path}' is a rosbag1, which ROS 2 nodes cannot be played. `kfloc localize bag:{path}` reads it; "
                f"`rosbags-convert --src {path} --dst {path.with_suffix('')}` makes a rosbag2 of it."
            )
        super().__init__(path)
        self.tf = tf
        try:
            self.image = choose_image(path, self.topics, image_topic)
            self.info = choose_info(path, self.topics, self.image, info_topic)
        except SourceError:
            self.close()
            raise
        self._image = self.image.name, self.image.kind
        self._info = self.info.name, self.info.kind

    @property
    def transport(self) -> str:
        """``compressed`` or ``raw``: the ``image_transport`` that the nodes need."""
        return "compressed" if self.image.kind == COMPRESSED else "raw"

    @property
    def rectified(self) -> bool:
        """Whether the images are rectified already, by the name of their topic."""
        return self.image.is_rectified

    def events(self, part: ReplayRange) -> Iterator[BagEvent]:
        """Images and camera_info of the part, in recorded order.

        The last camera_info before the part comes first, so that a bag with a single one can be
        entered in its middle.
        """
        skipped_info: BagEvent | None = None
        first_ns = self.start_ns
        for record in self.records(self._image, self._info):
            event = self._event(record)
            if part.holds(event.log_ns - first_ns):
                if skipped_info is not None:
                    yield BagEvent(event.log_ns, skipped_info.stamp_ns, False, skipped_info.data)
                    skipped_info = None
                yield event
            elif event.log_ns - first_ns < part.start_s * 1e9 and not event.is_image:
                skipped_info = event

    def image_count(self, part: ReplayRange) -> int:
        """How many images the part has."""
        first_ns = self.start_ns
        return sum(part.holds(record.logged_ns - first_ns) for record in self.records(self._image))

    def positions(self) -> dict[int, int]:
        """Number in the bag of every image, by header stamp in nanoseconds."""
        return {self.header(record).stamp_ns: number for number, record in enumerate(self.records(self._image))}

    def message_of(self, event: BagEvent) -> Any:
        """An event's message, deserialised."""
        topic, kind = self._image if event.is_image else self._info
        return self.decode(Record(topic, kind, event.log_ns, event.data))

    def rgb(self, message: Any) -> NDArray[np.uint8]:
        """RGB image (H, W, 3) of one of the played messages. Raises FrameError if it is none."""
        return decode_compressed(message) if self.transport == "compressed" else decode_image(message)

    def images(self, stamps_ns: Collection[int]) -> dict[int, NDArray[np.uint8]]:
        """RGB images (H, W, 3) by stamp; one that cannot be decoded is left out."""
        found: dict[int, NDArray[np.uint8]] = {}
        for record in self.records(self._image):
            stamp_ns = self.header(record).stamp_ns
            if stamp_ns in stamps_ns:
                with contextlib.suppress(FrameError):
                    found[stamp_ns] = self.rgb(self.decode(record))
        return found

    def _event(self, record: Record) -> BagEvent:
        is_image = (record.topic, record.kind) == self._image
        return BagEvent(record.logged_ns, self.header(record).stamp_ns, is_image, record.data)
