# SPDX-License-Identifier: Apache-2.0
"""Export of a map or a place to other programs: COLMAP text model, PLY point cloud.

Maps contain no images and no colours: points are grey, and image names are ``view_<id>.png`` with the frame index in
the mapping source; in a place, they start with the submap's name, ``kitchen/view_<id>.png``. Submaps are read one after
the other; all coordinates are in the place's frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_to_colmap, pixels_to_colmap
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.maps.files import appearing, appearing_file
from kfloc_ros.maps.place import AnyMap, each_map
from kfloc_ros.messages.clouds import ply_bytes

GREY = 128
ERROR_UNKNOWN = -1.0


def export_colmap(known: AnyMap, folder: Path) -> Path:
    """Write cameras.txt, images.txt and points3D.txt: the reference views, and each point observed in its own view.

    Raises:
        MapError: the folder exists or cannot be written, or a submap cannot be read.
    """
    if folder.exists():
        raise MapError(f"'{folder}' exists; give another folder.")
    try:
        with appearing(folder.absolute()) as temporary:
            c = known.camera
            model, parameters = camera_to_colmap(c)
            line = f"1 {model} {c.width} {c.height} {' '.join(map(repr, parameters))}\n"
            (temporary / "cameras.txt").write_text(line)
            with (temporary / "images.txt").open("w") as images, (temporary / "points3D.txt").open("w") as points:
                for image_line, observations, point_lines in _colmap_lines(known):
                    images.write(f"{image_line}\n{observations}\n")
                    points.writelines(f"{line}\n" for line in point_lines)
    except OSError as error:
        raise MapError(f"'{folder}' cannot be written: {error}.") from error
    return folder


def export_ply(known: AnyMap, path: Path) -> Path:
    """Write all reference points as binary PLY: x, y, z in metres (map frame), confidence.

    Raises:
        MapError: the file exists or cannot be written, or a submap cannot be read.
    """
    views = (view for _, part in each_map(known) for view in part.references.views)
    rows = [np.c_[view.points.cpu().numpy(), view.confidence.cpu().numpy()] for view in views]
    table = np.concatenate(rows).astype("<f4").view([(name, "<f4") for name in ("x", "y", "z", "confidence")])[:, 0]
    return write_new_file(path, ply_bytes(table, f"frame {known.frame_id}"))


def write_new_file(path: Path, data: bytes) -> Path:
    """Write a new file atomically.

    Raises:
        MapError: the file exists or cannot be written.
    """
    if path.exists():
        raise MapError(f"'{path}' exists; give another file.")
    try:
        with appearing_file(path) as stream:
            stream.write(data)
    except OSError as error:
        raise MapError(f"'{path}' cannot be written: {error}.") from error
    return path


def _colmap_lines(known: AnyMap) -> Iterator[tuple[str, str, list[str]]]:
    """Yield for every view its line of images.txt, its observations, and its lines of points3D.txt."""
    views = (
        (_image_name(submap, ident), T, view)
        for submap, part in each_map(known)
        for ident, T, view in zip(part.references.ids, part.references.T_map_camera, part.references.views, strict=True)
    )
    first = 1
    for number, (name, T, view) in enumerate(views, start=1):
        T_camera_map = inverse_pose(T)
        points = view.points.cpu().double().numpy()
        pixels = pixels_to_colmap(_project(points, T_camera_map, known.camera))
        pose = " ".join(repr(float(v)) for v in (*quaternion_wxyz(T_camera_map[:3, :3]), *T_camera_map[:3, 3]))
        numbers = range(first, first + len(points))
        observations = " ".join(f"{u:.3f} {v:.3f} {k}" for (u, v), k in zip(pixels, numbers, strict=True))
        lines = [
            f"{k} {x!r} {y!r} {z!r} {GREY} {GREY} {GREY} {ERROR_UNKNOWN} {number} {at}"
            for at, (k, (x, y, z)) in enumerate(zip(numbers, points.tolist(), strict=True))
        ]
        yield f"{number} {pose} 1 {name}", observations, lines
        first += len(points)


def _image_name(submap: str, ident: int) -> str:
    name = f"view_{ident:06d}.png"
    return f"{submap}/{name}" if submap else name


def _project(points: NDArray[np.float64], T_camera_map: Matrix, camera: Camera) -> NDArray[np.float64]:
    P = points @ T_camera_map[:3, :3].T + T_camera_map[:3, 3]
    return np.stack([camera.fx * P[:, 0] / P[:, 2] + camera.cx, camera.fy * P[:, 1] / P[:, 2] + camera.cy], axis=1)


def quaternion_wxyz(R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the unit quaternion (w, x, y, z), w >= 0, of a rotation, by Bar-Itzhack's method (2000)."""
    (a, b, c), (d, e, f), (g, h, i) = R
    K = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ]
    )
    q = np.linalg.eigh(K)[1][:, -1]
    return np.asarray(q if q[0] >= 0 else -q)
