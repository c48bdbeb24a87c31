# SPDX-License-Identifier: Apache-2.0
"""7-Scenes sequences: Kinect v1 colour and depth with KinectFusion ("D-SLAM") or SfM poses; and RIO10's, like them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kfloc_ros.datasets.derived import Sequences
from kfloc_ros.datasets.images import image_fault, read_depth_m, read_image, register_depth, usual_size
from kfloc_ros.datasets.posed_images import (
    CALIBRATION_FILE,
    DepthFiles,
    PosedImage,
    PosedImages,
    encoded_jpeg,
    frame_number,
    pose_of_row,
    read_calibration,
)
from kfloc_ros.datasets.scenes import SEVEN_SCENES
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import number, read_text
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.kfnet.reference.files import pose_fault, read_pose
from kfloc_ros.types import Frame, Matrix

LOG = logging.getLogger(__name__)
FRAME_PERIOD_NS = 33_333_333
"""The sequences have no time stamps; the Kinect recorded at 30 Hz."""

DEPTH_CAMERA = Camera(640, 480, 585.0, 585.0, 320.0, 240.0)
COLOR_CAMERA = Camera(640, 480, 525.0, 525.0, 320.0, 240.0)
T_COLOR_DEPTH: Matrix = np.array(
    [
        [0.99996518, 0.00267651, -0.00790410, -0.02555894],
        [-0.00274093, 0.99996303, -0.00815045, 0.00010110],
        [0.00788199, 0.00817183, 0.99993554, 0.00203183],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""Depth camera to colour camera; the pose files are those of the depth camera."""


class SevenScenes(FrameSource):
    """One 7-Scenes sequence, with depth moved into the colour camera; or a recording of another camera in its layout.

    With a ``camera.txt`` (:func:`~kfloc_ros.datasets.posed_images.read_calibration`) in the folder or its parent, that
    is the colour camera, the poses are its own, and depth is registered to it. Without, the files are the Kinect's of
    the data set, whose poses are those of its depth camera.

    Args:
        root: folder with the frames, or one that holds ``seq-*`` folders of which exactly one exists.
        poses: ``file`` for the pose files, ``sfm`` for a ``poses_sfm.txt`` in the folder or its parent.
        depth: read the depth images.

    Raises:
        SourceError: nothing there, several sequences, poses missing, or images of another camera without camera.txt.
    """

    def __init__(self, root: Path, *, poses: str = "file", depth: bool = True) -> None:
        if not root.is_dir():
            raise SourceError(f"There is no folder '{root}'.")
        folder = _sequence_folder(root)
        self.name = folder.parent.name if re.fullmatch(r"seq-\d+", folder.name) else folder.name
        self._color = sorted(folder.glob("frame-*.color.png"), key=frame_number)
        self._color = self._color or sorted(folder.glob("frame-*.color.jpg"), key=frame_number)
        if not self._color:
            raise SourceError(f"'{folder}' has no frame-*.color.png or .jpg.")
        self._with_depth = depth
        self._indices = [frame_number(path) for path in self._color]
        own = next((p for p in (folder / CALIBRATION_FILE, folder.parent / CALIBRATION_FILE) if p.is_file()), None)
        self._is_kinect = own is None
        if poses == "file":
            self._camera, self._sfm = COLOR_CAMERA if own is None else read_calibration(own), None
        elif poses == "sfm":
            self._sfm, focal_px = _read_sfm_poses(folder)
            self._camera = replace(COLOR_CAMERA, fx=focal_px, fy=focal_px) if own is None else read_calibration(own)
        else:
            raise SourceError(f"--poses must be 'file' or 'sfm' for 7-Scenes, got '{poses}'.")
        if own is None and self.name.lower() not in SEVEN_SCENES:
            LOG.warning(
                "'%s' is read as 7-Scenes, recorded with its Kinect. If it is of another camera, put a %s there.",
                folder, CALIBRATION_FILE,
            )  # fmt: skip
        size = usual_size(self._color)
        if own is None and size != (COLOR_CAMERA.width, COLOR_CAMERA.height):
            raise SourceError(
                f"The images in '{folder}' are {size[0]}x{size[1]}, not 640x480 like those of 7-Scenes, so that their "
                f"camera is not known. Put a {CALIBRATION_FILE} with 'width height fx fy cx cy' and the distortion "
                "there; poses are then the colour camera's, and depth is registered to it."
            )

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._color)

    def indices(self) -> Sequence[int]:
        return self._indices

    def __getitem__(self, position: int) -> Frame:
        color_path, index = self._color[position], self._indices[position]
        stem = color_path.name.split(".")[0]
        return Frame(
            image=read_image(color_path, (self._camera.width, self._camera.height)),
            camera=self._camera,
            stamp_ns=self.stamp_ns(position),
            index=index,
            name=stem,
            depth_m=self._depth(color_path.with_name(f"{stem}.depth.png")),
            T_map_camera=self._pose(color_path.with_name(f"{stem}.pose.txt")),
        )

    def stamp_ns(self, position: int) -> int:
        return (self._indices[position] + 1) * FRAME_PERIOD_NS

    def pose(self, position: int) -> Matrix | None:
        path = self._color[position]
        return self._pose(path.with_name(f"{path.name.split('.')[0]}.pose.txt"))

    def encoded_image(self, position: int) -> bytes | None:
        return encoded_jpeg(self._color[position], self._camera)

    def fault(self, position: int) -> str:
        path = self._color[position]
        stem = path.name.split(".")[0]
        found = image_fault(path, (self._camera.width, self._camera.height))
        depth = path.with_name(f"{stem}.depth.png")
        if not found and self._with_depth and depth.exists():
            found = image_fault(depth)
        return found or (pose_fault(path.with_name(f"{stem}.pose.txt")) if self._sfm is None else "")

    def _depth(self, path: Path) -> np.ndarray | None:
        if not (self._with_depth and path.exists()):
            return None
        depth_m = read_depth_m(path, 1e-3)
        if self._is_kinect:
            return register_depth(depth_m, DEPTH_CAMERA, self._camera, T_COLOR_DEPTH)
        if depth_m.shape != (self._camera.height, self._camera.width):
            raise FrameError(
                f"'{path}' is {depth_m.shape[1]}x{depth_m.shape[0]} but the colour camera is {self._camera.width}x"
                f"{self._camera.height}; depth must be registered to it."
            )
        return depth_m

    def _pose(self, path: Path) -> Matrix | None:
        if self._sfm is not None:
            return self._sfm.get(path.name.split(".")[0])
        if not path.exists():
            return None
        T = read_pose(path)
        if T is None or not self._is_kinect:
            return T
        return np.asarray(T @ np.linalg.inv(T_COLOR_DEPTH), dtype=np.float64)


def _sequence_folder(root: Path) -> Path:
    if any(root.glob("frame-*.color.*")):
        return root
    sequences = sorted(p for p in root.glob("seq-*") if p.is_dir())
    if len(sequences) == 1:
        return sequences[0]
    found = ", ".join(p.name for p in sequences) or "no frame-*.color.png|jpg and no seq-* folder"
    raise SourceError(f"'{root}' is not one sequence: it holds {found}. Name the folder of one sequence.")


def _read_sfm_poses(folder: Path) -> tuple[dict[str, Matrix], float]:
    for path in (folder / "poses_sfm.txt", folder.parent / "poses_sfm.txt"):
        if path.exists():
            break
    else:
        raise SourceError(f"--poses sfm needs 'poses_sfm.txt' in '{folder}' or its parent.")
    poses: dict[str, Matrix] = {}
    focal_px = 525.0
    for line in _lines(path):
        name, *words = line.split()
        try:
            values = [number(word) for word in words]
            T = None if len(values) != 8 else pose_of_row(values[4:7], [*values[1:4], values[0]])
        except ValueError as error:
            raise SourceError(f"'{path}' has a line that is not 'name qw qx qy qz tx ty tz f': {line!r}.") from error
        if len(values) != 8:
            raise SourceError(f"'{path}' has a line that is not 'name qw qx qy qz tx ty tz f': {line!r}.")
        if T is not None and math.isfinite(values[7]):
            poses[name.split(".")[0]] = inverse_pose(T)
            focal_px = values[7]
    return poses, focal_px


def seven_scenes(root: Path, part: str, *, poses: str, depth: bool) -> FrameSource:
    """All sequences of a part of a 7-Scenes scene, by its ``TrainSplit.txt``/``TestSplit.txt`` or, without, its name.

    Raises:
        SourceError: the split is unknown or a sequence is missing.
    """
    numbers = _listed(root / f"{part.capitalize()}Split.txt")
    if numbers is None:
        scene = SEVEN_SCENES.get(root.name.lower())
        if scene is None:
            known = ", ".join(SEVEN_SCENES)
            raise SourceError(
                f"'{root}' has no {part.capitalize()}Split.txt and is not named like one of the scenes {known}."
            )
        numbers = list(scene.train if part == "train" else scene.test)
    folders = [root / f"seq-{number:02d}" for number in numbers]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        raise SourceError(f"'{root}' lacks {', '.join(missing)} of its {part} split.")
    return Sequences(root.name, [SevenScenes(folder, poses=poses, depth=depth) for folder in folders])


def _listed(path: Path) -> list[int] | None:
    if not path.is_file():
        return None
    numbers = [int(n) for n in re.findall(r"(?m)^\s*sequence(\d{1,9})", "\n".join(_lines(path)))]
    if not numbers:
        raise SourceError(f"'{path}' names no sequence; its lines are like 'sequence3'.")
    return numbers


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error


RIO10_PERIOD_NS = 100_000_000
RIO10_WIDTH_PX = 540
"""Width of the images that the intrinsics are of; rendered depth is smaller."""
RIO10_DEPTH_UNIT_M = 0.001


class Rio10Sequence(PosedImages):
    """One sequence, such as ``seq02_01``: ``frame-000000.color.jpg``, ``.pose.txt``, ``.rendered.depth.png``.

    ``intrinsics.txt`` (``seq02_01 fx fy cx cy`` a line) lies in the folder or in one of the two above it. The hidden
    test sequences have no poses. There are no stamps; 10 Hz is assumed.

    Raises:
        SourceError: there are no images, or the intrinsics are missing or damaged.
    """

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        name = root.resolve().name
        colors = sorted([*root.glob("frame-*.color.jpg"), *root.glob("frame-*.color.png")])
        if not colors:
            raise SourceError(f"'{root}' has no frame-*.color.jpg; name the folder of one sequence, such as seq02_01.")
        camera = _rio10_camera(root, name, colors)
        images: list[PosedImage] = []
        self._pose_files: list[Path] = []
        for path in colors:
            stem = path.name.split(".")[0]
            digits = re.search(r"\d{1,9}", stem)
            depth_path, pose = root / f"{stem}.rendered.depth.png", root / f"{stem}.pose.txt"
            self._pose_files.append(pose)
            images.append(
                PosedImage(
                    path,
                    f"{name}/{stem}",
                    (1 + (int(digits[0]) if digits else len(images))) * RIO10_PERIOD_NS,
                    camera,
                    _pose_of(pose),
                    depth_path if depth_path.is_file() else None,
                )
            )
        super().__init__(name, images, depth=DepthFiles(RIO10_DEPTH_UNIT_M) if depth else None)

    def fault(self, position: int) -> str:
        return super().fault(position) or pose_fault(self._pose_files[position])


def rio10_intrinsics(path: Path) -> dict[str, tuple[float, float, float, float]]:
    """Return fx, fy, cx, cy in pixels by the name of the sequence.

    Raises:
        SourceError: the file cannot be read, or a line is not a name and four numbers.
    """
    found: dict[str, tuple[float, float, float, float]] = {}
    try:
        for line in read_text(path).splitlines():
            if line.strip() and not line.startswith("#"):
                name, *words = line.split()
                fx, fy, cx, cy = (float(word) for word in words)
                found[name] = (fx, fy, cx, cy)
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' does not hold lines 'sequence fx fy cx cy': {error}") from error
    return found


def _rio10_camera(root: Path, name: str, images: Sequence[Path]) -> Camera:
    resolved = root.resolve()
    files = [folder / "intrinsics.txt" for folder in (resolved, *resolved.parents[:2])]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise SourceError(f"There is no intrinsics.txt in '{root}' or above it; RIO10 brings it.")
    known = rio10_intrinsics(path)
    if name not in known:
        raise SourceError(f"'{path}' has no line for the sequence '{name}'.")
    try:
        return Camera(*usual_size(images), *known[name])
    except FrameError as error:
        raise SourceError(f"'{path}' has intrinsics of '{name}' that are none: {error}") from error


def _pose_of(path: Path) -> Matrix | None:
    try:
        return read_pose(path) if path.exists() else None
    except FrameError:  # told by the source's fault()
        return None
