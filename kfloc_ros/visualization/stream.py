# SPDX-License-Identifier: Apache-2.0
"""Streams of frames with the results of the localizer or of a folder of coordinate maps, for viewers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.offline import localize_frames
from kfloc_ros.files import read_array, read_text
from kfloc_ros.frames import FrameSource
from kfloc_ros.kfnet.reference.files import read_coordinates, read_description, read_list
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.types import Frame, PoseEstimate, SceneCoordinates

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".webp")


@dataclass(frozen=True, eq=False)
class View:
    """Frame of a source with all results of the localizer, for viewers."""

    frame: Frame
    """Frame adapted to the map's camera."""
    coarse: CoarseResult
    estimate: PoseEstimate


def watch(localizer: Localizer, source: FrameSource) -> Iterator[View]:
    """Yield frame after frame, localized as by ``kfloc localize``.

    Raises:
        SourceError: an image cannot be read.
        FrameError: the localizer refuses an image.
    """
    for item in localize_frames(localizer, source):
        if item.localization is None:
            raise FrameError(f"Frame {item.frame.index} cannot be localized: {item.estimate.reason}")
        if item.localization.coarse is not None:
            yield View(item.localization.frame, item.localization.coarse, item.estimate)


def is_stored(path: Path, kind: str = "coord_*.npy") -> bool:
    """Return True for a folder of coordinate maps (or flows, by ``kind``), one .npy file, or a list of such files."""
    if path.is_dir():
        return any(path.glob(kind))
    return path.is_file() and (path.suffix == ".npy" or (path.suffix == ".txt" and _lists_arrays(path)))


def _lists_arrays(path: Path) -> bool:
    try:
        return read_text(path).split("\n", 1)[0].strip().endswith(".npy")
    except (OSError, UnicodeDecodeError):
        return False


@dataclass(frozen=True, eq=False)
class StoredFiles:
    """Files of coordinate maps or flows, in order."""

    paths: list[Path]
    numbers: list[int]
    """Number in each file's name, ``coord_<i>.npy``; or its place in the list."""

    def every(self, step: int) -> StoredFiles:
        """Return every ``step``-th file."""
        return StoredFiles(self.paths[::step], self.numbers[::step])


def find_coordinates(path: Path) -> StoredFiles:
    """Return the coordinate maps of a folder, a list file, or one .npy file.

    Raises:
        SourceError: a name in a folder is not ``coord_<i>.npy``, or the list cannot be read.
    """
    if not path.is_dir():
        paths = [path] if path.suffix == ".npy" else read_list(path)
        return StoredFiles(paths, _numbers(paths))
    numbered = {}
    for file in path.glob("coord_*.npy"):
        number = file.stem.removeprefix("coord_")
        if not number.isdecimal():
            raise SourceError(f"'{file}' is not named coord_<number>.npy, as KFNet's coordinate maps are.")
        numbered[int(number)] = file
    return StoredFiles([numbered[k] for k in sorted(numbered)], sorted(numbered))


def _numbers(paths: Sequence[Path]) -> list[int]:
    """Return the numbers at the end of the names, or the places in the list if they are not distinct."""
    found = [re.search(r"(\d+)$", path.stem) for path in paths]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(paths) else list(range(len(paths)))


def find_flows(path: Path) -> list[tuple[int, int, Path]]:
    """Return (a, b, file) of the flows ``<a>_<b>_flow.npy`` of a folder, a list file, or one .npy file.

    Raises:
        SourceError: a file is named otherwise, or the list cannot be read.
    """
    found = []
    paths = [path] if path.suffix == ".npy" else read_list(path) if path.is_file() else list(path.glob("*_flow.npy"))
    for file in paths:
        match = re.fullmatch(r"(\d+)_(\d+)_flow", file.stem)
        if match is None:
            raise SourceError(f"'{file}' is not named <a>_<b>_flow.npy, as KFNet's flows are.")
        found.append((int(match[1]), int(match[2]), file))
    return sorted(found, key=lambda item: item[:2]) if path.is_dir() else found


def find_images(given: Sequence[Path]) -> list[Path]:
    """Return the images of a folder (by name), of a list file, or the given image files themselves.

    Raises:
        SourceError: a folder has no image, or the list cannot be read.
    """
    if len(given) != 1:
        return list(given)
    (path,) = given
    if path.suffix == ".txt":
        return read_list(path)
    if not path.is_dir():
        return [path]
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise SourceError(f"The folder '{path}' has no images ({', '.join(IMAGE_SUFFIXES)}).")
    return images


def read_stored(path: Path) -> SceneCoordinates:
    """Return one coordinate map.

    Raises:
        SourceError: the file is damaged.
    """
    return read_coordinates(path, read_description(path.parent))


def read_flow(path: Path) -> NDArray[np.float32] | None:
    """Return a flow (h, w, 3) in cells, with 1/sigma; None if there is no file.

    Raises:
        SourceError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        grid = read_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"'{path}' is not a readable array: {error}") from error
    if grid.ndim != 3 or grid.shape[2] != 3 or grid.dtype.kind != "f":
        raise SourceError(f"'{path}' has the shape {grid.shape} ({grid.dtype}); a flow map is h x w x 3 floats.")
    return np.asarray(grid, dtype=np.float32)
