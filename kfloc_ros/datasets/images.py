# SPDX-License-Identifier: Apache-2.0
"""Image and depth files, and the depth of one camera in another."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.datasets.image_headers import HEIC_ENDINGS, ImageHeader, decode_heic, image_header, reads_heic
from kfloc_ros.device import compiled_loop, has_numba
from kfloc_ros.errors import FrameError
from kfloc_ros.files import MAX_FILE_BYTES, MAX_IMAGE_PIXELS, open_plain, read_bytes
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.distortion import Distortion
from kfloc_ros.messages.images import decode_file
from kfloc_ros.types import Matrix

NO_MEASUREMENT = 65535
"""Count of a 16-bit depth image that stands for nothing, as 0 does."""
SIZE_PROBES, TRIED_PATHS = 15, 2000
_TAIL_BYTES = 64


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
    if header is None and path.suffix.lower() in HEIC_ENDINGS and not reads_heic():
        return f"'{path}' is a HEIC photo, which is read with `pip install pillow-heif`."
    if header is None:
        checked = path.suffix.lower() in (".png", ".jpg", ".jpeg", *HEIC_ENDINGS)
        return f"'{path}' is not a readable image." if checked else ""
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
    kind = stream.read(8)
    if kind[4:] == b"ftyp":  # HEIC has no last mark; its decoder tells
        return True
    mark = b"IEND" if kind[:1] == b"\x89" else b"\xff\xd9"
    stream.seek(0, io.SEEK_END)
    stream.seek(max(start, stream.tell() - _TAIL_BYTES))
    if mark in stream.read(_TAIL_BYTES):
        return True
    stream.seek(start)
    return mark in stream.read(MAX_FILE_BYTES)


def read_image(path: Path, size: tuple[int, int] | None = None, *, upright: bool = False) -> NDArray[np.uint8]:
    """Return an image (H, W, 3), RGB, of the pixels as they are stored.

    EXIF's orientation is for display, and calibrations and poses are of the stored pixels. It is followed only where
    it makes an image, whose sides are swapped, fit its camera.

    Args:
        path: of the image.
        size: width and height of the camera that took it; None: any.
        upright: turn the pixels as EXIF's orientation says, always.

    Raises:
        FrameError: the file cannot be read, is no whole image, too large, or of another size.
    """
    header, encoded = _encoded(path)
    if header is not None and (fault := _size_fault(path, header, size)):
        raise FrameError(fault)
    if encoded[4:8] == b"ftyp" and header is not None:
        return decode_heic(path, encoded)
    bgr = _decode(path, encoded, cv2.IMREAD_COLOR)
    rgb = bgr[..., ::-1]
    if upright and header is not None:
        rgb = _turned(rgb, header.orientation)
        header = header._replace(orientation=1)
    found = (rgb.shape[1], rgb.shape[0])
    if size is not None and found != size:
        if header is None or found[::-1] != size:
            raise FrameError(_size_fault(path, ImageHeader(*found), size))
        rgb = _turned(rgb, header.orientation)
    return np.ascontiguousarray(rgb, dtype=np.uint8)


def _turned(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The image for display, given its orientation; 5 to 8 swap the sides."""
    swapped = image.transpose(1, 0, 2)
    turned = {
        2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1],
        5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1],
    }  # fmt: skip
    return turned.get(orientation, image)


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
    if header is None and path.suffix.lower() in HEIC_ENDINGS and not reads_heic():
        raise FrameError(f"'{path}' is a HEIC photo, which is read with `pip install pillow-heif`.")
    if header is None and path.suffix.lower() in (".png", ".jpg", ".jpeg"):  # another format under a wrong name
        raise FrameError(f"'{path}' is not a readable image.")
    return header, encoded


def _decode(path: Path, encoded: bytes, flags: int) -> NDArray[Any]:
    pixels = decode_file(encoded, flags)
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
    for path in (*paths[::step], *paths[:TRIED_PATHS]):
        try:
            sizes[image_size(path)] += 1
        except FrameError as error:
            first = first or error
        if sum(sizes.values()) >= SIZE_PROBES:
            break
    if not sizes:
        raise first or FrameError("There is no image.")
    return sizes.most_common(1)[0][0]


def one_to_one(camera: Camera, normalized_xy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rays (x/z, y/z), (N, 2), lie where a camera's distortion means something; see ``distortion.py``."""
    tensor = CameraTensor.from_camera(camera)
    r2 = (normalized_xy**2).sum(axis=1)
    squared = np.arctan(np.sqrt(r2)) ** 2 if tensor.kind is Distortion.FISHEYE else r2
    return np.asarray(squared < float(tensor.limit))


def register_depth(
    depth_m: NDArray[np.float32], source: Camera, target: Camera, T_target_source: Matrix
) -> NDArray[np.float32]:
    """Forward-project a depth image (H, W) of one camera into another, each with its own lens; nearest surface wins.

    Every sample fills a 2x2 patch, so that a slightly denser target grid has no pinholes.
    Returns (target.height, target.width) metres, 0 where nothing projects.
    """
    v, u = np.nonzero(depth_m > 0)
    z = depth_m[v, u].astype(np.float64)
    if source.is_pinhole:
        points = np.stack([(u - source.cx) / source.fx * z, (v - source.cy) / source.fy * z, z])
    else:
        pixels = torch.from_numpy(np.stack([u, v], axis=1).astype(np.float64))
        points = CameraTensor.from_camera(source).image2world(pixels).numpy().T * z
    points = T_target_source[:3, :3] @ points + T_target_source[:3, 3:]
    keep = points[2] > 1e-3
    x, y, z = points[:, keep]
    if target.is_pinhole:
        columns, lines = x / z * target.fx + target.cx, y / z * target.fy + target.cy
    else:
        rays = np.stack([x / z, y / z], axis=1)
        valid = one_to_one(target, rays)
        z = z[valid]
        columns, lines = target.distort(rays[valid]).T
    left = np.floor(columns).astype(np.int64)
    top = np.floor(lines).astype(np.int64)
    flat = np.full(target.height * target.width, np.inf, dtype=np.float32)
    if has_numba():
        _write_nearest(left, top, z, target.width, flat)
        flat[~np.isfinite(flat)] = 0.0
        return flat.reshape(target.height, target.width)
    order = np.argsort(-z)  # later writes win, so the nearest point is written last
    for du in (0, 1):
        for dv in (0, 1):
            cols, rows = (left + du)[order], (top + dv)[order]
            inside = (cols >= 0) & (cols < target.width) & (rows >= 0) & (rows < target.height)
            where = rows[inside] * target.width + cols[inside]
            layer = np.full_like(flat, np.inf)
            layer[where] = z[order][inside]
            np.minimum(flat, layer, out=flat)
    flat[~np.isfinite(flat)] = 0.0
    return flat.reshape(target.height, target.width)


@compiled_loop
def _write_nearest(
    left: NDArray[np.int64], top: NDArray[np.int64], z: NDArray[np.float64], width: int, flat: NDArray[np.float32]
) -> None:
    """Write each sample to the 2x2 pixels from (left, top) in rows of ``width``, where it is nearer than what is there.

    It takes a twentieth of the time of the sort that NumPy needs.
    """
    height = len(flat) // width
    for i in range(len(z)):
        value = np.float32(z[i])
        for row in range(max(top[i], 0), min(top[i] + 2, height)):
            for column in range(max(left[i], 0), min(left[i] + 2, width)):
                flat[row * width + column] = min(flat[row * width + column], value)
