# SPDX-License-Identifier: Apache-2.0
"""12-Scenes: a tablet's colour and structured-light depth, with poses; several sequences in one numbering."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import recordings, stamps_with_gaps
from kfloc_ros.datasets.images import image_fault, read_depth_m, read_image, register_depth
from kfloc_ros.datasets.posed_images import encoded_jpeg, frame_number
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import read_text
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.reference.files import pose_fault, read_pose
from kfloc_ros.types import Frame, Matrix


class TwelveScenes(FrameSource):
    """One scene: ``info.txt``, ``split.txt`` and ``data/frame-000000.color.jpg``, ``.depth.png``, ``.pose.txt``.

    Args:
        root: folder of the scene, such as ``apt1/kitchen``.
        part: ``train``, ``test`` (the first sequence), or None for everything.
        depth: read the depth images; they are moved into the colour camera.

    Raises:
        SourceError: a file is missing or damaged.
    """

    def __init__(self, root: Path, part: str | None = None, *, depth: bool = True) -> None:
        data = root / "data"
        images = sorted([*data.glob("frame-*.color.jpg"), *data.glob("frame-*.color.png")], key=frame_number)
        if not images:
            raise SourceError(f"'{data}' has no frame-*.color.jpg; name the folder of one scene, such as apt1/kitchen.")
        self.name = f"{root.parent.name}/{root.name}"
        self._with_depth = depth
        self._camera, self._depth_camera = read_cameras(root / "info.txt")
        ranges = read_sequences(root / "split.txt")
        numbers = [frame_number(path) for path in images]
        owner = [next((k for k, r in enumerate(ranges) if n in r), -1) for n in numbers]
        keep = [
            i for i, k in enumerate(owner) if part is None or (k == 0 if part == "test" else k > 0)
        ]  # a frame in no sequence belongs to neither part
        if not keep:
            raise SourceError(f"'{root}' has no frame in its {part} split.")
        self._images = [images[i] for i in keep]
        self._indices = [numbers[i] for i in keep]
        self._sequences = recordings([owner[i] for i in keep])
        self._stamps_ns = stamps_with_gaps(self._sequences)

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._images)

    def indices(self) -> Sequence[int]:
        return self._indices

    def sequences(self) -> Sequence[int]:
        return self._sequences

    def __getitem__(self, position: int) -> Frame:
        path = self._images[position]
        stem = path.name.split(".")[0]
        return Frame(
            image=read_image(path, (self._camera.width, self._camera.height)),
            camera=self._camera,
            stamp_ns=self._stamps_ns[position],
            index=self._indices[position],
            name=stem,
            depth_m=self._depth(path.with_name(f"{stem}.depth.png")),
            T_map_camera=self.pose(position),
        )

    def pose(self, position: int) -> Matrix | None:
        path = self._images[position]
        path = path.with_name(f"{path.name.split('.')[0]}.pose.txt")
        return read_pose(path) if path.exists() else None

    def fault(self, position: int) -> str:
        path = self._images[position]
        stem = path.name.split(".")[0]
        found = image_fault(path, (self._camera.width, self._camera.height))
        depth = path.with_name(f"{stem}.depth.png")
        if not found and self._with_depth and depth.exists():
            found = image_fault(depth)
        return found or pose_fault(path.with_name(f"{stem}.pose.txt"))

    def encoded_image(self, position: int) -> bytes | None:
        return encoded_jpeg(self._images[position], self._camera)

    def _depth(self, path: Path) -> NDArray[np.float32] | None:
        if not (self._with_depth and path.exists()):
            return None
        depth_m = read_depth_m(path, 1e-3)
        if depth_m.shape != (self._depth_camera.height, self._depth_camera.width):
            raise FrameError(f"'{path}' has not the size of its camera.")
        # the colour camera has about twice the depth camera's pixels: register at the depth's size, then enlarge
        small = self._camera.scaled_to(self._depth_camera.width, self._depth_camera.height)
        registered = register_depth(depth_m, self._depth_camera, small, np.eye(4))
        size = (self._camera.width, self._camera.height)
        return np.asarray(cv2.resize(registered, size, interpolation=cv2.INTER_NEAREST), dtype=np.float32)


def read_cameras(path: Path) -> tuple[Camera, Camera]:
    """Colour and depth camera of an ``info.txt``; the two are taken to be in one place, as the dataset does.

    Raises:
        SourceError: missing, or without their sizes and calibrations.
    """
    try:
        entries = dict(re.findall(r"(?m)^\s*(\w+)\s*=\s*(.*?)\s*$", read_text(path)))
        cameras = []
        for kind in ("color", "depth"):
            K = [float(x) for x in entries[f"m_calibration{kind.capitalize()}Intrinsic"].split()]
            width, height = int(entries[f"m_{kind}Width"]), int(entries[f"m_{kind}Height"])
            cameras.append(Camera(width, height, K[0], K[5], K[2], K[6]))
    except OSError as error:
        raise SourceError(f"The calibration '{path}' cannot be read: {error.strerror}.") from error
    except (KeyError, ValueError, IndexError, FrameError) as error:
        raise SourceError(f"'{path}' lacks the size or the calibration of a camera: {error}.") from error
    return cameras[0], cameras[1]


def read_sequences(path: Path) -> list[range]:
    """Frame numbers of each sequence of a ``split.txt``, such as ``sequence0 [frames=357] [start=0 ; end=356]``.

    Raises:
        SourceError: missing, or without such lines.
    """
    try:
        found = re.findall(r"start\s*=\s*(\d{1,9})\b\s*;\s*end\s*=\s*(\d{1,9})\b", read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The split '{path}' cannot be read: {error}.") from error
    if not found:
        raise SourceError(f"'{path}' has no line like 'sequence0 [frames=357] [start=0 ; end=356]'.")
    return [range(int(start), int(end) + 1) for start, end in found]
