# SPDX-License-Identifier: Apache-2.0
"""Folders as the original KFNet takes them, read and written: lists of images and labels, and the scene's transform.

``image_list.txt`` and optionally ``label_list.txt`` (same order), ``transform.txt``. Two files are this package's
additions: ``camera.txt`` (width height fx fy cx cy of the images; without, the 525 px camera that the original
assumes) and ``pose_list.txt`` (files with 4x4 camera-to-world matrices). Without poses, a frame's pose is solved from
its label, which fixes it to the label's own accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import recordings, stamps_with_gaps
from kfloc_ros.datasets.images import image_fault, read_image, usual_size
from kfloc_ros.datasets.posed_images import encoded_jpeg, read_calibration
from kfloc_ros.datasets.twelve_scenes import read_sequences
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.kfnet.pnp import absolute_pose
from kfloc_ros.kfnet.reference.files import (
    DEFAULT_CAMERA,
    STRIDE,
    LabelMap,
    pose_fault,
    read_label,
    read_list,
    read_pose,
    write_label,
)
from kfloc_ros.kfnet.reference.scoordnet import NetworkFrame, read_transform, write_transform
from kfloc_ros.types import Frame, Matrix

MIN_LABELS = 30
"""Fewer labelled pixels than this give no pose."""
POSE_MAX_ERROR_PX = 4.0
MAX_DIGITS = 18
"""Of a number in a file's name; what is longer is no number of a frame."""
POINTS_PER_FRAME = 500
"""Points of every frame from which the scene's transform is made."""


class KfnetFolder(FrameSource):
    """Images, and where there are labels, depth and pose from them.

    Args:
        root: the folder with the lists.
        depth: compute depth images from the labels.

    Raises:
        SourceError: a list is missing or lists of different lengths, or the camera is unknown.
    """

    def __init__(self, root: Path, *, depth: bool = True) -> None:
        if not root.is_dir():
            raise SourceError(f"There is no folder '{root}'.")
        self.name = root.name
        self._images = read_list(root / "image_list.txt")
        self._labels = self._parallel(root / "label_list.txt")
        self._poses = self._parallel(root / "pose_list.txt")
        self._with_depth = depth
        self._camera = self._read_camera(root / "camera.txt")
        self.frame = read_transform(root / "transform.txt") if (root / "transform.txt").is_file() else NetworkFrame()
        self._sequences = recordings_of(self._images)
        self._stamps_ns = stamps_with_gaps(self._sequences)

    def _parallel(self, path: Path) -> list[Path] | None:
        if not path.is_file():
            return None
        paths = read_list(path)
        if len(paths) != len(self._images):
            raise SourceError(f"'{path}' names {len(paths)} files for {len(self._images)} images.")
        return paths

    def _read_camera(self, path: Path) -> Camera:
        if path.is_file():
            camera = read_calibration(path)
            if not camera.is_pinhole:
                raise SourceError(f"'{path}' has a distortion; labels are of pinhole images.")
            return camera
        width, height = usual_size(self._images)
        if (width, height) != (DEFAULT_CAMERA.width, DEFAULT_CAMERA.height):
            raise SourceError(
                f"The images are {width}x{height} and their intrinsics unknown; write '{path}' with one line: "
                "width height fx fy cx cy."
            )
        return DEFAULT_CAMERA

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return len(self._images)

    def indices(self) -> Sequence[int]:
        return range(len(self._images))

    def sequences(self) -> Sequence[int]:
        return self._sequences

    def label(self, position: int) -> LabelMap | None:
        """The label of a frame, or None if the folder has no labels.

        Raises:
            FrameError: it cannot be read, or does not have the size of the image.
        """
        if self._labels is None:
            return None
        return read_label(self._labels[position], self._camera.width, self._camera.height)

    def __getitem__(self, position: int) -> Frame:
        position = range(len(self))[position]
        label = self.label(position) if self._with_depth or self._poses is None else None
        T_map_camera = self._pose(position, label)
        depth = None
        if self._with_depth and label is not None and T_map_camera is not None:
            depth = depth_of_label(label, T_map_camera, self._camera)
        return Frame(
            image=read_image(self._images[position], (self._camera.width, self._camera.height)),
            camera=self._camera,
            stamp_ns=self._stamps_ns[position],
            index=position,
            name=self._images[position].stem,
            depth_m=depth,
            T_map_camera=T_map_camera,
        )

    def fault(self, position: int) -> str:
        found = image_fault(self._images[position], (self._camera.width, self._camera.height))
        return found or (pose_fault(self._poses[position]) if self._poses is not None else "")

    def encoded_image(self, position: int) -> bytes | None:
        return encoded_jpeg(self._images[position], self._camera)

    def _pose(self, position: int, label: LabelMap | None) -> Matrix | None:
        if self._poses is None:
            return None if label is None else pose_of_label(label, self._camera)
        return read_pose(self._poses[position])


def recordings_of(images: Sequence[Path]) -> list[int]:
    """The number of each image's recording: by folder, by the numbers in names, by 12-Scenes' ``split.txt``."""
    splits = {folder: _split_beside(folder) for folder in {path.parent for path in images}}
    named = [re.fullmatch(r"(\D*)(\d+)(\D*)", path.stem) for path in images]
    numbers = [int(match[2]) for match in named if match is not None and len(match[2]) <= MAX_DIGITS]
    if len(numbers) < len(images):
        return recordings([path.parent for path in images])
    owner = [
        (path.parent, next((k for k, r in enumerate(splits[path.parent]) if number in r), -1))
        for path, number in zip(images, numbers, strict=True)
    ]
    return recordings(owner, numbers)


def _split_beside(folder: Path) -> list[range]:
    """The sequences of a scene of 12-Scenes whose ``data`` folder this is; else none."""
    path = folder.parent / "split.txt"
    return read_sequences(path) if folder.name == "data" and path.is_file() else []


def pose_of_label(label: LabelMap, camera: Camera) -> Matrix | None:
    """T_map_camera (4, 4) that explains a label, or None where too little is labelled.

    A reflection of the world cannot be explained: labels are in the world, not in the network's frame.
    """
    step = STRIDE // label.stride
    rows, cols = np.nonzero(label.mask[::step, ::step])
    if len(rows) < MIN_LABELS:
        return None
    pixels = STRIDE * np.stack([cols, rows], axis=1).astype(np.float64)
    points = label.points[::step, ::step][rows, cols].astype(np.float64)
    limits = {"max_iterations": 500, "min_iterations": 20}
    T_camera_map, inliers = absolute_pose(pixels, points, camera, POSE_MAX_ERROR_PX, **limits)
    return inverse_pose(T_camera_map) if inliers.sum() >= MIN_LABELS else None


def depth_of_label(label: LabelMap, T_map_camera: Matrix, camera: Camera) -> NDArray[np.float32]:
    """(H, W) depth in metres, 0 where unknown; labels of every eighth pixel are taken for their neighbours, too."""
    T = inverse_pose(T_map_camera)
    depth = np.where(label.mask, label.points @ T[2, :3] + T[2, 3], 0.0).astype(np.float32)
    depth[depth < 0] = 0.0
    if label.stride == 1:
        return depth
    h, w = depth.shape
    rows = np.minimum((np.arange(camera.height) + label.stride // 2) // label.stride, h - 1)
    cols = np.minimum((np.arange(camera.width) + label.stride // 2) // label.stride, w - 1)
    return np.ascontiguousarray(depth[np.ix_(rows, cols)])


def scene_points(depth_m: NDArray[np.float32], camera: Camera, T_map_camera: Matrix) -> NDArray[np.float64]:
    """(H, W, 3) map points of a depth image's pixels; meaningless where the depth is 0."""
    v, u = np.mgrid[: depth_m.shape[0], : depth_m.shape[1]].astype(np.float64)
    z = depth_m.astype(np.float64)
    rays = np.stack([(u - camera.cx) / camera.fx * z, (v - camera.cy) / camera.fy * z, z], axis=-1)
    return np.asarray(rays @ T_map_camera[:3, :3].T + T_map_camera[:3, 3])


def write_kfnet_folder(
    source: FrameSource, out: Path, *, full_resolution: bool = True, absolute: bool = False
) -> Iterator[Frame]:
    """Write images, labels, poses, camera and transform of a source; yields every frame that was written.

    Frames without depth or pose are left out. The lists are written last: a folder that has them is complete.

    Args:
        source: with depth and poses.
        out: a new or empty folder.
        full_resolution: as the original reads them (5 MB an image); else every eighth pixel only.
        absolute: full paths in the lists, as the original wants them; else the folder can be moved.

    Raises:
        SourceError: the folder is not empty, the camera is distorted, or no frame has depth and pose.
    """
    if out.exists() and any(out.iterdir()):
        raise SourceError(f"'{out}' is not empty; name a new folder.")
    camera = source.camera
    if not camera.is_pinhole:
        raise SourceError(f"The camera of '{source.name}' is distorted; labels are written for pinhole images only.")
    for name in ("images", "labels", "poses"):
        (out / name).mkdir(parents=True, exist_ok=True)
    step = 1 if full_resolution else STRIDE
    borders = recordings(source.sequences(), source.indices())
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"image": [], "label": [], "pose": []}
    sample: list[NDArray[np.float64]] = []
    recording, last = 0, -1
    for position in range(len(source)):
        frame = source.read(position)
        if frame is None or frame.depth_m is None or frame.T_map_camera is None:
            continue
        if last >= 0 and borders[position] > borders[last]:
            recording += 1
        last = position
        points, mask = scene_points(frame.depth_m, camera, frame.T_map_camera), frame.depth_m > 0
        stem = f"{len(lists['image']):06d}"
        # a list tells recordings apart by the folders of their images
        folder = f"images/{recording:03d}" if recording else "images"
        (out / folder).mkdir(exist_ok=True)
        image = _write_image(out, f"{folder}/{stem}", source.encoded_image(position), frame)
        write_label(out / "labels" / f"{stem}.bin", points[::step, ::step], mask[::step, ::step])
        np.savetxt(out / "poses" / f"{stem}.txt", frame.T_map_camera, fmt="%.12g")
        known = points[mask]
        sample.append(known[rng.integers(len(known), size=POINTS_PER_FRAME)] if len(known) else known)
        for kind, name in (("image", image), ("label", f"labels/{stem}.bin"), ("pose", f"poses/{stem}.txt")):
            lists[kind].append(name)
        yield frame
    if not sample or not sum(map(len, sample)):
        raise SourceError(f"No frame of '{source.name}' has both depth and pose; labels need them.")
    write_transform(out / "transform.txt", NetworkFrame.of_points(np.concatenate(sample)))
    numbers = (camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy)
    (out / "camera.txt").write_text(" ".join(f"{number:.10g}" for number in numbers) + "\n")
    for kind, names in lists.items():
        listed = [str((out / name).resolve()) for name in names] if absolute else names
        (out / f"{kind}_list.txt").write_text("".join(f"{name}\n" for name in listed))


def _write_image(out: Path, name: str, encoded: bytes | None, frame: Frame) -> str:
    """Write the image as it was recorded if that is a JPEG, else as PNG; return its name with the ending."""
    if encoded is not None:
        (out / f"{name}.jpg").write_bytes(encoded)
        return f"{name}.jpg"
    path = out / f"{name}.png"
    if not cv2.imwrite(str(path), np.ascontiguousarray(frame.image[..., ::-1])):
        raise SourceError(f"The image '{path}' cannot be written.")
    return f"{name}.png"
