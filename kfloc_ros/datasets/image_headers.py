# SPDX-License-Identifier: Apache-2.0
"""Headers of image files: size, orientation and focal length, without decoding a pixel. HEIC needs pillow-heif."""

from __future__ import annotations

import importlib.util
import io
import struct
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.files import open_plain

MAX_JPEG_SEGMENTS = 1000
HEIC_ENDINGS = (".heic", ".heif")
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF_ORIENTATION, _EXIF_MORE, _EXIF_FOCAL_35MM = 0x0112, 0x8769, 0xA405
_SHORT, _LONG = 3, 4
_HEIC_ERRORS = (ValueError, RuntimeError, EOFError, SyntaxError, OSError)


class ImageHeader(NamedTuple):
    """What the header of a PNG, JPEG or HEIC file says."""

    width: int
    height: int
    orientation: int = 1
    """EXIF's number, 1 to 8: how to turn the stored pixels for display; 1: not at all."""
    focal_35mm: int = 0
    """EXIF's focal length in millimetres of a 35 mm camera with the same angle of view; 0: not known."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height as displayed."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def header_of(path: Path) -> ImageHeader | None:
    """Return the header of a file; None if it is none of an image, or cannot be read."""
    try:
        with open_plain(path) as stream:
            return image_header(stream)
    except OSError:
        return None


def is_turned(path: Path) -> bool:
    """Return true if the stored pixels of a file are not upright."""
    header = header_of(path)
    return header is not None and header.orientation > 1


def image_header(stream: IO[bytes]) -> ImageHeader | None:
    """Return the header of a PNG, JPEG or (with pillow-heif) HEIC; None for anything else, or a damaged one."""
    start = stream.read(26)
    if start[4:8] == b"ftyp":
        return _heic_header(stream)
    if start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) == 26:
        width, height = struct.unpack(">II", start[16:24])
        return ImageHeader(width, height)
    if start[:2] != b"\xff\xd8":
        return None
    stream.seek(2)
    orientation, focal_35mm = 1, 0
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
            return ImageHeader(width, height, orientation, focal_35mm)
        if marker[1] == 0xE1:
            found = _exif(stream.read(max(size, 0)))
            orientation, focal_35mm = found[0] or orientation, found[1] or focal_35mm
        else:
            stream.seek(max(size, 0), io.SEEK_CUR)
    return None


def _exif(segment: bytes) -> tuple[int, int]:
    """EXIF's orientation, 1 to 8, and focal length for 35 mm film in millimetres; 0 where the segment has none."""
    tiff = segment[6:]
    if not segment.startswith(b"Exif\0\0") or tiff[:2] not in (b"II", b"MM"):
        return 0, 0
    order = "<" if tiff[:2] == b"II" else ">"
    orientation = focal_35mm = 0
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        tags = _exif_numbers(tiff, order, first)
        orientation = tags.get(_EXIF_ORIENTATION, 0)
        if _EXIF_MORE in tags:
            focal_35mm = _exif_numbers(tiff, order, tags[_EXIF_MORE]).get(_EXIF_FOCAL_35MM, 0)
    except struct.error:
        pass
    return orientation if 1 <= orientation <= 8 else 0, focal_35mm if 4 <= focal_35mm <= 2000 else 0


def _exif_numbers(tiff: bytes, order: str, offset: int) -> dict[int, int]:
    """The whole numbers of one directory of EXIF by their tags."""
    (count,) = struct.unpack_from(f"{order}H", tiff, offset)
    found = {}
    for k in range(count):
        place = offset + 2 + 12 * k
        tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
        if kind in (_SHORT, _LONG):
            (found[tag],) = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'I'}", tiff, place + 8)
    return found


def reads_heic() -> bool:
    """Return true if the optional library for HEIC photos, pillow-heif, is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def _heic_header(stream: IO[bytes]) -> ImageHeader | None:
    """Header of a HEIC photo; its pixels are always decoded upright."""
    if not reads_heic():
        return None
    import pillow_heif

    stream.seek(0)
    try:
        photo = pillow_heif.open_heif(stream)
        width, height = photo.size
        return ImageHeader(int(width), int(height), focal_35mm=_exif(photo.info.get("exif") or b"")[1])
    except _HEIC_ERRORS:
        return None


def decode_heic(path: Path, encoded: bytes) -> NDArray[np.uint8]:
    """Return the upright pixels (H, W, 3), RGB, of a HEIC photo.

    Raises:
        FrameError: it is damaged, or of another kind.
    """
    import pillow_heif

    try:
        photo = pillow_heif.open_heif(io.BytesIO(encoded), convert_hdr_to_8bit=True)
        pixels = np.asarray(photo)
    except _HEIC_ERRORS as error:
        raise FrameError(f"'{path}' is not a readable image: {error}.") from error
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise FrameError(f"'{path}' is not a colour image.")
    return np.ascontiguousarray(pixels[..., :3])
