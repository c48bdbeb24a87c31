# SPDX-License-Identifier: Apache-2.0
"""KFNet's file formats: label maps, predicted coordinate maps, flow maps, poses, and lists of paths.

Labels are raw little-endian float32, H x W x 4: x, y, z in world metres and a mask of 1 or 0, at full resolution or
for every eighth pixel, [::8, ::8]. Predictions are ``coord_<i>.npy``, h x w x 4 float32: world metres and 1 / sigma
(the inverse standard deviation per axis, 1/m). Flows are ``<a>_<b>_flow.npy``, h x w x 3 float32: x and y in cells at
the cells of image a, pointing into image b, and 1 / sigma of the prior.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import MAX_IMAGE_PIXELS, check_count, inside, number_rows, read_array, read_bytes, read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import is_rotation
from kfloc_ros.kfnet.pnp import PnpSettings, solve_pnp
from kfloc_ros.types import CoarsePose, Matrix, SceneCoordinates

STRIDE = 8
DESCRIPTION = "coordinates.json"
"""File beside coordinate maps that this package writes: the pixel of a cell, and the camera."""
DEFAULT_CAMERA = Camera(640, 480, 525.0, 525.0, 320.0, 240.0)
"""Camera that the original assumes, since its folders hold no intrinsics."""
MAX_LABEL_BYTES = 16 * MAX_IMAGE_PIXELS
MAX_POSITION_M = 1e8
CONFIDENCE_LIMIT = 1e6
"""Largest 1 / sigma in the files, 1/m; keeps the values finite."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """True scene coordinates of an image's pixels."""

    points: NDArray[np.float32]
    """(h, w, 3) world metres."""
    mask: NDArray[np.bool_]
    """(h, w)"""
    stride: int
    """1; or 8, where entry (r, c) belongs to pixel (8 c, 8 r)."""


@dataclass(frozen=True)
class MapDescription:
    """Description of a folder of coordinate maps; the defaults are the original's conventions."""

    camera: Camera = DEFAULT_CAMERA
    stride: int = STRIDE
    pixel_offset: float = 0.0
    """Offset of the pixel (u, v) = stride * (c, r) + pixel_offset that cell (r, c) stands for."""


def read_label(path: Path, width: int, height: int) -> LabelMap:
    """Read a label of an image of the given size, at either resolution.

    Labels of the Cambridge scenes are 4 pixels wider than their images, which are cropped by 2 on each side.

    Raises:
        FrameError: missing, or its size is not that of a label of such an image.
    """
    try:
        data = read_bytes(path, MAX_LABEL_BYTES)
    except OSError as error:
        raise FrameError(f"The label '{path}' cannot be read: {error.strerror}.") from error
    values = np.frombuffer(data[: len(data) // 4 * 4], dtype="<f4")
    small = (math.ceil(height / STRIDE), math.ceil(width / STRIDE))
    for shape, stride in (((height, width), 1), (small, STRIDE), ((height, width + 4), 1)):
        if values.size == shape[0] * shape[1] * 4:
            grid = values.reshape(*shape, 4)
            if shape[1] == width + 4:
                grid = grid[:, 2:-2]
            mask = (grid[..., 3] >= 0.5) & np.isfinite(grid).all(-1)
            return LabelMap(np.ascontiguousarray(grid[..., :3], dtype=np.float32), mask, stride)
    raise FrameError(
        f"The label '{path}' has {len(data)} bytes; an image of {width}x{height} has a label of "
        f"{width * height * 16} bytes, or of {small[0] * small[1] * 16} for every eighth pixel."
    )


def write_label(path: Path, points: NDArray[np.floating], mask: NDArray[np.bool_]) -> None:
    """Write a label of points (h, w, 3) in world metres; unknown pixels are zero."""
    grid = np.zeros((*mask.shape, 4), dtype="<f4")
    grid[..., :3] = np.where(mask[..., None], points, 0.0)
    grid[..., 3] = mask
    grid.tofile(path)


def coordinate_map(coordinates: SceneCoordinates) -> NDArray[np.float32]:
    """Return the (h, w, 4) content of ``coord_<i>.npy``; confidence 0 where the cell is invalid."""
    confidence = coordinates.variance.rsqrt().clamp(max=CONFIDENCE_LIMIT) * coordinates.valid
    grid = torch.cat([coordinates.mean, confidence[None]]).permute(1, 2, 0)
    return np.nan_to_num(np.asarray(grid.float().cpu().numpy(), dtype=np.float32))


def write_coordinates(folder: Path, index: int, coordinates: SceneCoordinates) -> Path:
    """Write ``coord_<index>.npy``."""
    path = folder / f"coord_{index}.npy"
    np.save(path, coordinate_map(coordinates))
    return path


def write_flow(folder: Path, a: int, b: int, offset: torch.Tensor, prior_variance: torch.Tensor) -> Path:
    """Write ``<a>_<b>_flow.npy``: a flow (2, h, w) in cells from image a into b, and the prior's variance (h, w)."""
    confidence = prior_variance.rsqrt().clamp(max=CONFIDENCE_LIMIT)
    path = folder / f"{a}_{b}_flow.npy"
    np.save(path, torch.cat([offset, confidence[None]]).permute(1, 2, 0).float().cpu().numpy())
    return path


def read_coordinates(path: Path, description: MapDescription) -> SceneCoordinates:
    """Read ``coord_<i>.npy``.

    Raises:
        SourceError: missing, not an array of h x w x 4 numbers.
    """
    try:
        grid = read_array(path)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"'{path}' is not a readable array: {error}") from error
    if grid.ndim != 3 or grid.shape[2] != 4 or grid.dtype.kind != "f":
        raise SourceError(f"'{path}' has the shape {grid.shape} ({grid.dtype}); a coordinate map is h x w x 4 floats.")
    tensor = torch.from_numpy(grid.astype(np.float32))
    confidence = tensor[..., 3]
    valid = torch.isfinite(tensor).all(-1) & (confidence > 0)
    variance = torch.where(valid, confidence, 1.0).square().reciprocal()
    mean = torch.nan_to_num(tensor[..., :3]).permute(2, 0, 1).contiguous()
    return SceneCoordinates(mean, variance, valid, description.stride, description.pixel_offset)


def write_description(folder: Path, description: MapDescription, frames: Sequence[dict[str, Any]]) -> None:
    """Write ``coordinates.json``: conventions as text and numbers, and one entry a map."""
    content = {
        "channels": ["x_m", "y_m", "z_m", "1/sigma_per_m"],
        "stride": description.stride,
        "pixel_offset": description.pixel_offset,
        "camera": {**asdict(description.camera), "distortion": list(description.camera.distortion)},
        "frames": list(frames),
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")


def read_description(folder: Path) -> MapDescription:
    """Return the content of ``coordinates.json``; if there is none, the original's conventions.

    Raises:
        SourceError: the file is damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return MapDescription()
    try:
        content = json.loads(read_text(path))
        camera = Camera(**{**content["camera"], "distortion": tuple(content["camera"]["distortion"])})
        return MapDescription(camera, int(content["stride"]), float(content["pixel_offset"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, FrameError) as error:
        raise SourceError(f"'{path}' is damaged: {error}.") from error


def read_list(path: Path) -> list[Path]:
    """Return the paths of a list file, one a line; relative ones are relative to its folder.

    Raises:
        SourceError: missing, empty, or a path leads out of the folder.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
    check_count(len(lines), path)
    try:
        paths = [inside(path.parent.absolute(), line) for line in lines if line]
    except SourceError as error:
        raise SourceError(
            f"The list '{path}' names a file outside of its folder; put the list above the files that it names. {error}"
        ) from error
    if not paths:
        raise SourceError(f"The list '{path}' is empty.")
    return paths


def read_pose(path: Path) -> Matrix | None:
    """Return a 4x4 camera-to-world matrix as 7-Scenes writes it; None where it is not finite or all zero.

    Raises:
        FrameError: the file is missing, or does not hold four lines of four numbers, or no rotation.
    """
    try:
        rows = number_rows(path)
    except (OSError, ValueError) as error:
        raise FrameError(f"'{path}' does not hold a 4x4 pose: {error}") from error
    if [len(row) for row in rows] != [4, 4, 4, 4]:
        raise FrameError(f"'{path}' does not hold a 4x4 pose but lines of {[len(row) for row in rows][:8]} numbers.")
    T = np.array(rows, dtype=np.float64)
    if not (np.isfinite(T).all() and T[:3, :3].any() and np.abs(T[:3, 3]).max() < MAX_POSITION_M):
        return None
    if not is_rotation(T[:3, :3]):
        raise FrameError(f"'{path}' does not hold a pose: the 3x3 part of its matrix is no rotation.")
    return T


def pose_fault(path: Path) -> str:
    """Return a sentence that says why :func:`read_pose` cannot read a file; empty where it can, or there is none."""
    try:
        if path.exists():
            read_pose(path)
    except FrameError as error:
        return str(error)
    return ""


def write_pose(path: Path, T_map_camera: Matrix | None) -> None:
    """Write a 4x4 camera-to-world matrix; all ``nan`` for None, so that the numbering of files stays aligned."""
    np.savetxt(path, np.full((4, 4), np.nan) if T_map_camera is None else T_map_camera, fmt="%.9g")


MIN_CONFIDENCE_PER_M = 20.0
"""Smallest confidence of a cell that is used, as in the original's viewer: a sigma of 5 cm."""
ENOUGH_CELLS = 200
"""Number of cells below which the most certain ones are used, whatever their confidence."""


@dataclass(frozen=True)
class PnpJob:
    """Settings common to all files."""

    description: MapDescription
    settings: PnpSettings
    min_confidence: float = MIN_CONFIDENCE_PER_M


def find_maps(path: Path) -> list[Path]:
    """Return the coordinate maps of a list file, or ``coord_<i>.npy`` of a folder in the order of i.

    Raises:
        SourceError: there is none.
    """
    if not path.is_dir():
        return read_list(path)
    numbered = [(p.stem.removeprefix("coord_"), p) for p in path.glob("coord_*.npy")]
    maps = [p for _, p in sorted((int(n), p) for n, p in numbered if n.isdecimal())]
    if not maps:
        raise SourceError(f"The folder '{path}' holds no coord_<i>.npy.")
    return maps


def confident_part(coordinates: SceneCoordinates, min_confidence: float) -> SceneCoordinates:
    """Return the cells whose 1/sigma reaches a limit; if they are too few, the most certain ones."""
    sigma = coordinates.variance.sqrt().masked_fill(~coordinates.valid, float("inf"))
    limit = 1.0 / min_confidence if min_confidence > 0 else float("inf")
    if int((sigma <= limit).sum()) < ENOUGH_CELLS:
        limit = float(sigma.flatten().sort().values[min(ENOUGH_CELLS, sigma.numel()) - 1])
    return replace(coordinates, valid=coordinates.valid & (sigma <= limit))


def solve_file(path: Path, job: PnpJob) -> CoarsePose:
    """Return the pose of one coordinate map.

    Raises:
        SourceError: the file is not a coordinate map, or too large for the camera.
    """
    coordinates = read_coordinates(path, job.description)
    camera, stride = job.description.camera, job.description.stride
    h, w = coordinates.variance.shape
    if (h - 1) * stride >= camera.height or (w - 1) * stride >= camera.width:
        raise SourceError(
            f"'{path}' has {h}x{w} cells of {stride} pixels, more than an image of {camera.width}x{camera.height} "
            "has; give the camera with --camera."
        )
    return solve_pnp(confident_part(coordinates, job.min_confidence), camera, job.settings)


@dataclass(frozen=True)
class PnpPart:
    """Some coordinate maps of a job, for one worker."""

    paths: tuple[Path, ...]
    job: PnpJob


def solve_part(part: PnpPart) -> list[CoarsePose]:
    """Return the poses of some coordinate maps.

    Raises:
        SourceError: a file is not a coordinate map.
    """
    return [solve_file(path, part.job) for path in part.paths]


def parse_camera(numbers: Sequence[float]) -> Camera:
    """Return the camera of width, height, fx, fy, cx, cy.

    Raises:
        FrameError: the numbers are not valid intrinsics.
    """
    width, height, fx, fy, cx, cy = numbers
    return Camera(int(width), int(height), fx, fy, cx, cy)
