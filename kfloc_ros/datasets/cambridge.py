# SPDX-License-Identifier: Apache-2.0
"""Outdoor scenes of KFNet with lists of poses, colour only: Cambridge Landmarks and DeepLoc."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kfloc_ros.datasets.derived import recordings, stamps_with_gaps
from kfloc_ros.datasets.images import usual_size
from kfloc_ros.datasets.posed_images import (
    CALIBRATION_FILE,
    PosedImage,
    PosedImages,
    natural_key,
    pose_of_row,
    read_calibration,
    usable_pose,
)
from kfloc_ros.datasets.scenes import PARTS
from kfloc_ros.errors import SourceError
from kfloc_ros.files import check_count, inside, number, read_bytes, read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose
from kfloc_ros.types import Matrix

NOMINAL_FOCAL_PER_WIDTH = 744.0 / 852.0
"""The focal length that others use for all scenes, in image widths; ``reconstruction.nvm`` has one for every image."""
HEADER_LINES = 3


class Cambridge(PosedImages):
    """One scene: ``dataset_train.txt`` or ``dataset_test.txt`` with ``seq1/frame00001.png X Y Z W P Q R`` lines.

    The camera has the median focal length of ``reconstruction.nvm`` if the scene's folder has one, else a nominal one,
    and its centre in the middle of the image.

    Args:
        root: folder of the scene.
        part: ``train``, ``test``, or None for both.

    Raises:
        SourceError: a list is missing or damaged, or names no image that can be read.
    """

    def __init__(self, root: Path, part: str | None = None) -> None:
        lists = [root / f"dataset_{p}.txt" for p in PARTS if part in (None, p)]
        entries = [
            entry for path in lists for entry in _read_list(path, "name X Y Z W P Q R", _pose_of_centre, HEADER_LINES)
        ]
        entries.sort(key=lambda entry: entry[0])
        paths = [inside(root, name) for name, _ in entries]
        width, height = usual_size(paths)
        share = _median_focal_share(root / "reconstruction.nvm", width) or NOMINAL_FOCAL_PER_WIDTH
        camera = Camera(width, height, share * width, share * width, (width - 1) / 2, (height - 1) / 2)
        stamps = stamps_with_gaps(recordings([Path(name).parent for name, _ in entries]))
        super().__init__(
            root.name,
            [
                PosedImage(path, name, stamp, camera, T)
                for path, (name, T), stamp in zip(paths, entries, stamps, strict=True)
            ],
        )

    def sequences(self) -> Sequence[int]:
        return recordings([Path(image.name).parent for image in self._images])


def _pose_of_centre(centre: Sequence[float], xyzw: Sequence[float]) -> Matrix | None:
    """T_map_camera of a camera centre and the rotation from the world to the camera."""
    turned = pose_of_row((0.0, 0.0, 0.0), xyzw)
    if turned is None or not np.isfinite(centre).all():
        return None
    R = turned[:3, :3]
    return usable_pose(inverse_pose(make_pose(R, -R @ np.asarray(centre))))


def _read_list(
    path: Path, form: str, pose_of: Callable[[Sequence[float], Sequence[float]], Matrix | None], header_lines: int = 0
) -> list[tuple[str, Matrix | None]]:
    """Names and T_map_camera, None where a number is not finite, of a list with a position and a quaternion a line.

    Args:
        path: of the list.
        form: of a line, for the error.
        pose_of: makes T_map_camera of the position and the quaternion (x, y, z, w).
        header_lines: lines before the first image.
    """
    try:
        lines = read_text(path).splitlines()[header_lines:]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
    check_count(len(lines), path)
    entries: list[tuple[str, Matrix | None]] = []
    for line in filter(str.strip, lines):
        name, *numbers = line.split()
        try:
            x, y, z, qw, qx, qy, qz = (number(word) for word in numbers)
            entries.append((name, pose_of((x, y, z), (qx, qy, qz, qw))))
        except ValueError as error:
            raise SourceError(f"'{path}' has a line that is not '{form}': {line!r}.") from error
    if not entries:
        raise SourceError(f"The list '{path}' is empty.")
    return entries


def _median_focal_share(path: Path, width: int) -> float | None:
    """Median focal length of an NVM reconstruction in image widths, or None without one."""
    if not path.is_file():
        return None
    focal = []
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        words = line.replace("\t", " ").split()
        if len(words) == 11 and words[-1] == "0" and words[0].lower().endswith((".jpg", ".png")):
            focal.append(number(words[1]))
    return float(np.nanmedian(focal)) / width if focal else None


DEEPLOC_POSES = "poses.txt"
DEEPLOC_IMAGES = "LeftImages"


class DeepLoc(PosedImages):
    """One part or both: folders ``train`` and ``test``, each with ``poses.txt`` and ``LeftImages``.

    A line of the list is ``name x y z qw qx qy qz``: where the camera is, and how it is turned, in the world. The
    data set comes without the camera's intrinsics in these folders; ``camera.txt`` in the root has them.

    Args:
        root: folder with ``train`` and ``test``.
        part: ``train``, ``test``, or None for both.

    Raises:
        SourceError: a list, the calibration or the first image is missing or damaged.
    """

    def __init__(self, root: Path, part: str | None = None) -> None:
        parts = [p for p in PARTS if part in (None, p)]
        entries = [(p, name, T) for p in parts for name, T in _read_deeploc_list(root / p / DEEPLOC_POSES)]
        stamps = stamps_with_gaps([Path(p) for p, _, _ in entries])
        paths = [inside(root / p / DEEPLOC_IMAGES, f"{name}.png") for p, name, _ in entries]
        camera = _deeploc_camera(root / CALIBRATION_FILE, *usual_size(paths))
        super().__init__(
            root.resolve().name,
            [
                PosedImage(path, f"{p}/{name}", stamp, camera, T)
                for path, (p, name, T), stamp in zip(paths, entries, stamps, strict=True)
            ],
        )


def _read_deeploc_list(path: Path) -> list[tuple[str, Matrix | None]]:
    """Names without ending and T_map_camera, in the order of the names."""
    entries = _read_list(path, "name x y z qw qx qy qz", pose_of_row)
    return sorted(entries, key=lambda entry: natural_key(entry[0]))


def _deeploc_camera(path: Path, width: int, height: int) -> Camera:
    """Intrinsics of a ``camera.txt``, scaled to the images' size, which has the same shape."""
    if not path.is_file():
        raise SourceError(
            f"The intrinsics of DeepLoc's camera are not known; write 'width height fx fy cx cy' into '{path}'."
        )
    camera = read_calibration(path)
    if abs(camera.width * height - camera.height * width) > max(camera.width, camera.height):
        raise SourceError(
            f"'{path}' is of {camera.width}x{camera.height} pixels, and the images of {width}x{height} are no scaled "
            "ones of these; write the intrinsics of these images there."
        )
    return camera.scaled_to(width, height)
