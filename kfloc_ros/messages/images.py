# SPDX-License-Identifier: Apache-2.0
"""``sensor_msgs/Image`` and ``CompressedImage`` to RGB arrays and back, with NumPy and OpenCV alone.

Nothing here imports ROS: a message is whatever has the fields of the ROS message, so that the
conversions are tested without it and do not depend on a working ``cv_bridge``. ``nodes/adapters.py`` uses that where it
is installed.
"""

from __future__ import annotations

import array
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError

Rgb = NDArray[np.uint8]

MAX_SIDE_PX = 32_766
"""OpenCV undistorts no larger images."""
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
MAX_SCANS = 24
"""Of one JPEG; progressive ones have about ten, each of which takes as long as a whole image."""
_PNG_START = b"\x89PNG\r\n\x1a\n"


class _Layout(NamedTuple):
    """How a pixel lies in memory and which OpenCV conversion makes it RGB (None: it is RGB already)."""

    channels: int
    bits: int
    to_rgb: int | None
    rows: float = 1.0
    """Rows in memory for each row of the image: 1.5 where rows of two colours follow those of the brightness."""


_LAYOUTS: dict[str, _Layout] = {
    "rgb8": _Layout(3, 8, None),
    "bgr8": _Layout(3, 8, cv2.COLOR_BGR2RGB),
    "rgba8": _Layout(4, 8, cv2.COLOR_RGBA2RGB),
    "bgra8": _Layout(4, 8, cv2.COLOR_BGRA2RGB),
    "mono8": _Layout(1, 8, cv2.COLOR_GRAY2RGB),
    "8UC1": _Layout(1, 8, cv2.COLOR_GRAY2RGB),
    "8UC3": _Layout(3, 8, cv2.COLOR_BGR2RGB),
    "8UC4": _Layout(4, 8, cv2.COLOR_BGRA2RGB),
    "rgb16": _Layout(3, 16, None),
    "bgr16": _Layout(3, 16, cv2.COLOR_BGR2RGB),
    "mono16": _Layout(1, 16, cv2.COLOR_GRAY2RGB),
    "yuv422": _Layout(2, 8, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": _Layout(2, 8, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": _Layout(2, 8, cv2.COLOR_YUV2RGB_YUY2),
    "yuyv": _Layout(2, 8, cv2.COLOR_YUV2RGB_YUY2),
    "nv12": _Layout(1, 8, cv2.COLOR_YUV2RGB_NV12, rows=1.5),
    "nv21": _Layout(1, 8, cv2.COLOR_YUV2RGB_NV21, rows=1.5),
    # OpenCV names a Bayer pattern by its second row, ROS by its first: rggb is OpenCV's "BG".
    "bayer_rggb8": _Layout(1, 8, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr8": _Layout(1, 8, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": _Layout(1, 8, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg8": _Layout(1, 8, cv2.COLOR_BayerGB2RGB),
    "bayer_rggb16": _Layout(1, 16, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr16": _Layout(1, 16, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg16": _Layout(1, 16, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg16": _Layout(1, 16, cv2.COLOR_BayerGB2RGB),
}

ENCODINGS = tuple(_LAYOUTS)
"""Every encoding that :func:`decode_image` takes. 16-bit values become 8-bit ones by :func:`eight_bits`."""
_SENSOR_BITS = (8, 10, 12, 14)
"""Bits of cameras that put their values into the lower part of 16 bits."""


PixelReader = Callable[[Any], "NDArray[np.uint8] | NDArray[np.uint16] | None"]
"""Reader of the pixels (H, W) or (H, W, C) of an ``Image`` as they are stored; None for a message it refuses."""


def decode_image(message: Any, read: PixelReader | None = None) -> Rgb:
    """RGB array (H, W, 3) of a ``sensor_msgs/Image``; rows may be padded, 16-bit data of either endianness.

    Args:
        message: the image.
        read: reads the pixels in place of this module, such as ``cv_bridge``.

    Raises:
        FrameError: the encoding is not an image's, a size is zero, or there are too few bytes.
    """
    layout = _LAYOUTS.get(message.encoding)
    if layout is None:
        raise FrameError(
            f"An image has the encoding '{message.encoding}', which is not a colour or grey image known here; "
            f"known: {', '.join(ENCODINGS)}."
        )
    height, width, step = int(message.height), int(message.width), int(message.step)
    if height <= 0 or width <= 0:
        raise FrameError(f"An image has no pixels: its size is {width}x{height}.")
    _check_size(width, height)
    row_bytes = width * layout.channels * layout.bits // 8
    step = step or row_bytes
    if step < row_bytes:
        raise FrameError(
            f"An image of {width} pixels in '{message.encoding}' needs {row_bytes} bytes a row, but its step is {step}."
        )
    data = np.frombuffer(message.data, dtype=np.uint8)
    lines = int(height * layout.rows)
    # The padding of the last row may be missing.
    needed = step * (lines - 1) + row_bytes
    if data.size < needed:
        raise FrameError(
            f"An image of {width}x{height} in '{message.encoding}' needs {needed} bytes, but has {data.size}."
        )
    pixels = read(message) if read is not None and layout.rows == 1 else None
    if pixels is None:
        pixels = np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, (lines, row_bytes), (step, 1)))
        if layout.bits == 16:
            pixels = pixels.view(np.dtype(np.uint16).newbyteorder(">" if message.is_bigendian else "<"))
    return _to_rgb(eight_bits(pixels).reshape(lines, -1), width, layout)


def eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the upper eight bits of 16-bit values, of those that the camera has; 8-bit values as they are.

    Cameras of 8 to 14 bits write them into 16 without a word about it, mostly into the lower ones; eight of
    sixteen bits would then be nearly black. The camera's bits are those that the largest value of the image needs.
    """
    if values.dtype == np.uint8:
        return values
    most = int(values.max(initial=0))
    bits = next((bits for bits in _SENSOR_BITS if most >> bits == 0), 16)
    return np.asarray(values >> (bits - 8), dtype=np.uint8)


def _to_rgb(rows: NDArray[np.uint8], width: int, layout: _Layout) -> Rgb:
    """RGB of packed rows (H, bytes) of 8-bit values."""
    pixels = np.ascontiguousarray(rows).reshape(len(rows), width, layout.channels)
    if layout.to_rgb is None:
        return pixels
    try:
        return np.asarray(cv2.cvtColor(pixels, layout.to_rgb), dtype=np.uint8)
    except cv2.error as error:
        size = f"{width}x{len(rows)}"
        raise FrameError(f"An image of {size} pixels is too small or odd for its encoding: {error.err}.") from error


def decode_compressed(message: Any) -> Rgb:
    """RGB array (H, W, 3) of a ``sensor_msgs/CompressedImage`` (JPEG, PNG and what else OpenCV reads).

    Raises:
        FrameError: the data is empty, cut off, or no image.
    """
    data = bytes(message.data)
    if not data:
        raise FrameError(f"A compressed image ('{message.format}') has no data.")
    if _is_cut_off(data):
        # OpenCV would fill the missing part with grey and say nothing.
        raise FrameError(f"A compressed image ('{message.format}', {len(data)} bytes) is cut off: its end is missing.")
    mosaic = _mosaic_of(message.format)
    bgr = decode_file(data, cv2.IMREAD_COLOR if mosaic is None else cv2.IMREAD_UNCHANGED)
    if bgr is None:
        raise FrameError(f"A compressed image ('{message.format}', {len(data)} bytes) cannot be decoded.")
    _check_size(bgr.shape[1], bgr.shape[0])
    if mosaic is not None:
        if bgr.ndim == 2 and bgr.dtype in (np.uint8, np.uint16):
            return _to_rgb(eight_bits(bgr), bgr.shape[1], mosaic)
        bgr = decode_file(data, cv2.IMREAD_COLOR)
    if _made_of(message.format)[1].startswith("rgb"):  # compressed without the swap of channels that OpenCV expects
        return np.asarray(bgr, dtype=np.uint8)
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def decode_file(encoded: bytes, flags: int) -> NDArray[Any] | None:
    """Return the pixels, as OpenCV orders them, of an image file's bytes; None if they are no image it can decode.

    Pixels stay as they are stored, whatever EXIF's orientation says. Colour and grey of 16 bits become 8-bit values by
    :func:`eight_bits`.

    Args:
        encoded: content of the file.
        flags: OpenCV's, such as ``cv2.IMREAD_COLOR``; with ``cv2.IMREAD_UNCHANGED`` 16-bit values stay.
    """
    if encoded.startswith(_JPEG_START) and encoded.count(_JPEG_SCAN) > MAX_SCANS:
        return None
    if flags != cv2.IMREAD_UNCHANGED:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_ANYDEPTH
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    except cv2.error:  # more pixels than OpenCV was told to take
        return None
    if pixels is None or flags == cv2.IMREAD_UNCHANGED:
        return pixels
    return eight_bits(pixels) if pixels.dtype in (np.uint8, np.uint16) else None


def _made_of(format_text: str) -> tuple[str, str]:
    """Encoding of the raw image, and of the one that was compressed, as image_transport notes them; empty if unsaid.

    It writes ``rgb8; jpeg compressed bgr8``; for an image that was compressed as it was, the last word is missing.
    """
    encoding, separator, codec = format_text.lower().partition(";")
    if not separator and not encoding.strip().startswith("bayer_"):  # the name of a codec
        return "", ""
    return encoding.strip(), codec.partition("compressed")[2].strip()


def _mosaic_of(format_text: str) -> _Layout | None:
    """Layout of the Bayer mosaic that image_transport compressed as it was, or None for any other image."""
    encoding, made = _made_of(format_text)
    if not encoding.startswith("bayer_") or made not in ("", encoding):
        return None
    layout = _LAYOUTS.get(encoding)
    return None if layout is None else layout._replace(bits=8)


def recorded_jpeg(message: Any) -> bytes | None:
    """The data of a ``CompressedImage`` if that is a JPEG."""
    data = bytes(message.data)
    return data if data.startswith(_JPEG_START) else None


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE_PX:
        raise FrameError(f"An image of {width}x{height} is too large: no side may have more than {MAX_SIDE_PX} pixels.")


def _is_cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker."""
    if data.startswith(_JPEG_START):
        # Neither marker can occur inside the coded pixels, but both do in an embedded thumbnail, which comes first.
        scan = data.rfind(_JPEG_SCAN)
        return scan < 0 or data.find(_JPEG_END, scan) < 0
    return data.startswith(_PNG_START) and b"IEND" not in data[-64:]


def fill_image(message: Any, image: Rgb) -> Any:
    """Put an RGB array (H, W, 3) into a ``sensor_msgs/Image`` as ``rgb8`` and return the message."""
    message.height, message.width = int(image.shape[0]), int(image.shape[1])
    message.encoding = "rgb8"
    message.is_bigendian = 0
    message.step = message.width * 3
    # An array.array is taken over as it is; any other sequence is checked byte by byte in Python.
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(image).tobytes())
    message.data = data
    return message


DEPTH_ENCODINGS = ("16UC1", "mono16", "32FC1")
NAMES_DEPTH = re.compile(r"depth", re.IGNORECASE)
"""In the names of topics of depth images."""
COMPRESSED_DEPTH_HEADER = 12
_NO_DEPTH = 65535


def decode_depth_message(message: Any, compressed: bool) -> NDArray[np.float32]:
    """Depth (H, W) in metres, 0 where unknown: 16-bit counts are millimetres, floats are metres (REP-118).

    Raises:
        FrameError: the message holds no depth image.
    """
    if compressed:
        return _compressed_depth(bytes(message.data), str(message.format))
    if message.encoding not in DEPTH_ENCODINGS:
        raise FrameError(f"The encoding '{message.encoding}' is not one of depth: {', '.join(DEPTH_ENCODINGS)}.")
    single = message.encoding == "32FC1"
    kind = np.dtype(np.float32 if single else np.uint16).newbyteorder(">" if message.is_bigendian else "<")
    data = np.frombuffer(bytes(message.data), np.uint8)
    width, height, row_bytes = int(message.width), int(message.height), int(message.width) * kind.itemsize
    step = int(message.step) or row_bytes
    if min(width, height) < 1 or step < row_bytes or data.size < step * (height - 1) + row_bytes:
        raise FrameError(
            f"A depth image of {width}x{height} in '{message.encoding}' with rows of {step} bytes has {data.size} "
            "bytes."
        )
    rows = np.lib.stride_tricks.as_strided(data, (height, row_bytes), (step, 1))  # the last padding may be missing
    values = np.ascontiguousarray(rows).view(kind).astype(np.float32)
    return _known_metres(values) if single else _metres(values)


def _compressed_depth(data: bytes, format_text: str) -> NDArray[np.float32]:
    """Depth of a PNG, behind the header of compressed_depth_image_transport if the format says so."""
    packed = "compressedDepth" in format_text
    header, picture = (data[:COMPRESSED_DEPTH_HEADER], data[COMPRESSED_DEPTH_HEADER:]) if packed else (b"", data)
    try:
        raw = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_UNCHANGED) if picture else None
    except cv2.error:
        raw = None
    if raw is None or raw.dtype != np.uint16 or raw.ndim != 2 or _is_cut_off(picture):
        whole = "" if not _is_cut_off(picture) else "; its end is missing"
        raise FrameError(f"A depth image with the format '{format_text}' is not a 16-bit PNG{whole}.")
    if packed and format_text.startswith("32FC1"):
        a, b = struct.unpack("<2f", header[4:])  # as compressed_depth_image_transport quantizes
        if not (np.isfinite(a) and np.isfinite(b) and a > 0):
            raise FrameError(f"A depth image with the format '{format_text}' has the scale {a} and {b} in its header.")
        with np.errstate(over="ignore", invalid="ignore"):  # of a header that no camera writes
            depth = np.where(raw > b, a / np.maximum(raw.astype(np.float32) - b, 1e-6), 0) * (raw > 0)
        return _known_metres(depth)
    return _metres(raw)


def _known_metres(values: NDArray[Any]) -> NDArray[np.float32]:
    """Depth of floats: what is not finite or not positive is unknown."""
    return np.where(np.isfinite(values) & (values > 0), values, 0).astype(np.float32)


def _metres(millimetres: NDArray[Any]) -> NDArray[np.float32]:
    """Depth in metres of 16-bit counts; the highest count stands for no measurement, as zero does."""
    return np.where(millimetres == _NO_DEPTH, 0, millimetres.astype(np.float32) * np.float32(1e-3)).astype(np.float32)


def is_depth(message: Any, topic: str) -> bool:
    """Whether an ``Image`` or ``CompressedImage`` holds depth, by its encoding; ``mono16`` also by its topic's name.

    A few drivers publish depth as ``mono16``, and infrared and other grey cameras of more than 8 bits do, too.
    """
    if hasattr(message, "encoding"):
        found = [str(message.encoding)] if str(message.encoding) in DEPTH_ENCODINGS else []
    else:
        found = [word for word in ("compressedDepth", *DEPTH_ENCODINGS) if word in message.format]
    return bool(found) and (found != ["mono16"] or NAMES_DEPTH.search(topic) is not None)
