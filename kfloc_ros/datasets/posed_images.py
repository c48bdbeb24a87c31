# SPDX-License-Identifier: Apache-2.0
"""Image files with poses, of one camera or several, as a source: what most datasets and tools come down to."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import recordings
from kfloc_ros.datasets.image_headers import header_of, is_turned
from kfloc_ros.datasets.images import image_fault, image_size, read_depth_m, read_image, register_depth
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import read_bytes, read_text
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import DISTORTION_LENGTHS, Camera, ImageAdapter, known_coefficients
from kfloc_ros.geometry.lie import is_rotation, make_pose, quaternion_to_matrix
from kfloc_ros.types import Frame, Matrix

CALIBRATION_FILE = "camera.txt"
MAX_POSITION_M = 1e8
QUATERNION_LENGTHS = 1e-6, 1e6
"""Of quaternions that a rotation can be told from."""
SAME_SHAPE = 0.03
"""Logarithm of the largest ratio of the shapes of a depth image and its image: ScanNet's are 640x480 and 1296x968."""
RESIZED, RESIZED_AGREE = 1.2, 0.1
"""From this factor on between principal point and middle, alike in both directions, images count as resized."""


@dataclass(frozen=True, eq=False)
class PosedImage:
    """One image file and what is known about it."""

    path: Path
    name: str
    stamp_ns: int
    camera: Camera
    T_map_camera: Matrix | None
    depth_path: Path | None = None
    upright: bool = False
    """True if the camera is that of the image turned as EXIF's orientation says."""


@dataclass(frozen=True)
class DepthFiles:
    """How the depth images of a source are to be read."""

    unit_m: float
    """Metres of one count of a 16-bit image."""
    camera: Camera | None = None
    """Pinhole of the depth images where it is not that of the colour images; both share one centre and axes."""


class PosedImages(FrameSource):
    """Image files in order; images of other cameras are brought to the camera that most of them have.

    Args:
        name: for reports.
        images: in temporal order.
        depth: how to read depth images; None leaves them out.

    Raises:
        SourceError: there is no image.
    """

    def __init__(self, name: str, images: Sequence[PosedImage], *, depth: DepthFiles | None = None) -> None:
        if not images:
            raise SourceError(f"'{name}' has no images.")
        self.name = name
        self._images = list(images)
        self._depth_files = depth
        cameras = Counter(image.camera for image in images)
        usual = cameras.most_common(1)[0][0]
        self._camera = usual if len(cameras) == 1 else usual.pinhole()

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._images)

    def indices(self) -> Sequence[int]:
        return range(len(self._images))

    def sequences(self) -> Sequence[int]:
        return recordings([0] * len(self), [image.stamp_ns for image in self._images])

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self._images))[position]
        frame = self.recorded(index)
        adapter = self.adapter(index)
        if adapter is None:
            return frame
        depth_m = None if frame.depth_m is None else adapter.nearest(frame.depth_m)
        return replace(frame, image=adapter(frame.image), camera=self._camera, depth_m=depth_m)

    def recorded(self, position: int) -> Frame:
        index = range(len(self._images))[position]
        image = self._images[index]
        rgb = read_image(image.path, (image.camera.width, image.camera.height), upright=image.upright)
        return Frame(rgb, image.camera, image.stamp_ns, index, image.name, self._depth(image), image.T_map_camera)

    def own_camera(self, position: int) -> Camera:
        return self._images[position].camera

    def fault(self, position: int) -> str:
        image = self._images[position]
        found = image_fault(image.path, (image.camera.width, image.camera.height))
        if not found and self._depth_files is not None and image.depth_path is not None:
            found = image_fault(image.depth_path)
            header = None if found or self._depth_files.camera is not None else header_of(image.depth_path)
            if header is not None:
                found = _shape_fault(image, (header.width, header.height))
        return found

    def pose(self, position: int) -> Matrix | None:
        return self._images[position].T_map_camera

    def stamp_ns(self, position: int) -> int:
        return self._images[position].stamp_ns

    def adapter(self, index: int) -> ImageAdapter | None:
        """What brings an image to the source's camera, or None where it has that camera."""
        camera = self._images[index].camera
        return None if camera == self._camera else self._adapters.setdefault(camera, ImageAdapter(camera, self._camera))

    def encoded_image(self, position: int) -> bytes | None:
        image = self._images[position]
        if image.camera != self._camera or (image.upright and is_turned(image.path)):
            return None
        return encoded_jpeg(image.path, self._camera)

    @cached_property
    def _adapters(self) -> dict[Camera, ImageAdapter]:
        return {}

    def _depth(self, image: PosedImage) -> NDArray[np.float32] | None:
        files = self._depth_files
        if files is None or image.depth_path is None:
            return None
        depth_m = read_depth_m(image.depth_path, files.unit_m)
        if files.camera is not None:
            if depth_m.shape != (files.camera.height, files.camera.width):
                raise FrameError(f"'{image.depth_path}' has not the size of its camera.")
            return register_depth(depth_m, files.camera, image.camera, np.eye(4))
        size = (image.camera.width, image.camera.height)
        if fault := _shape_fault(image, (depth_m.shape[1], depth_m.shape[0])):
            raise FrameError(fault)
        if depth_m.shape != size[::-1]:
            depth_m = np.asarray(cv2.resize(depth_m, size, interpolation=cv2.INTER_NEAREST), dtype=np.float32)
        return depth_m


def _shape_fault(image: PosedImage, size: tuple[int, int]) -> str:
    """A sentence if a depth image has another shape than its image, whose pixels are then not its own; else empty."""
    width, height = image.camera.width, image.camera.height
    if abs(np.log(size[0] / size[1] * height / width)) < SAME_SHAPE:
        return ""
    return (
        f"'{image.depth_path}' is {size[0]}x{size[1]} and its image {width}x{height}: depth of another shape is not "
        "registered to the colour camera. Register it, or take the depth away."
    )


def check_centre(camera: Camera, where: str) -> None:
    """Refuse intrinsics whose principal point is that of an image of another size, such as one before it was resized.

    Args:
        camera: intrinsics from a file without a size, and the size of the images.
        where: the file, for the error.

    Raises:
        SourceError: both coordinates of the principal point lie off the middle by nearly one factor.
    """
    across, down = (2 * camera.cx + 1) / camera.width, (2 * camera.cy + 1) / camera.height
    scaled = max(across, down) < 1 / RESIZED or min(across, down) > RESIZED
    if scaled and abs(across - down) < RESIZED_AGREE * max(across, down):
        size = f"{round(camera.width * across)}x{round(camera.height * down)}"
        raise SourceError(
            f"The intrinsics in '{where}' (principal point {camera.cx:g}, {camera.cy:g}) fit images of about {size}, "
            f"and the images are {camera.width}x{camera.height}. Write those of the resized images there."
        )


def read_calibration(path: Path) -> Camera:
    """Return the camera of a ``camera.txt``: ``width height fx fy cx cy`` and the distortion, on one line.

    The distortion is nothing, 4 or 5 coefficients of ``plumb_bob`` or 8 of ``rational_polynomial``, or one of these
    names, or ``equidistant``, and its coefficients; zeros beyond them are left out.

    Raises:
        SourceError: the file is not such a line, or its numbers are no camera's.
    """
    try:
        words = read_text(path).split()
        numbers = [float(word) for word in words[:6]]
        named = words[6:7] if words[6:7] and words[6] in DISTORTION_LENGTHS else []
        values = [float(word) for word in words[6 + len(named) :]]
        if len(numbers) != 6 or not all(side.is_integer() for side in numbers[:2]):
            raise ValueError("the size of the image and four intrinsics are needed")
        model = named[0] if named else "plumb_bob" if not any(values[5:]) else "rational_polynomial"
        if not values and model == "plumb_bob":
            model = "none"
        width, height, fx, fy, cx, cy = numbers
        return Camera(int(width), int(height), fx, fy, cx, cy, model, known_coefficients(model, values))
    except (OSError, ValueError, FrameError) as error:
        raise SourceError(
            f"'{path}' is not 'width height fx fy cx cy' and distortion (none, 4, 5 or 8 coefficients, or a model's "
            f"name and its coefficients): {error}"
        ) from error


def write_calibration(path: Path, camera: Camera) -> None:
    """Write a ``camera.txt`` that :func:`read_calibration` reads as the same camera."""
    values = " ".join(map(repr, (camera.fx, camera.fy, camera.cx, camera.cy)))
    name = "" if camera.distortion_model in ("none", "plumb_bob") else f" {camera.distortion_model}"
    lens = "".join(f" {value!r}" for value in camera.distortion)
    path.write_text(f"{camera.width} {camera.height} {values}{name}{lens}\n", encoding="utf-8")


def encoded_jpeg(path: Path, camera: Camera) -> bytes | None:
    """Return a JPEG file as it is, if that is the image of a camera; None for other files, and turned images."""
    if path.suffix.lower() not in (".jpg", ".jpeg") or image_size(path) != (camera.width, camera.height):
        return None
    return read_bytes(path)


def usable_pose(T: Matrix) -> Matrix | None:
    """Return a pose (4, 4); None where it is none: not finite, no rotation, or farther away than anything on Earth."""
    return T if is_rotation(T[:3, :3]) and np.isfinite(T).all() and np.abs(T[:3, 3]).max() < MAX_POSITION_M else None


def pose_of_row(translation: Sequence[float], quaternion_xyzw: Sequence[float]) -> Matrix | None:
    """Return the pose (4, 4) of a translation and a quaternion in a list; None where a number is not finite or absurd,
    or the quaternion is zero, as programs write it where they have no pose.

    Raises:
        ValueError: numbers are missing.
    """
    if len(translation) != 3 or len(quaternion_xyzw) != 4:
        raise ValueError("a pose has a translation of three numbers and a quaternion of four")
    low, high = QUATERNION_LENGTHS
    if not low <= math.hypot(*quaternion_xyzw) <= high or not all(abs(value) < MAX_POSITION_M for value in translation):
        return None
    return make_pose(quaternion_to_matrix(quaternion_xyzw), translation)


def frame_number(path: Path) -> int:
    """Return the number in a name such as ``frame-000012.color.png``.

    Raises:
        SourceError: it has none.
    """
    found = re.fullmatch(r"frame-([0-9]{1,9})\.color\.\w+", path.name)
    if found is None:
        raise SourceError(f"'{path}' has not a name such as frame-000012.color.png.")
    return int(found[1])


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that puts ``image_10`` after ``image_9``; longer runs of digits than of a number count as text."""
    parts = (part for part in re.split(r"([0-9]+)", name) if part)
    return [(0, int(part), "") if "0" <= part[0] <= "9" and len(part) < 20 else (1, 0, part) for part in parts]
