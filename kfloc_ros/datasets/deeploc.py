# SPDX-License-Identifier: Apache-2.0
"""DeepLoc: a campus seen from a robot with a stereo camera, with poses from laser SLAM; read as left colour images."""

from __future__ import annotations

from pathlib import Path

from kfloc_ros.datasets.derived import stamps_with_gaps
from kfloc_ros.datasets.images import usual_size
from kfloc_ros.datasets.posed_images import (
    CALIBRATION_FILE,
    PosedImage,
    PosedImages,
    natural_key,
    pose_of_row,
    read_calibration,
)
from kfloc_ros.datasets.seven_scenes import PARTS
from kfloc_ros.errors import SourceError
from kfloc_ros.files import check_count, inside, number, read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import Matrix

POSES = "poses.txt"
IMAGES = "LeftImages"


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
        entries = [(p, name, T) for p in parts for name, T in _read_list(root / p / POSES)]
        stamps = stamps_with_gaps([Path(p) for p, _, _ in entries])
        paths = [inside(root / p / IMAGES, f"{name}.png") for p, name, _ in entries]
        camera = _camera(root / CALIBRATION_FILE, *usual_size(paths))
        super().__init__(
            root.resolve().name,
            [
                PosedImage(path, f"{p}/{name}", stamp, camera, T)
                for path, (p, name, T), stamp in zip(paths, entries, stamps, strict=True)
            ],
        )


def _read_list(path: Path) -> list[tuple[str, Matrix | None]]:
    """Names without ending and T_map_camera, None where a number is not finite, in the order of the names."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
    check_count(len(lines), path)
    entries: list[tuple[str, Matrix | None]] = []
    for line in filter(str.strip, lines):
        name, *numbers = line.split()
        try:
            x, y, z, qw, qx, qy, qz = (number(word) for word in numbers)
            T = pose_of_row((x, y, z), (qx, qy, qz, qw))
        except ValueError as error:
            raise SourceError(f"'{path}' has a line that is not 'name x y z qw qx qy qz': {line!r}.") from error
        entries.append((name, T))
    if not entries:
        raise SourceError(f"The list '{path}' is empty.")
    return sorted(entries, key=lambda entry: natural_key(entry[0]))


def _camera(path: Path, width: int, height: int) -> Camera:
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
