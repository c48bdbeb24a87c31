# SPDX-License-Identifier: Apache-2.0
"""Image files with poses, of one camera or several, as a source: what most datasets and tools come down to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.depth import register_depth
from kfloc_ros.datasets.derived import recordings
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import DISTORTION_LENGTHS, Camera, ImageAdapter, known_coefficients
from kfloc_ros.types import Frame, Matrix

CALIBRATION_FILE = "camera.txt"


@dataclass(frozen=True, eq=False)
class PosedImage:
    """One image file and what is known about it."""

    path: Path
    name: str
    stamp_ns: int
    camera: Camera
    T_map_camera: Matrix | None
    depth_path: Path | None = None


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
        image = self._images[index]
        bgr = cv2.imread(str(image.path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if bgr is None:
            raise SourceError(f"'{image.path}' is not a readable image.")
        rgb = np.ascontiguousarray(bgr[..., ::-1])
        depth_m = self._depth(image)
        if rgb.shape[:2] != (image.camera.height, image.camera.width):
            raise SourceError(
                f"'{image.path}' is {rgb.shape[1]}x{rgb.shape[0]} but its camera is "
                f"{image.camera.width}x{image.camera.height}."
            )
        adapter = self.adapter(index)
        if adapter is not None:
            rgb = adapter(rgb)
            depth_m = None if depth_m is None else adapter.nearest(depth_m)
        return Frame(rgb, self._camera, image.stamp_ns, index, image.name, depth_m, image.T_map_camera)

    def pose(self, position: int) -> Matrix | None:
        return self._images[position].T_map_camera

    def adapter(self, index: int) -> ImageAdapter | None:
        """What brings an image to the source's camera, or None where it has that camera."""
        camera = self._images[index].camera
        return None if camera == self._camera else self._adapters.setdefault(camera, ImageAdapter(camera, self._camera))

    def encoded_image(self, position: int) -> bytes | None:
        image = self._images[position]
        whole = image.path.suffix.lower() in (".jpg", ".jpeg") and image.camera == self._camera
        return image.path.read_bytes() if whole else None

    @cached_property
    def _adapters(self) -> dict[Camera, ImageAdapter]:
        return {}

    def _depth(self, image: PosedImage) -> NDArray[np.float32] | None:
        files = self._depth_files
        if files is None or image.depth_path is None:
            return None
        raw = cv2.imread(str(image.depth_path), cv2.IMREAD_UNCHANGED)
        if raw is None or raw.dtype != np.uint16 or raw.ndim != 2:
            raise SourceError(f"'{image.depth_path}' is not a 16-bit depth image.")
        depth_m = np.where(raw == 65535, 0, raw).astype(np.float32) * np.float32(files.unit_m)
        if files.camera is not None:
            if depth_m.shape != (files.camera.height, files.camera.width):
                raise SourceError(f"'{image.depth_path}' has not the size of its camera.")
            return register_depth(depth_m, files.camera, image.camera, np.eye(4))
        size = (image.camera.width, image.camera.height)
        if depth_m.shape != size[::-1]:
            depth_m = np.asarray(cv2.resize(depth_m, size, interpolation=cv2.INTER_NEAREST), dtype=np.float32)
        return depth_m


def read_calibration(path: Path) -> Camera:
    """Return the camera of a ``camera.txt``: ``width height fx fy cx cy`` and the distortion, on one line.

    The distortion is nothing, 4 or 5 coefficients of ``plumb_bob`` or 8 of ``rational_polynomial``, or one of these
    names, or ``equidistant``, and its coefficients; zeros beyond them are left out.

    Raises:
        SourceError: the file is not such a line, or its numbers are no camera's.
    """
    try:
        words = path.read_text(encoding="utf-8").split()
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


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that puts ``image_10`` after ``image_9``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def inside(folder: Path, name: str) -> Path:
    """A file that a dataset names, which must lie in the dataset's own folder.

    Raises:
        SourceError: the name leads elsewhere.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SourceError(f"The name '{name}' leads out of the folder '{folder}'.")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file.

    Raises:
        SourceError: it is none.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise SourceError(f"'{path}' is not a readable image.")
    return image.shape[1], image.shape[0]
