# SPDX-License-Identifier: Apache-2.0
"""Poses of many coordinate-map files, on several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.files import MapDescription, read_coordinates, read_list
from kfloc_ros.solvers.pnp import PnpSettings, solve_pnp
from kfloc_ros.types import CoarsePose, SceneCoordinates

MIN_CONFIDENCE_PER_M = 20.0
"""Cells less certain than 5 cm are left out, as the original's viewer does, unless too few are left."""
ENOUGH_CELLS = 200
"""If the confidence leaves fewer cells than this, this many of the surest are taken instead."""


@dataclass(frozen=True)
class PnpJob:
    """What is the same for all files."""

    description: MapDescription
    settings: PnpSettings
    min_confidence: float = MIN_CONFIDENCE_PER_M


def find_maps(path: Path) -> list[Path]:
    """Coordinate maps of a list file, or ``coord_<i>.npy`` of a folder in the order of i.

    Raises:
        SourceError: there is none.
    """
    if not path.is_dir():
        return read_list(path)
    numbered = [(p.stem.removeprefix("coord_"), p) for p in path.glob("coord_*.npy")]
    maps = [p for _, p in sorted((int(n), p) for n, p in numbered if n.isdigit())]
    if not maps:
        raise SourceError(f"The folder '{path}' holds no coord_<i>.npy.")
    return maps


def confident_part(coordinates: SceneCoordinates, min_confidence: float) -> SceneCoordinates:
    """Only the cells whose 1/sigma reaches a limit, or the surest few where hardly any does."""
    sigma = coordinates.variance.sqrt().masked_fill(~coordinates.valid, float("inf"))
    limit = 1.0 / min_confidence if min_confidence > 0 else float("inf")
    if int((sigma <= limit).sum()) < ENOUGH_CELLS:
        limit = float(sigma.flatten().sort().values[min(ENOUGH_CELLS, sigma.numel()) - 1])
    return replace(coordinates, valid=coordinates.valid & (sigma <= limit))


def solve_file(path: Path, job: PnpJob) -> CoarsePose:
    """Pose of one coordinate map.

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


def solve_files(paths: Sequence[Path], job: PnpJob, processes: int) -> Iterator[CoarsePose]:
    """Poses in the order of the files.

    Raises:
        SourceError: a file is not a coordinate map.
    """
    if processes <= 1:
        yield from (solve_file(path, job) for path in paths)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(solve_file, paths, [job] * len(paths), chunksize=8)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def parse_camera(numbers: Sequence[float]) -> Camera:
    """Camera of width, height, fx, fy, cx, cy.

    Raises:
        FrameError: they make no camera.
    """
    width, height, fx, fy, cx, cy = numbers
    return Camera(int(width), int(height), fx, fy, cx, cy)
