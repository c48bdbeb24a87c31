# SPDX-License-Identifier: Apache-2.0
"""Writes any source with depth and poses as a folder that the original KFNet, and this package, train from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import recordings
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.reference.files import STRIDE, write_label
from kfloc_ros.kfnet.reference.frame import NetworkFrame, write_transform
from kfloc_ros.types import Frame, Matrix

POINTS_PER_FRAME = 500
"""Points of every frame from which the scene's transform is made."""


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
