# SPDX-License-Identifier: Apache-2.0
"""Streams of frames with the results of the localizer or of a folder of coordinate maps, for viewers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.offline import localize_frames
from kfloc_ros.files import read_array
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.reference.files import read_coordinates, read_description
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.types import Frame, PoseEstimate, SceneCoordinates


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


@dataclass(frozen=True, eq=False)
class StoredMap:
    """Coordinate map in a file ``coord_<i>.npy``."""

    index: int
    coordinates: SceneCoordinates


def is_coordinate_folder(path: Path) -> bool:
    """Return True if a folder contains coordinate maps in KFNet's format."""
    return path.is_dir() and any(path.glob("coord_*.npy"))


def read_coordinate_folder(folder: Path) -> tuple[Camera, list[Path]]:
    """Return the camera and the files of a folder of coordinate maps, in the order of their numbers.

    Raises:
        SourceError: a name is not ``coord_<i>.npy``, or the description is damaged.
    """
    numbered = {}
    for path in folder.glob("coord_*.npy"):
        number = path.stem.removeprefix("coord_")
        if not number.isdecimal():
            raise SourceError(f"'{path}' is not named coord_<number>.npy, as KFNet's coordinate maps are.")
        numbered[int(number)] = path
    return read_description(folder).camera, [numbered[k] for k in sorted(numbered)]


def read_stored(path: Path) -> StoredMap:
    """Return one coordinate map.

    Raises:
        SourceError: the file is damaged.
    """
    coordinates = read_coordinates(path, read_description(path.parent))
    return StoredMap(int(path.stem.removeprefix("coord_")), coordinates)


def read_flow(folder: Path, index: int) -> np.ndarray | None:
    """Return the flow (h, w, 3) from image ``index`` to the previous one, with 1/sigma; None if there is no file."""
    path = folder / f"{index}_{index - 1}_flow.npy"
    if not path.is_file():
        return None
    try:
        grid = read_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"'{path}' is not a readable array: {error}") from error
    if grid.ndim != 3 or grid.shape[2] != 3 or grid.dtype.kind != "f":
        raise SourceError(f"'{path}' has the shape {grid.shape} ({grid.dtype}); a flow map is h x w x 3 floats.")
    return np.asarray(grid, dtype=np.float32)
