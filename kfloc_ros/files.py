# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote, read within limits: plain files only, and sizes are known before memory is taken."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError, SourceError

MAX_FILE_BYTES = 1_000_000_000
MAX_TEXT_BYTES = 200_000_000
MAX_IMAGE_PIXELS = 64_000_000
"""Of one image; OpenCV is told the same in ``kfloc_ros/__init__.py``, for formats whose headers are not read here."""
MAX_JPEG_SEGMENTS = 1000
MAX_TENSOR_LIST_BYTES = 1_000_000
MAX_RATIO, FREE_BYTES = 50, 20_000_000
"""An archive may unpack to so many times its size, and so much besides; weights and features hardly shrink."""
NO_MEASUREMENT = 65535
"""Count of a 16-bit depth image that stands for nothing, as 0 does."""
_TAIL_BYTES = 64
SIZE_PROBES = 15
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF_ORIENTATION = 0x0112
_NOT_A_NUMBER = re.compile(r"[-+]?(1\.#(IND|QNAN|SNAN|INF)\d*|nan\(\w+\))", re.IGNORECASE)


class ImageHeader(NamedTuple):
    """What the header of a PNG or JPEG file says."""

    width: int
    height: int
    orientation: int = 1
    """EXIF's number, 1 to 8: how to turn the stored pixels for display; 1: not at all."""


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a plain file.

    Raises:
        OSError: it is missing, a folder, pipe or device, larger than ``max_bytes``, or cannot be read.
    """
    with open_plain(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > max_bytes:
            raise OSError(27, f"it has {size} bytes, more than the {max_bytes} allowed", str(path))
        return stream.read(max_bytes + 1)


def open_plain(path: Path) -> IO[bytes]:
    """Return a plain file, open for reading; a pipe is not waited for.

    Raises:
        OSError: it is missing, or a folder, pipe or device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(22, "it is a folder, a pipe or a device, not a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a plain UTF-8 text file.

    Raises:
        OSError: see :func:`read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, max_bytes).decode("utf-8")


def inside(folder: Path, name: str) -> Path:
    """Return the file of a name that a data set gives, which must lie in the data set's own folder.

    Raises:
        SourceError: the name, or a link, leads elsewhere.
    """
    path = folder / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise SourceError(f"The name '{name[:200]}' in '{folder}' is no file's: {error}.") from error
    if not within:
        raise SourceError(f"The name '{name[:200]}' leads out of the folder '{folder}'.")
    return path


def number(word: str) -> float:
    """Return a float; NaN for the ways in which Windows programs print one, such as ``-1.#IND``.

    Raises:
        ValueError: it is none.
    """
    return float("nan") if _NOT_A_NUMBER.fullmatch(word) else float(word)


def number_rows(path: Path) -> list[list[float]]:
    """Return the numbers of a text file by line; empty lines and lines that begin with ``#`` are passed over.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: a word is no number, or the text is no UTF-8.
    """
    lines = (line.split() for line in read_text(path).splitlines() if not line.lstrip().startswith("#"))
    return [[number(word) for word in words] for words in lines if words]


def image_header(stream: IO[bytes]) -> ImageHeader | None:
    """Return the header of a PNG or JPEG; None for anything else, or a damaged one."""
    start = stream.read(26)
    if start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) == 26:
        width, height = struct.unpack(">II", start[16:24])
        return ImageHeader(width, height)
    if start[:2] != b"\xff\xd8":
        return None
    stream.seek(2)
    orientation = 1
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = stream.read(2)
        while marker == b"\xff\xff":
            marker = marker[1:] + stream.read(1)
        length = stream.read(2)
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] in (0xD9, 0xDA) or len(length) < 2:
            return None
        size = int.from_bytes(length, "big") - 2
        if marker[1] in _SOF:
            shape = stream.read(5)
            if len(shape) < 5:
                return None
            height, width = struct.unpack(">HH", shape[1:])
            return ImageHeader(width, height, orientation)
        if marker[1] == 0xE1:
            orientation = _exif_orientation(stream.read(max(size, 0))) or orientation
        else:
            stream.seek(max(size, 0), io.SEEK_CUR)
    return None


def _exif_orientation(segment: bytes) -> int:
    """EXIF's orientation, 1 to 8, or 0 where the segment has none."""
    tiff = segment[6:]
    if not segment.startswith(b"Exif\0\0") or tiff[:2] not in (b"II", b"MM"):
        return 0
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, first)
        for k in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, first + 2 + 12 * k)
            if tag == _EXIF_ORIENTATION:
                return value if 1 <= value <= 8 else 0
    except struct.error:
        return 0
    return 0


def image_fault(path: Path, size: tuple[int, int] | None = None) -> str:
    """Return a sentence that says why an image cannot be used, or an empty text; it is not decoded for that.

    Args:
        path: of the image.
        size: width and height of the camera that took it; None: any.
    """
    try:
        with open_plain(path) as stream:
            header = image_header(stream)
            whole = header is None or _is_whole(stream)
    except OSError as error:
        return f"'{path}' cannot be read: {error.strerror}."
    if header is None:
        return "" if path.suffix.lower() not in (".png", ".jpg", ".jpeg") else f"'{path}' is not a readable image."
    if not whole:
        return f"'{path}' is cut off: its end is missing."
    return _size_fault(path, header, size)


def _size_fault(path: Path, header: ImageHeader, size: tuple[int, int] | None) -> str:
    width, height = header.width, header.height
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        return f"'{path}' has {width}x{height} pixels, more than the {MAX_IMAGE_PIXELS} allowed."
    if size is None or (width, height) == size or (header.orientation >= 5 and (height, width) == size):
        return ""
    turned = ", as if turned by 90 degrees" if (height, width) == size else ""
    return f"'{path}' is {width}x{height} but its camera is {size[0]}x{size[1]}{turned}."


def _is_whole(stream: IO[bytes]) -> bool:
    """Whether a PNG or JPEG file has its last mark; a few programs write other things behind it."""
    start = stream.tell()
    stream.seek(0)
    mark = b"IEND" if stream.read(1) == b"\x89" else b"\xff\xd9"
    stream.seek(0, io.SEEK_END)
    stream.seek(max(start, stream.tell() - _TAIL_BYTES))
    if mark in stream.read(_TAIL_BYTES):
        return True
    stream.seek(start)
    return mark in stream.read(MAX_FILE_BYTES)


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return an image (H, W, 3), RGB, of the pixels as they are stored.

    EXIF's orientation is for display, and calibrations and poses are of the stored pixels. It is followed only where
    it makes an image, whose sides are swapped, fit its camera.

    Args:
        path: of the image.
        size: width and height of the camera that took it; None: any.

    Raises:
        FrameError: the file cannot be read, is no whole image, too large, or of another size.
    """
    header, encoded = _encoded(path)
    if header is not None and (fault := _size_fault(path, header, size)):
        raise FrameError(fault)
    bgr = _decode(path, encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    rgb = bgr[..., ::-1]
    found = (bgr.shape[1], bgr.shape[0])
    if size is not None and found != size:
        if header is None or found[::-1] != size:
            raise FrameError(_size_fault(path, ImageHeader(*found), size))
        rgb = _turned(rgb, header.orientation)
    return np.ascontiguousarray(rgb, dtype=np.uint8)


def _turned(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The image for display, given an orientation of 5 to 8, which swap its sides."""
    swapped = image.transpose(1, 0, 2)
    return {5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1]}[orientation]


def read_depth_m(path: Path, unit_m: float) -> NDArray[np.float32]:
    """Return a depth image (H, W) in metres, 0 where nothing was measured (counts of 0 and 65535).

    Args:
        path: of a 16-bit image of one channel.
        unit_m: metres of one count.

    Raises:
        FrameError: the file cannot be read, or is no such image.
    """
    header, encoded = _encoded(path)
    if header is not None and (fault := _size_fault(path, header, None)):
        raise FrameError(fault)
    raw = _decode(path, encoded, cv2.IMREAD_UNCHANGED)
    if raw.dtype != np.uint16 or raw.ndim != 2:
        raise FrameError(f"'{path}' is not a 16-bit depth image.")
    return np.asarray(np.where(raw == NO_MEASUREMENT, 0, raw).astype(np.float32) * np.float32(unit_m))


def _encoded(path: Path) -> tuple[ImageHeader | None, bytes]:
    try:
        encoded = read_bytes(path)
    except OSError as error:
        raise FrameError(f"'{path}' cannot be read: {error.strerror}.") from error
    stream = io.BytesIO(encoded)
    header = image_header(stream)
    if header is not None and not _is_whole(stream):
        raise FrameError(f"'{path}' is cut off: its end is missing.")
    return header, encoded


def _decode(path: Path, encoded: bytes, flags: int) -> NDArray[Any]:
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    except cv2.error:  # more pixels than OpenCV was told to take
        pixels = None
    if pixels is None:
        raise FrameError(f"'{path}' is not a readable image.")
    return np.asarray(pixels)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of the stored pixels of an image file.

    Raises:
        FrameError: it is none.
    """
    try:
        with open_plain(path) as stream:
            header = image_header(stream)
    except OSError as error:
        raise FrameError(f"'{path}' cannot be read: {error.strerror}.") from error
    if header is not None and not (fault := _size_fault(path, header, None)):
        return header.width, header.height
    if header is not None:
        raise FrameError(fault)
    image = read_image(path)
    return image.shape[1], image.shape[0]


def usual_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Return the width and height that most of some images have, of a few, evenly chosen, that can be read.

    Raises:
        FrameError: none can; the message is the first one's.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    first: FrameError | None = None
    step = max(1, len(paths) // SIZE_PROBES)
    for path in (*paths[::step], *paths):
        try:
            sizes[image_size(path)] += 1
        except FrameError as error:
            first = first or error
        if sum(sizes.values()) >= SIZE_PROBES:
            break
    if not sizes:
        raise first or FrameError("There is no image.")
    return sizes.most_common(1)[0][0]


def read_array(path: Path) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, whose header may not announce more than the file holds.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: it is no such file, or holds objects.
    """
    return _array(read_bytes(path))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` file by name; one that holds a hundred times its own size is refused.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: an array is damaged, holds objects, or the archive unpacks to too much.
        zipfile.BadZipFile: it is no archive.
    """
    data = read_bytes(path)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        size = sum(member.file_size for member in members)
        if size > MAX_RATIO * len(data) + FREE_BYTES:
            raise ValueError(f"it would unpack to {size} bytes, from {len(data)}")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _array(data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version {version} is not known")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, and nothing is unpickled here")
    announced = dtype.itemsize * math.prod(shape)
    if announced != len(data) - stream.tell():
        raise ValueError(f"it announces {announced} bytes and holds {len(data) - stream.tell()}")
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def check_tensor_list(start: bytes) -> None:
    """Have the list of tensors at the start of a safetensors file, whose first 8 bytes are its length, be short.

    Raises:
        ValueError: it is longer than that of any network; reading it takes a hundred times as much memory.
    """
    if len(start) < 8 or int.from_bytes(start[:8], "little") > MAX_TENSOR_LIST_BYTES:
        raise ValueError("the list of its tensors is longer than that of any network")


def check_tensor_file(path: Path) -> None:
    """Have a safetensors file be a plain one, with a list of tensors that can be read.

    Raises:
        OSError: it is missing, or a folder, pipe or device.
        ValueError: see :func:`check_tensor_list`.
    """
    with open_plain(path) as stream:
        check_tensor_list(stream.read(8))
