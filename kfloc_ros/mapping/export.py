# SPDX-License-Identifier: Apache-2.0
"""A map for other programs: a COLMAP text model, and a PLY point cloud.

Maps keep no images and no colours: points are grey, image names are ``view_<id>.png`` and stand for the frame index
in the mapping source.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.mapping.scene_map import SceneMap

COLMAP_PIXEL_SHIFT = 0.5
"""COLMAP's pixel (0, 0) is the corner of the top-left pixel, here it is its centre."""
GREY = 128
ERROR_UNKNOWN = -1.0


def export_colmap(scene_map: SceneMap, folder: Path) -> Path:
    """Write cameras.txt, images.txt and points3D.txt: the reference views, and each point seen in its own view.

    Raises:
        MapError: the folder exists or cannot be written.
    """
    if folder.exists():
        raise MapError(f"'{folder}' exists; name another folder.")
    temporary: Path | None = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        c = scene_map.camera
        centre = f"{c.cx + COLMAP_PIXEL_SHIFT!r} {c.cy + COLMAP_PIXEL_SHIFT!r}"
        (temporary / "cameras.txt").write_text(f"1 PINHOLE {c.width} {c.height} {c.fx!r} {c.fy!r} {centre}\n")
        with (temporary / "images.txt").open("w") as images, (temporary / "points3D.txt").open("w") as points:
            for image_line, observations, point_lines in _colmap_lines(scene_map):
                images.write(f"{image_line}\n{observations}\n")
                points.writelines(f"{line}\n" for line in point_lines)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise MapError(f"'{folder}' cannot be written: {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def export_ply(scene_map: SceneMap, path: Path) -> Path:
    """Write all reference points as binary PLY: x, y, z in metres (map frame), confidence.

    Raises:
        MapError: the file exists or cannot be written.
    """
    views = scene_map.references.views
    rows = [np.c_[view.points.cpu().numpy(), view.confidence.cpu().numpy()] for view in views]
    table = np.concatenate(rows).astype("<f4")
    properties = "".join(f"property float {name}\n" for name in ("x", "y", "z", "confidence"))
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment frame {_one_line(scene_map.frame_id)}, metres\n"
        f"element vertex {len(table)}\n{properties}end_header\n"
    )
    return write_new_file(path, header.encode("ascii", "replace") + table.tobytes())


def write_new_file(path: Path, data: bytes) -> Path:
    """Write a file that must not exist; it appears whole or not at all.

    Raises:
        MapError: it exists or cannot be written.
    """
    if path.exists():
        raise MapError(f"'{path}' exists; name another file.")
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        partial.chmod(0o644)
        os.replace(partial, path)
    except OSError as error:
        raise MapError(f"'{path}' cannot be written: {error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return path


def _colmap_lines(scene_map: SceneMap) -> Iterator[tuple[str, str, list[str]]]:
    """For every view: its line of images.txt, its observations, its lines of points3D.txt."""
    first = 1
    references = scene_map.references
    for number, (ident, T, view) in enumerate(
        zip(references.ids, references.T_map_camera, references.views, strict=True), start=1
    ):
        T_camera_map = inverse_pose(T)
        points = view.points.cpu().double().numpy()
        pixels = _project(points, T_camera_map, scene_map.camera) + COLMAP_PIXEL_SHIFT
        pose = " ".join(repr(float(v)) for v in (*quaternion_wxyz(T_camera_map[:3, :3]), *T_camera_map[:3, 3]))
        numbers = range(first, first + len(points))
        observations = " ".join(f"{u:.3f} {v:.3f} {k}" for (u, v), k in zip(pixels, numbers, strict=True))
        lines = [
            f"{k} {x!r} {y!r} {z!r} {GREY} {GREY} {GREY} {ERROR_UNKNOWN} {number} {at}"
            for at, (k, (x, y, z)) in enumerate(zip(numbers, points.tolist(), strict=True))
        ]
        yield f"{number} {pose} 1 view_{ident:06d}.png", observations, lines
        first += len(points)


def _project(points: NDArray[np.float64], T_camera_map: Matrix, camera: Camera) -> NDArray[np.float64]:
    P = points @ T_camera_map[:3, :3].T + T_camera_map[:3, 3]
    return np.stack([camera.fx * P[:, 0] / P[:, 2] + camera.cx, camera.fy * P[:, 1] / P[:, 2] + camera.cy], axis=1)


def quaternion_wxyz(R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternion (w, x, y, z), w >= 0, of a rotation: the eigenvector of Bar-Itzhack's symmetric matrix (2000)."""
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


def _one_line(text: str) -> str:
    return " ".join(text.split())
