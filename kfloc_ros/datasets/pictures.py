# SPDX-License-Identifier: Apache-2.0
"""Images without poses: a folder of photos, or a video. Structure from motion (``--sfm``) finds their poses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import FRAME_PERIOD_NS
from kfloc_ros.datasets.posed_images import CALIBRATION_FILE, PosedImage, PosedImages, natural_key, read_calibration
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Frame

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
GUESSED_FOCAL = 1.2
"""Focal length in longer sides, before it is known better; COLMAP's own first guess."""


class ImageFolder(PosedImages):
    """The images of one folder, by name, taken with one camera.

    The camera is that of ``camera.txt`` (see :func:`~kfloc_ros.datasets.posed_images.read_calibration`); without that
    file it is a guess, which structure from motion replaces.

    Raises:
        SourceError: no image, or a damaged ``camera.txt``.
    """

    def __init__(self, root: Path) -> None:
        files = sorted(image_files(root), key=lambda path: natural_key(path.name))
        if not files:
            raise SourceError(f"There is no image ({', '.join(IMAGE_ENDINGS)}) in '{root}'.")
        first = cv2.imread(str(files[0]), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if first is None:
            raise SourceError(f"'{files[0]}' is not a readable image.")
        self._is_guess = not (root / CALIBRATION_FILE).is_file()
        camera = guessed_camera(first) if self._is_guess else read_calibration(root / CALIBRATION_FILE)
        super().__init__(
            root.resolve().name,
            [PosedImage(path, path.stem, (k + 1) * FRAME_PERIOD_NS, camera, None) for k, path in enumerate(files)],
        )

    @property
    def camera_is_guess(self) -> bool:
        return self._is_guess


class VideoFile(FrameSource):
    """Every so many frames of a video; the camera is that of a ``camera.txt`` beside it, or else a guess.

    Args:
        path: anything that OpenCV reads.
        step: take every ``step``-th frame.

    Raises:
        SourceError: it cannot be read.
    """

    def __init__(self, path: Path, step: int = 1) -> None:
        self.name = path.stem
        self._path, self._step = path, step
        self._video = cv2.VideoCapture(str(path))
        count = int(self._video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = float(self._video.get(cv2.CAP_PROP_FPS))
        if not self._video.isOpened() or count < 1:
            raise SourceError(f"'{path}' is not a video that can be read here.")
        self._period_ns = round(1e9 / rate) if 0 < rate < 1e5 else FRAME_PERIOD_NS
        self._numbers = range(0, count, step)
        self._next = 0
        first = self._read(0)
        calibration = path.with_name(CALIBRATION_FILE)
        self._is_guess = not calibration.is_file()
        self._camera = guessed_camera(first) if self._is_guess else read_calibration(calibration)
        if first.shape[:2] != (self._camera.height, self._camera.width):
            raise SourceError(f"'{calibration}' is of another camera: '{path}' is {first.shape[1]}x{first.shape[0]}.")

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
        stamp_ns = (number + 1) * self._period_ns
        return Frame(self._read(number), self._camera, stamp_ns, index, f"{self.name}-{number}")

    def _read(self, number: int) -> NDArray[np.uint8]:
        if number != self._next:
            self._video.set(cv2.CAP_PROP_POS_FRAMES, number)
        done, bgr = self._video.read()
        self._next = number + 1
        if not done:
            raise SourceError(f"Frame {number} of '{self._path}' cannot be read.")
        return np.ascontiguousarray(bgr[..., ::-1])


def image_files(root: Path) -> list[Path]:
    """The images right in a folder."""
    return [path for path in root.iterdir() if path.suffix.lower() in IMAGE_ENDINGS] if root.is_dir() else []


def guessed_camera(image: NDArray[np.uint8]) -> Camera:
    """A pinhole camera for an image (H, W, 3) of which nothing is known."""
    height, width = image.shape[:2]
    focal = GUESSED_FOCAL * max(width, height)
    return Camera(width, height, focal, focal, (width - 1) / 2, (height - 1) / 2)


def open_video(path: str) -> VideoFile:
    """``FILE`` or ``FILE?every=N``.

    Raises:
        SourceError: no such file, no video, or N is no positive number.
    """
    name, _, word = path.partition("?")
    key, _, value = word.partition("=")
    if word and (key != "every" or not value.isdigit() or int(value) < 1):
        raise SourceError(f"'?{word}' after a video is not understood; write ?every=10 for every tenth frame.")
    if not Path(name).is_file():
        raise SourceError(f"There is no file '{name}'.")
    return VideoFile(Path(name), int(value) if word else 1)
