# SPDX-License-Identifier: Apache-2.0
"""Depth images of a recording: raw, as PNG, or as ``compressed_depth_image_transport`` writes them."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError

DEPTH_ENCODINGS = ("16UC1", "mono16", "32FC1")
COMPRESSED_DEPTH_HEADER = 12


def decode_depth_message(message: Any, compressed: bool) -> NDArray[np.float32]:
    """Depth (H, W) in metres, 0 where unknown: 16-bit counts are millimetres, floats are metres (REP-118).

    Raises:
        SourceError: the message holds no depth image.
    """
    if compressed:
        data = np.frombuffer(bytes(message.data), np.uint8)
        packed = "compressedDepth" in message.format
        raw = cv2.imdecode(data[COMPRESSED_DEPTH_HEADER:] if packed else data, cv2.IMREAD_UNCHANGED)
        if raw is None or raw.dtype != np.uint16 or raw.ndim != 2:
            raise SourceError(f"A depth image with the format '{message.format}' is not a 16-bit PNG.")
        if packed and message.format.startswith("32FC1"):
            a, b = struct.unpack("<2f", bytes(message.data[4:12]))  # as compressed_depth_image_transport quantizes
            depth = np.where(raw > 0, a / np.maximum(raw.astype(np.float32) - b, 1e-6), 0)
            return np.asarray(depth, dtype=np.float32)
        return np.asarray(raw.astype(np.float32) * np.float32(1e-3))
    if message.encoding not in DEPTH_ENCODINGS:
        raise SourceError(f"The encoding '{message.encoding}' is not one of depth: {', '.join(DEPTH_ENCODINGS)}.")
    single = message.encoding == "32FC1"
    kind = np.dtype(np.float32 if single else np.uint16).newbyteorder(">" if message.is_bigendian else "<")
    rows = np.frombuffer(bytes(message.data), np.uint8).reshape(message.height, message.step)
    values = np.ascontiguousarray(rows[:, : message.width * kind.itemsize]).view(kind).astype(np.float32)
    if not single:
        return np.where(values == 65535, 0, values * np.float32(1e-3)).astype(np.float32)
    return np.asarray(np.where(np.isfinite(values) & (values > 0), values, 0), dtype=np.float32)


def is_depth(message: Any) -> bool:
    """Whether an ``Image`` or ``CompressedImage`` holds depth, by its encoding."""
    if hasattr(message, "encoding"):
        return str(message.encoding) in DEPTH_ENCODINGS
    return any(word in message.format for word in ("compressedDepth", *DEPTH_ENCODINGS))
