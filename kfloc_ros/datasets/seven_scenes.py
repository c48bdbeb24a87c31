# SPDX-License-Identifier: Apache-2.0
"""7-Scenes sequences: Kinect v1 colour and depth with KinectFusion ("D-SLAM") or SfM poses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kfloc_ros.datasets.depth import register_depth
from kfloc_ros.datasets.derived import Sequences
from kfloc_ros.datasets.scenes import SEVEN_SCENES
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, quaternion_to_matrix
from kfloc_ros.types import Frame, Matrix

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
    """One 7-Scenes sequence, with depth moved into the colour camera.

    Args:
        root: folder with the frames, or one that holds ``seq-*`` folders of which exactly one exists.
        poses: ``file`` for the pose files, ``sfm`` for a ``poses_sfm.txt`` in the folder or its parent.
        depth: read the depth images.

    Raises:
        SourceError: nothing there, several sequences, or poses missing.
    """

    def __init__(self, root: Path, *, poses: str = "file", depth: bool = True) -> None:
        if not root.is_dir():
            raise SourceError(f"There is no folder '{root}'.")
        folder = _sequence_folder(root)
        self.name = folder.parent.name if re.fullmatch(r"seq-\d+", folder.name) else folder.name
        self._color = sorted(folder.glob("frame-*.color.png")) or sorted(folder.glob("frame-*.color.jpg"))
        if not self._color:
            raise SourceError(f"'{folder}' has no frame-*.color.png or .jpg.")
        self._with_depth = depth
        self._indices = [int(path.name[6:12]) for path in self._color]
        if poses == "file":
            self._camera, self._sfm = COLOR_CAMERA, None
        elif poses == "sfm":
            self._sfm, focal_px = _read_sfm_poses(folder)
            self._camera = Camera(640, 480, focal_px, focal_px, 320.0, 240.0)
        else:
            raise SourceError(f"--poses must be 'file' or 'sfm' for 7-Scenes, got '{poses}'.")

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._color)

    def indices(self) -> Sequence[int]:
        return self._indices

    def __getitem__(self, position: int) -> Frame:
        color_path, index = self._color[position], self._indices[position]
        bgr = cv2.imread(str(color_path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise SourceError(f"'{color_path}' is not a readable image.")
        stem = color_path.name.split(".")[0]
        return Frame(
            image=np.ascontiguousarray(bgr[..., ::-1]),
            camera=self._camera,
            stamp_ns=(index + 1) * FRAME_PERIOD_NS,
            index=index,
            name=stem,
            depth_m=self._depth(color_path.with_name(f"{stem}.depth.png")),
            T_map_camera=self._pose(color_path.with_name(f"{stem}.pose.txt")),
        )

    def pose(self, position: int) -> Matrix | None:
        path = self._color[position]
        return self._pose(path.with_name(f"{path.name.split('.')[0]}.pose.txt"))

    def encoded_image(self, position: int) -> bytes | None:
        path = self._color[position]
        return path.read_bytes() if path.suffix == ".jpg" else None

    def _depth(self, path: Path) -> np.ndarray | None:
        if not (self._with_depth and path.exists()):
            return None
        raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if raw is None or raw.dtype != np.uint16:
            raise SourceError(f"'{path}' is not a 16-bit depth image.")
        depth_m = np.where((raw == 0) | (raw == 65535), 0, raw).astype(np.float32) * 1e-3
        return register_depth(depth_m, DEPTH_CAMERA, self._camera, T_COLOR_DEPTH)

    def _pose(self, path: Path) -> Matrix | None:
        if self._sfm is not None:
            return self._sfm.get(path.name.split(".")[0])
        if not path.exists():
            return None
        T_map_depth = np.loadtxt(path)
        if T_map_depth.shape != (4, 4) or not np.isfinite(T_map_depth).all():
            raise SourceError(f"'{path}' does not hold a finite 4x4 pose.")
        return np.asarray(T_map_depth @ np.linalg.inv(T_COLOR_DEPTH), dtype=np.float64)


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
    for line in path.read_text().splitlines():
        name, *numbers = line.split()
        values = np.array([float(n) for n in numbers])
        if values.shape != (8,) or not np.isfinite(values).all():
            raise SourceError(f"'{path}' has a line that is not 'name qw qx qy qz tx ty tz f': {line!r}.")
        T_camera_map = np.eye(4)
        T_camera_map[:3, :3] = quaternion_to_matrix(values[[1, 2, 3, 0]])
        T_camera_map[:3, 3] = values[4:7]
        poses[name.split(".")[0]] = inverse_pose(T_camera_map)
        focal_px = float(values[7])
    return poses, focal_px


PARTS = ("train", "test")


def split_part(path: str) -> tuple[Path, str | None]:
    """Folder and part of ``DIR`` or ``DIR@train``."""
    folder, mark, part = path.rpartition("@")
    return (Path(folder), part) if mark and part in PARTS else (Path(path), None)


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
    numbers = [int(n) for n in re.findall(r"(?m)^\s*sequence(\d+)", path.read_text(encoding="utf-8"))]
    if not numbers:
        raise SourceError(f"'{path}' names no sequence; its lines are like 'sequence3'.")
    return numbers
