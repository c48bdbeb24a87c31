# SPDX-License-Identifier: Apache-2.0
"""COLMAP's cameras and pixels, converted from and to :class:`Camera`, and its models, read from disk.

Only this module knows COLMAP's pixel centres at .5. The reader checks counts before it takes memory, and refuses files
that contradict each other. Two kinds of stale files are the reason. A program that knows only ``cameras``, ``images``
and ``points3D`` leaves ``frames`` and ``rigs`` (COLMAP 3.12 and later) unchanged when it moves or scales a model, and
COLMAP takes their poses. A program that writes text leaves the binary files beside it, and COLMAP reads those first.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import number, open_plain, read_bytes
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, is_farther, make_pose, quaternion_to_matrix

LOG = logging.getLogger(__name__)
PIXEL_SHIFT = 0.5
"""COLMAP's pixel (0, 0) is the corner of the top-left pixel; here it is that pixel's centre."""
_ZERO = -1
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

_LAYOUTS: dict[str, tuple[int, str, tuple[int, ...]]] = {
    # number of focal lengths, distortion model, position of each of its coefficients in COLMAP's parameters
    "SIMPLE_PINHOLE": (1, "none", ()),
    "PINHOLE": (2, "none", ()),
    "SIMPLE_RADIAL": (1, "plumb_bob", (3, _ZERO, _ZERO, _ZERO)),
    "RADIAL": (1, "plumb_bob", (3, 4, _ZERO, _ZERO)),
    "OPENCV": (2, "plumb_bob", (4, 5, 6, 7)),
    "FULL_OPENCV": (2, "rational_polynomial", (4, 5, 6, 7, 8, 9, 10, 11)),
    "OPENCV_FISHEYE": (2, "equidistant", (4, 5, 6, 7)),
    "SIMPLE_RADIAL_FISHEYE": (1, "equidistant", (3, _ZERO, _ZERO, _ZERO)),
    "RADIAL_FISHEYE": (1, "equidistant", (3, 4, _ZERO, _ZERO)),
}
COLMAP_MODELS = tuple(_LAYOUTS)


def pixels_from_colmap(xy: ArrayLike) -> NDArray[np.float64]:
    """Return pixels (..., 2) whose centres are whole numbers, given COLMAP's, whose centres are at .5."""
    return np.asarray(xy, dtype=np.float64) - PIXEL_SHIFT


def pixels_to_colmap(uv: ArrayLike) -> NDArray[np.float64]:
    """Return COLMAP's pixels (..., 2), whose centres are at .5, given pixels whose centres are whole numbers."""
    return np.asarray(uv, dtype=np.float64) + PIXEL_SHIFT


def camera_from_parameters(model: str, width: int, height: int, parameters: Sequence[float]) -> Camera:
    """Return the camera of a COLMAP model's name, size and parameters, as in ``cameras.txt`` and in query lists.

    Raises:
        FrameError: an unknown model, a wrong number of parameters, or invalid intrinsics.
    """
    if model not in _LAYOUTS:
        raise FrameError(
            f"The COLMAP camera model '{model}' is not supported; known: {', '.join(COLMAP_MODELS)}. Undistort the "
            "model and its images to a pinhole camera first (`colmap image_undistorter`)."
        )
    focal, kind, places = _LAYOUTS[model]
    wanted = focal + 2 + sum(place != _ZERO for place in places)
    if len(parameters) != wanted:
        raise FrameError(f"The COLMAP camera model {model} takes {wanted} parameters, got {len(parameters)}.")
    values = [float(value) for value in parameters]
    cx, cy = values[focal : focal + 2]
    distortion = tuple(0.0 if place == _ZERO else values[place] for place in places)
    if kind != "equidistant" and not any(distortion):
        kind, distortion = "none", ()
    return Camera(
        int(width), int(height), values[0], values[focal - 1], cx - PIXEL_SHIFT, cy - PIXEL_SHIFT, kind, distortion
    )


def camera_from_colmap(camera: Any) -> Camera:
    """Return the camera of a ``pycolmap.Camera``, of a named tuple, or of a mapping with model, width, height, params.

    Raises:
        FrameError: see :func:`camera_from_parameters`.
    """
    read = camera.__getitem__ if isinstance(camera, dict) else lambda name: getattr(camera, name)
    model = read("model")
    return camera_from_parameters(
        str(getattr(model, "name", model)), read("width"), read("height"), [float(v) for v in read("params")]
    )


def camera_to_colmap(camera: Camera) -> tuple[str, list[float]]:
    """Return name and parameters of the COLMAP model that is equivalent to a camera."""
    fx, fy, cx, cy = camera.fx, camera.fy, camera.cx + PIXEL_SHIFT, camera.cy + PIXEL_SHIFT
    d = camera.distortion
    if camera.distortion_model == "equidistant":
        return "OPENCV_FISHEYE", [fx, fy, cx, cy, *d]
    if any(d[4:]):
        return "FULL_OPENCV", [fx, fy, cx, cy, *(*d, 0.0, 0.0, 0.0)[:8]]
    if any(d):
        return "OPENCV", [fx, fy, cx, cy, *d[:4]]
    return "PINHOLE", [fx, fy, cx, cy]


NAMES = ("cameras", "images", "points3D")
OPTIONAL = ("rigs", "frames")
AGREE_DEG, AGREE_SHARE = 0.05, 1e-3
"""Largest differences between poses of one image in two files: an angle, and a share of the model's extent."""
COMPARED_POINTS = 100


class Stored(NamedTuple):
    """Pose of one image in ``images``, from the world to the camera."""

    quaternion_wxyz: tuple[float, ...]
    translation: tuple[float, ...]


def read_model(folder: Path) -> Any:
    """Return the ``pycolmap.Reconstruction`` of a folder with a model, binary or text.

    Raises:
        SourceError: a file is missing, damaged, no plain file, announces more than it holds, or contradicts another.
    """
    import pycolmap

    end = ".bin" if all((folder / f"{name}.bin").is_file() for name in NAMES) else ".txt"
    try:
        for name in (*NAMES, *OPTIONAL):
            path = folder / f"{name}{end}"
            if name in NAMES or path.exists():
                open_plain(path).close()
                if end == ".bin":
                    _COUNTED[name](read_bytes(path))
                elif name == "cameras":
                    _check_text_cameras(path)
        model = pycolmap.Reconstruction(str(folder))
        observed, known = (image.get_observation_points2D() for image in model.images.values()), set(model.points3D)
        if not all(known.issuperset(point.point3D_id for point in points) for points in observed):
            raise ValueError("an image sees a point that the model does not have")
    except OSError as error:
        raise SourceError(f"The COLMAP model '{folder}' cannot be read: {error}.") from error
    except (RuntimeError, ValueError, IndexError, MemoryError, struct.error) as error:
        raise SourceError(f"The COLMAP model '{folder}' is damaged: {error}") from error
    stored = dict(_images_of_text(folder) if end == ".txt" else _images_of_bytes(read_bytes(folder / "images.bin")))
    if (folder / f"frames{end}").is_file() and (name := _differing(model, stored)):
        raise SourceError(
            f"In the COLMAP model '{folder}', images{end} and frames{end} hold different poses, for example of "
            f"'{name}'. If another program changed the model, frames{end} and rigs{end} are the old ones: delete both."
        )
    _leave_out_unturned(folder, model, stored)
    if end == ".bin" and all((folder / f"{name}.txt").is_file() for name in NAMES):
        _check_text(folder, model)
    return model


def _leave_out_unturned(folder: Path, model: Any, stored: dict[str, Stored]) -> None:
    """Take the pose from images whose quaternion has no length, which COLMAP reads as no rotation at all."""
    names = {name for name, (q, _) in stored.items() if not any(abs(value) > 1e-6 for value in q)}
    for image in [image for image in model.images.values() if str(image.name) in names and image.has_pose]:
        model.deregister_frame(image.frame_id)
    if names:
        LOG.warning("%d images of '%s' have a quaternion of zero, such as '%s'.", len(names), folder, min(names))


def _check_text(folder: Path, model: Any) -> None:
    """Refuse a binary model beside a text model with other content."""
    try:
        other = _differing(model, dict(_images_of_text(folder)))
        other = other or _differing_camera(folder, model) or _differing_point(folder, model)
    except (OSError, ValueError, IndexError, OverflowError) as error:
        raise SourceError(f"The text files of the COLMAP model '{folder}' are damaged: {error}") from error
    if other:
        raise SourceError(
            f"The COLMAP model '{folder}' is there twice, as .bin and as .txt, and the two differ, for example in "
            f"'{other}'. Delete the one that is out of date."
        )


def _differing(model: Any, stored: dict[str, Stored]) -> str:
    """Return the name of an image whose pose differs from the model's, or that only one has; empty if there is none."""
    posed = (image for image in model.images.values() if image.has_pose)
    poses = {str(image.name): _matrix(image.cam_from_world().matrix()) for image in posed}
    centres = np.array([T[:3, 3] for T in poses.values() if np.isfinite(T).all()]).reshape(-1, 3)
    extent = float(np.linalg.norm(np.ptp(centres, axis=0))) if len(centres) else 0.0
    for name, T in poses.items():
        if name not in stored:
            return name
        (w, x, y, z), t = stored[name]
        if not (np.isfinite([w, x, y, z, *t]).all() and np.isfinite(T).all()):
            continue
        other = inverse_pose(make_pose(quaternion_to_matrix((x, y, z, w)), t))
        if is_farther(T, other, AGREE_SHARE * max(extent, 1e-9), AGREE_DEG):
            return name
    registered = {str(image.name) for image in model.images.values()}
    return next((name for name in stored if name not in registered), "")


def _matrix(cam_from_world: Any) -> NDArray[np.float64]:
    matrix = np.asarray(cam_from_world, dtype=np.float64)
    return inverse_pose(make_pose(matrix[:3, :3], matrix[:3, 3]))


def _differing_camera(folder: Path, model: Any) -> str:
    for words in _text_rows(folder / "cameras.txt"):
        if int(words[0]) not in model.cameras:
            return f"camera {words[0]}"
        known = model.cameras[int(words[0])]
        listed, values = [float(value) for value in words[2:]], [known.width, known.height, *known.params]
        if len(listed) != len(values) or not np.allclose(listed, values, rtol=AGREE_SHARE, atol=1e-6):
            return f"camera {words[0]}"
    return ""


def _differing_point(folder: Path, model: Any) -> str:
    for words in islice(_text_rows(folder / "points3D.txt"), COMPARED_POINTS):
        ident = int(words[0])
        if ident not in model.points3D:
            return f"point {words[0]}"
        listed, known = np.array([float(value) for value in words[1:4]]), np.asarray(model.points3D[ident].xyz)
        if np.linalg.norm(listed - known) > AGREE_SHARE * max(float(np.linalg.norm(known)), 1e-9):
            return f"point {words[0]}"
    return ""


def _text_rows(path: Path) -> Iterator[list[str]]:
    """Words of the lines of a text file of COLMAP that are neither empty nor comments."""
    with open_plain(path) as stream:
        for line in stream:
            words = line.decode("utf-8", errors="replace").split()
            if words and not words[0].startswith("#"):
                yield words


def _images_of_text(folder: Path) -> Iterator[tuple[str, Stored]]:
    """Names and poses of ``images.txt``; of its two lines an image, the second holds observations and may be empty."""
    path = folder / "images.txt"
    with open_plain(path) as stream:
        lines = (line for line in stream if not line.lstrip().startswith(b"#"))
        for line in lines:
            words = line.decode("utf-8", errors="replace").split(maxsplit=9)
            if not words:
                continue
            try:
                values = [number(word) for word in words[1:8]]
                yield words[9].rstrip("\r\n"), Stored(tuple(values[:4]), tuple(values[4:]))
            except (ValueError, IndexError) as error:
                raise SourceError(f"'{path}' is damaged: {error}.") from error
            next(lines, b"")


def _images_of_bytes(data: bytes) -> Iterator[tuple[str, Stored]]:
    """Names and poses of ``images.bin``."""
    (count,), at = struct.unpack_from("<Q", data), 8
    _fits(count, 73, data, at)
    for _ in range(count):
        values = struct.unpack_from("<7d", data, at + 4)
        end = data.index(b"\0", at + 64)
        yield data[at + 64 : end].decode("utf-8", errors="replace"), Stored(values[:4], values[4:])
        (points,) = struct.unpack_from("<Q", data, end + 1)
        at = end + 9
        _fits(points, 24, data, at)
        at += 24 * points


def _fits(count: int, least_bytes: int, data: bytes, at: int) -> None:
    if count * least_bytes > len(data) - at:
        raise ValueError(f"a file announces {count} entries in {len(data) - at} bytes")


def _count_cameras(data: bytes) -> None:
    """Check that ``cameras.bin`` ends with its last camera: COLMAP repeats the last value for missing ones."""
    (count,), at = struct.unpack_from("<Q", data), 8
    _fits(count, 48, data, at)
    for _ in range(count):
        ident, model = struct.unpack_from("<Ii", data, at)
        at += 24 + 8 * _parameter_count(str(ident), model)
    if at != len(data):
        raise ValueError(f"the cameras in cameras.bin take {at} bytes, and it has {len(data)}")


def _check_text_cameras(path: Path) -> None:
    """Check number, model, size and parameters of each camera of a ``cameras.txt``."""
    for camera, *words in _text_rows(path):
        wanted = _parameter_count(camera, words[0] if words else "")
        numbers = [word for word in words[1:] if _NUMBER.fullmatch(word)]
        whole = all(word.isdecimal() for word in (camera, *words[1:3]))
        if not whole or len(numbers) != len(words) - 1 or len(numbers) != 2 + wanted:
            raise ValueError(
                f"in cameras.txt, '{' '.join([camera, *words])}' is not a number, {words[0]}, width and height in "
                f"whole pixels and {wanted} finite parameters"
            )


def _parameter_count(camera: str, model: str | int) -> int:
    import pycolmap

    for name, value in pycolmap.CameraModelId.__members__.items():
        if int(value) >= 0 and model in (name, int(value)):
            return len(pycolmap.Camera.create_from_model_id(1, value, 1.0, 2, 2).params)
    raise ValueError(f"camera {camera} has the model '{model}', and COLMAP has none of that name or number")


def _count_points(data: bytes) -> None:
    (count,), at = struct.unpack_from("<Q", data), 8
    _fits(count, 51, data, at)
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        (length,) = length_at(data, at + 43)
        at += 51 + 8 * length
        if at > len(data):
            raise ValueError("a file ends in the middle of a point")


def _count_rigs(data: bytes) -> None:
    (count,), at = struct.unpack_from("<Q", data), 8
    _fits(count, 8, data, at)
    for _ in range(count):
        _, sensors = struct.unpack_from("<II", data, at)
        at += 8
        _fits(sensors, 8, data, at)
        for k in range(sensors):
            at += 8
            if k > 0:
                at += 1 + 56 * struct.unpack_from("<B", data, at)[0]


def _count_frames(data: bytes) -> None:
    (count,), at = struct.unpack_from("<Q", data), 8
    _fits(count, 68, data, at)
    for _ in range(count):
        (ids,) = struct.unpack_from("<I", data, at + 64)
        at += 68
        _fits(ids, 16, data, at)
        at += 16 * ids


_COUNTED = {
    "cameras": _count_cameras,
    "images": lambda data: list(_images_of_bytes(data)),
    "points3D": _count_points,
    "rigs": _count_rigs,
    "frames": _count_frames,
}
