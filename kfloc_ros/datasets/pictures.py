# SPDX-License-Identifier: Apache-2.0
"""Images without poses: a folder of photos, or a video. Structure from motion (``--sfm``) finds their poses."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import FRAME_PERIOD_NS, recordings, stamps_with_gaps
from kfloc_ros.datasets.image_headers import HEIC_ENDINGS, header_of, reads_heic
from kfloc_ros.datasets.images import usual_size
from kfloc_ros.datasets.posed_images import CALIBRATION_FILE, PosedImage, PosedImages, natural_key, read_calibration
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import MAX_IMAGE_PIXELS, check_count
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame

LOG = logging.getLogger(__name__)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
MAX_VIDEO_FRAMES = 100_000_000
VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
FILM_DIAGONAL_MM = math.hypot(36, 24)
GUESSED_FOCAL = 1.2
"""Focal length in longer sides, before it is known better; COLMAP's own first guess."""


class ImageFolder(PosedImages):
    """The images in a folder and its sub-folders, by name.

    The camera is that of ``camera.txt`` (see :func:`~kfloc_ros.datasets.posed_images.read_calibration`), and pixels are
    those stored in the files. Without that file, images are turned upright as EXIF says, images of the same size and
    EXIF focal length count as of one camera, and cameras are guesses, which structure from motion replaces.

    Raises:
        SourceError: no image, or a damaged ``camera.txt``.
    """

    def __init__(self, root: Path) -> None:
        files = image_files(root)
        if not files:
            what = "is no folder" if not root.is_dir() else f"has no image ({', '.join(IMAGE_ENDINGS)})"
            raise SourceError(f"'{root}' {what}. {_heic_sentence(root)}".rstrip())
        if sentence := _heic_sentence(root):
            LOG.warning("%s They are left out.", sentence)
        self._is_guess = not os.path.lexists(root / CALIBRATION_FILE)  # a broken link or a pipe there is refused
        if self._is_guess:
            cameras = _guessed_cameras(files)
        else:
            cameras = [read_calibration(root / CALIBRATION_FILE)] * len(files)
        names = [path.relative_to(root).with_suffix("").as_posix() for path in files]
        super().__init__(
            root.resolve().name,
            [
                PosedImage(path, name, stamp_ns, camera, None, upright=self._is_guess)
                for path, name, stamp_ns, camera in zip(
                    files, names, stamps_with_gaps([path.parent for path in files]), cameras, strict=True
                )
            ],
        )

    def sequences(self) -> Sequence[int]:
        return recordings([image.path.parent for image in self._images])

    @property
    def camera_is_guess(self) -> bool:
        return self._is_guess


class VideoFile(FrameSource):
    """Every so many frames of a video; the camera is that of a ``camera.txt`` beside it, or else a guess.

    Args:
        path: anything that OpenCV reads.
        step: take every ``step``-th frame.

    A video that ends before its header says so, as cut ones do, has the frames that can be read; a warning tells.

    Raises:
        SourceError: it cannot be read.
    """

    def __init__(self, path: Path, step: int = 1) -> None:
        self.name = path.stem
        self._path, self._step = path, step
        self._video = cv2.VideoCapture(str(path))
        told = int(self._video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = float(self._video.get(cv2.CAP_PROP_FPS))
        size = tuple(int(self._video.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if not self._video.isOpened() or not 1 <= told <= MAX_VIDEO_FRAMES or not size[0] * size[1] > 0:
            raise SourceError(f"'{path}' is not a video that can be read here.")
        if size[0] * size[1] > MAX_IMAGE_PIXELS:
            raise SourceError(f"'{path}' has {size[0]}x{size[1]} pixels, more than the {MAX_IMAGE_PIXELS} allowed.")
        self._next = 0
        self._period_ns = round(1e9 / rate) if 0 < rate < 1e5 else FRAME_PERIOD_NS
        count = self._readable(told)
        if count < 1:
            raise SourceError(f"No frame of the video '{path}' can be read.")
        self._numbers = range(0, count, step)
        if count < told:
            LOG.warning("'%s' says it has %d frames, and only %d can be read; these are used.", path, told, count)
        first = self._read(0)
        calibration = path.with_name(CALIBRATION_FILE)
        self._is_guess = not os.path.lexists(calibration)
        height, width = first.shape[:2]
        self._camera = guessed_camera(width, height) if self._is_guess else read_calibration(calibration)
        if (height, width) != (self._camera.height, self._camera.width):
            raise SourceError(f"'{calibration}' is of another camera: '{path}' is {width}x{height}.")

    def _readable(self, told: int) -> int:
        """Number of frames up to the last one that can be read, found by bisection where that is not the last."""
        if self._can_read(told - 1):
            return told
        low, high = 0, told - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._can_read(middle) else (low, middle)
        return low

    def _can_read(self, number: int) -> bool:
        try:
            self._read(number)
        except FrameError:
            return False
        return True

    @property
    def camera(self) -> Camera:
        return self._camera

    @property
    def camera_is_guess(self) -> bool:
        return self._is_guess

    def __len__(self) -> int:
        return len(self._numbers)

    def indices(self) -> Sequence[int]:
        return range(len(self._numbers))

    def __getitem__(self, position: int) -> Frame:
        index = range(len(self))[position]
        number = self._numbers[index]
        return Frame(self._read(number), self._camera, self.stamp_ns(index), index, f"{self.name}-{number}")

    def stamp_ns(self, position: int) -> int:
        return (self._numbers[position] + 1) * self._period_ns

    def _read(self, number: int) -> NDArray[np.uint8]:
        if number != self._next:
            self._video.set(cv2.CAP_PROP_POS_FRAMES, number)
        done, bgr = self._video.read()
        self._next = number + 1 if done else -1
        if not done:
            raise FrameError(f"Frame {number} of '{self._path}' cannot be read.")
        return np.ascontiguousarray(bgr[..., ::-1])


def image_files(root: Path) -> list[Path]:
    """The images in a folder and its sub-folders, in natural order; hidden and linked folders are left out.

    Raises:
        SourceError: there are more than can be looked at in some seconds.
    """
    endings = (*IMAGE_ENDINGS, *(HEIC_ENDINGS if reads_heic() else ()))
    return _files_below(root, endings)


def has_image_files(root: Path) -> bool:
    """Return true if there is an image right in a folder."""
    endings = (*IMAGE_ENDINGS, *HEIC_ENDINGS)
    return root.is_dir() and any(path.suffix.lower() in endings for path in root.iterdir())


def has_photos_only(root: Path) -> bool:
    """Return true if the images right in a folder are of kinds that cameras write, and never those of depth."""
    found = {path.suffix.lower() for path in root.iterdir()} if root.is_dir() else set()
    return bool(found & {".jpg", ".jpeg", *HEIC_ENDINGS}) and ".png" not in found


def _files_below(root: Path, endings: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder) / name for name in names if Path(name).suffix.lower() in endings and name[0] != "."]
        check_count(len(found), root)
    return sorted(found, key=lambda path: [natural_key(part) for part in path.relative_to(root).parts])


def _heic_sentence(root: Path) -> str:
    """Return what to do about HEIC photos in a folder that cannot be read; empty if there are none."""
    count = 0 if reads_heic() else len(_files_below(root, HEIC_ENDINGS))
    if not count:
        return ""
    return (
        f"'{root}' has {count} HEIC photos, which are read with `pip install pillow-heif`; or export them as JPEG "
        "(iPhone: Settings, Camera, Formats, Most Compatible)."
    )


def _guessed_cameras(files: Sequence[Path]) -> list[Camera]:
    """Return a guess for each image, by its size when upright and its EXIF focal length."""
    headers = [header_of(path) for path in files]
    told = [None if h is None or h.width * h.height == 0 else (*h.upright_size, h.focal_35mm) for h in headers]
    if not any(told):
        return [guessed_camera(*usual_size(files))] * len(files)
    usual = Counter(filter(None, told)).most_common(1)[0][0]
    kinds = [usual if kind is None else kind for kind in told]
    made = {kind: guessed_camera(*kind) for kind in set(kinds)}
    return [made[kind] for kind in kinds]


def guessed_camera(width: int, height: int, focal_35mm: int = 0) -> Camera:
    """Return a pinhole camera for images of a size.

    Args:
        width: of the images.
        height: of the images.
        focal_35mm: EXIF's focal length, of the same angle of view over the diagonal (43.3 mm on film); 0: not known.
    """
    focal = GUESSED_FOCAL * max(width, height)
    if focal_35mm:
        focal = focal_35mm * math.hypot(width, height) / FILM_DIAGONAL_MM
    return Camera(width, height, focal, focal, (width - 1) / 2, (height - 1) / 2)


def open_video(path: str) -> VideoFile:
    """``FILE`` or ``FILE?every=N``.

    Raises:
        SourceError: no such file, no video, or N is no positive number.
    """
    name, _, word = path.partition("?")
    key, _, value = word.partition("=")
    if word and (key != "every" or not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1):
        raise SourceError(f"'?{word}' after a video is not understood; write ?every=10 for every tenth frame.")
    if not Path(name).is_file():
        raise SourceError(f"There is no file '{name}'.")
    return VideoFile(Path(name), int(value) if word else 1)
