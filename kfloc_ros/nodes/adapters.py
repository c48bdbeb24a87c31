# SPDX-License-Identifier: Apache-2.0
"""Adapters of ``message_filters`` and ``cv_bridge`` where they are installed, and what does the same without them.

``cv_bridge`` moves the pixels between message and array; the conversion of colours is always
:mod:`kfloc_ros.messages.images`, so that both give the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rclpy.node import Node
from sensor_msgs.msg import Image

from kfloc_ros.messages.images import Rgb, decode_image, fill_image
from kfloc_ros.messages.poses import stamp_to_ns
from kfloc_ros.nodes import qos

try:
    import message_filters
except ImportError:
    message_filters = None

try:
    from cv_bridge import CvBridge
except (ImportError, AttributeError):  # compiled for another NumPy, it fails with either
    CvBridge = None

Messages = Mapping[str, Any]
"""Messages of one stamp, by topic."""

MAX_INCOMPLETE = 8
"""Limit on incomplete stamps; the oldest is discarded for a new one."""
JUMP_BACK_NS = 1_000_000_000


class Joiner(Protocol):
    """Collector of the messages of one stamp, which passes complete sets on."""

    def add(self, topic: str, message: Any) -> None:
        """Take a message of a topic."""


class StampJoiner:
    """Joiner for where ``message_filters`` is not installed. A complete stamp discards all that arrived before it.

    Args:
        topics: topics of a set.
        pass_on: called with each complete set.
    """

    def __init__(self, topics: Sequence[str], pass_on: Callable[[Messages], None]) -> None:
        self._topics, self._pass_on = set(topics), pass_on
        self._parts: dict[int, dict[str, Any]] = {}

    def add(self, topic: str, message: Any) -> None:
        stamp_ns = stamp_to_ns(message.header.stamp)
        parts = self._parts.setdefault(stamp_ns, {})
        parts[topic] = message
        if self._topics <= parts.keys():
            # By order of arrival, not by stamp: after a jump back in time, later messages have smaller stamps.
            for key in list(self._parts):
                del self._parts[key]
                if key == stamp_ns:
                    break
            self._pass_on(parts)
        while len(self._parts) > MAX_INCOMPLETE:
            del self._parts[next(iter(self._parts))]


class FilterJoiner:
    """Joiner by ``message_filters.TimeSynchronizer``, with the arguments of :class:`StampJoiner`.

    Two things that the synchronizer lacks are added: it is renewed when time jumps back, since it would discard what
    has smaller stamps than what it holds; and sets are passed on outside its lock, which an exception would leave
    closed.
    """

    def __init__(self, topics: Sequence[str], pass_on: Callable[[Messages], None]) -> None:
        self._topics, self._pass_on = tuple(topics), pass_on
        self._complete: list[Messages] = []
        self._newest_ns = 0
        self._inputs: dict[str, Any] = {}
        self._connect()

    def add(self, topic: str, message: Any) -> None:
        stamp_ns = stamp_to_ns(message.header.stamp)
        if stamp_ns < self._newest_ns - JUMP_BACK_NS:
            self._connect()
        self._newest_ns = max(self._newest_ns, stamp_ns)
        self._inputs[topic].signalMessage(message)
        while self._complete:
            self._pass_on(self._complete.pop(0))

    def _connect(self) -> None:
        """Make inputs and synchronizer anew."""
        self._newest_ns = 0
        self._inputs = {topic: message_filters.SimpleFilter() for topic in self._topics}
        self._synchronizer = message_filters.TimeSynchronizer(list(self._inputs.values()), MAX_INCOMPLETE)
        self._synchronizer.registerCallback(self._finish)

    def _finish(self, *found: Any) -> None:
        self._complete.append(dict(zip(self._topics, found, strict=True)))
        stamp_ns = stamp_to_ns(found[0].header.stamp)
        for queue in self._synchronizer.queues:
            for older_ns in [key for key in queue if key < stamp_ns]:
                del queue[older_ns]


def make_joiner(topics: Sequence[str], pass_on: Callable[[Messages], None]) -> Joiner:
    """Return a joiner by ``message_filters`` if that is installed, else our own; see :class:`StampJoiner`."""
    return (StampJoiner if message_filters is None else FilterJoiner)(topics, pass_on)


def subscribe(node: Node, topics: Mapping[str, type], joiner: Joiner) -> None:
    """Connect a joiner to its topics."""
    for topic, kind in topics.items():
        node.create_subscription(kind, topic, lambda message, topic=topic: joiner.add(topic, message), qos.results())


class ImageBridge:
    """Converter of images. What ``cv_bridge`` refuses or would misread, our own decoder takes.

    Args:
        bridge: a ``cv_bridge.CvBridge``, or None.
    """

    def __init__(self, bridge: Any = None) -> None:
        self._bridge = bridge

    def decode(self, message: Any) -> Rgb:
        """Return the RGB array (H, W, 3) of an ``Image``.

        Raises:
            FrameError: see :func:`kfloc_ros.messages.images.decode_image`.
        """
        return decode_image(message, self._pixels if self._bridge is not None else None)

    def encode(self, image: Rgb) -> Any:
        """Return an RGB array (H, W, 3) as an ``Image`` with the encoding ``rgb8``, without stamp and frame."""
        if self._bridge is not None:
            try:
                return self._bridge.cv2_to_imgmsg(np.ascontiguousarray(image), encoding="rgb8")
            except Exception:  # it was compiled for another OpenCV than is installed
                self._bridge = None
        return fill_image(Image(), image)

    def _pixels(self, message: Any) -> NDArray[Any] | None:
        """Return the pixels as they are stored, or None."""
        height, width, step = int(message.height), int(message.width), int(message.step)
        try:
            pixels = np.asarray(self._bridge.imgmsg_to_cv2(message, desired_encoding="passthrough"))
        except Exception:  # CvBridgeError, or what NumPy says to a buffer that is too short
            return None
        channels = 1 if pixels.ndim == 2 else pixels.shape[2]
        # It reads rows of whole pixels, so that padding by a part of one shifts every row.
        is_whole = step % (channels * pixels.dtype.itemsize) == 0
        fits = pixels.shape[:2] == (height, width) and pixels.dtype in (np.uint8, np.uint16)
        return pixels if is_whole and fits else None


_bridge = ImageBridge(None if CvBridge is None else CvBridge())
decode, encode = _bridge.decode, _bridge.encode
