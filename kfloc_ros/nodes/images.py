# SPDX-License-Identifier: Apache-2.0
"""``sensor_msgs/Image`` to RGB arrays and back by ``cv_bridge`` where it is installed, else by our own decoder.

``cv_bridge`` moves the pixels between message and array; the conversion of colours is always
:mod:`kfloc_ros.messages.images`, so that both give the same arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import Image

from kfloc_ros.messages.images import Rgb, decode_image, fill_image

try:
    from cv_bridge import CvBridge
except (ImportError, AttributeError):  # compiled for another NumPy, it fails with either
    CvBridge = None


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
