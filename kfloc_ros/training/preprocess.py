# SPDX-License-Identifier: Apache-2.0
"""PixLoc's training data made from COLMAP models: which views overlap, and which points each of them sees.

MegaDepth-like: one undistorted (PINHOLE) model a scene, all images of which may be paired. CMU-like: one model of a
slice's references, and queries whose poses are known. A scene becomes one ``.npz`` beside which no pickle is needed;
:mod:`kfloc_ros.training.preprocessed` reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.images import read_depth_m
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import inside, open_plain, read_array, read_arrays, read_text, replacing
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_colmap
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, quaternion_to_matrix
from kfloc_ros.pixloc.hloc.files import hdf5_values

MIN_COMMON = 50
"""Points that two views must share to overlap, as published."""
MIN_SIDE_PX = 480
"""Shorter side of an image that is paired, as published."""
UPRIGHT_DEG = 60.0
"""An image whose vertical leans more than this lies on its side."""
DEPTH_POINTS = 1000
"""Points of a view's depth image."""
DEPTH_TOLERANCE = 0.05
"""Share of the depth by which a point may miss another view's depth and still be seen by it."""
NEAR_M, NEAR_DEG = 1.0, 30.0
"""A query's overlaps are those of the nearest reference, which is at most so far away and turned."""
DEPTH_UNIT = 1e-3
"""Of a 16-bit depth image, in the model's unit."""
UNREACHED = -1.0
"""Overlap of views that share too little."""


@dataclass(frozen=True, eq=False)
class Model:
    """What is needed of a COLMAP model; images in the order of their ids."""

    names: Sequence[str]
    cameras: Sequence[Camera]
    T_camera_world: NDArray[np.float64]
    """(n, 4, 4)"""
    points: NDArray[np.float64]
    """(P, 3)"""
    observed: Sequence[NDArray[np.int64]]
    """Rows of ``points`` that each image sees."""


def read_model(folder: Path) -> Model:
    """Read a COLMAP model, binary or text.

    Raises:
        SourceError: it cannot be read, or holds no image with a pose.
    """
    import pycolmap

    try:
        model = pycolmap.Reconstruction(str(folder))
        images = [image for _, image in sorted(model.images.items()) if image.has_pose]
        cameras = {key: camera_from_colmap(camera) for key, camera in model.cameras.items()}
    except (RuntimeError, ValueError, IndexError, MemoryError, FrameError) as error:
        raise SourceError(f"The COLMAP model '{folder}' cannot be read: {error}") from error
    if not images:
        raise SourceError(f"The COLMAP model '{folder}' holds no image with a pose.")
    ids = sorted(model.points3D)
    row = {point: k for k, point in enumerate(ids)}
    poses = [np.asarray(image.cam_from_world().matrix(), dtype=np.float64) for image in images]
    return Model(
        [str(image.name) for image in images],
        [cameras[image.camera_id] for image in images],
        np.stack([make_pose(pose[:, :3], pose[:, 3]) for pose in poses]),
        np.array([model.points3D[k].xyz for k in ids], dtype=np.float64).reshape(-1, 3),
        [
            np.unique(np.array([row[p.point3D_id] for p in image.points2D if p.has_point3D()], dtype=np.int64))
            for image in images
        ],
    )


def preprocess_megadepth(
    model: Model, *, depths: Path | None = None, min_common: int = MIN_COMMON, min_side_px: int = MIN_SIDE_PX
) -> dict[str, Any]:
    """Return a scene in MegaDepth's layout: images that lie on their side are noted, and told as they stand upright.

    Args:
        model: of undistorted images.
        depths: folder of depth images, named as the images are; adds points where they are seen, in all views.
        min_common: points that two views must share.
        min_side_px: shorter side of an image that is paired.

    Raises:
        SourceError: an image is distorted, or a depth image cannot be read.
    """
    for name, camera in zip(model.names, model.cameras, strict=True):
        if not camera.is_pinhole:
            raise SourceError(f"'{name}' is distorted; undistort the model (colmap image_undistorter) first.")
    if depths is not None:
        model = with_depth_points(model, depths)
    overlap = shares_of_common_points(model.observed, len(model.points), min_common)
    small = np.array([min(camera.width, camera.height) < min_side_px for camera in model.cameras])
    overlap[small, :] = overlap[:, small] = UNREACHED
    turns = quarter_turns(model.T_camera_world[:, :3, :3])
    upright = [_upright(*view) for view in zip(model.cameras, model.T_camera_world, turns.tolist(), strict=True)]
    return {
        "points3D": model.points,
        "p3D_observed": model.observed,
        "image_names": model.names,
        "rotations": turns,
        "intrinsics": np.stack([K for K, _ in upright]),
        "poses": np.stack([T[:3] for _, T in upright]),
        "overlap_matrix": overlap,
    }


def preprocess_cmu(
    model: Model, queries: Sequence[tuple[str, Matrix]], *, min_common: int = MIN_COMMON
) -> dict[str, Any]:
    """Return a slice in CMU's layout: a query overlaps with what its nearest reference overlaps with.

    Args:
        model: of the references.
        queries: names and ``T_camera_world``.
        min_common: points that two references must share.
    """
    poses = np.stack([T for _, T in queries])
    overlap = shares_of_common_points(model.observed, len(model.points), min_common)
    np.fill_diagonal(overlap, UNREACHED)
    centres_q, centres_r = (np.stack([inverse_pose(T)[:3, 3] for T in part]) for part in (poses, model.T_camera_world))
    distances = np.linalg.norm(centres_q[:, None] - centres_r[None], axis=2)
    trace = np.einsum("nij,mij->nm", poses[:, :3, :3], model.T_camera_world[:, :3, :3])
    angles = np.degrees(np.arccos(np.clip((trace - 1) / 2, -1.0, 1.0)))
    alike = np.where(angles < NEAR_DEG, distances, np.inf)
    closest = alike.argmin(axis=1)
    of_queries = overlap[closest].copy()
    of_queries[alike.min(axis=1) > NEAR_M] = UNREACHED
    return {
        "points3D": model.points,
        "p3D_observed": model.observed,
        "ref_image_names": model.names,
        "ref_poses": model.T_camera_world[:, :3],
        "query_image_names": [name for name, _ in queries],
        "query_poses": poses[:, :3],
        "query_overlap_matrix": of_queries,
        "query_to_ref_distance_matrix": distances,
    }


def read_query_poses(folder: Path) -> list[tuple[str, Matrix]]:
    """Read the lists ``*.txt`` of a slice, lines ``name qw qx qy qz cx cy cz`` with the camera's centre.

    Raises:
        SourceError: there is none, or a line is of another form.
    """
    queries = []
    for path in sorted(folder.glob("*.txt")):
        try:
            lines = read_text(path).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"The list '{path}' cannot be read: {error}.") from error
        for line in filter(str.strip, lines):
            if line.startswith("#"):
                continue
            name, *words = line.split()
            try:
                qw, qx, qy, qz, *centre = (float(word) for word in words)
                R = quaternion_to_matrix([qx, qy, qz, qw])
                queries.append((name, make_pose(R, -R @ np.array(centre).reshape(3))))
            except ValueError as error:
                raise SourceError(f"'{path}' has a line that is not 'name qw qx qy qz cx cy cz': {line!r}.") from error
    if not queries:
        raise SourceError(f"'{folder}' has no lists (*.txt) of the queries' poses.")
    return queries


def shares_of_common_points(observed: Sequence[NDArray[np.int64]], count: int, min_common: int) -> NDArray[np.float64]:
    """(n, n) share of the points of view i that view j sees, and -1 where they share fewer than ``min_common``."""
    n = len(observed)
    views = np.repeat(np.arange(n), [len(rows) for rows in observed])
    rows = np.concatenate(observed) if n else np.zeros(0, dtype=np.int64)
    by_point = views[np.argsort(rows, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    shares = np.full((n, n), UNREACHED)
    for i, seen in enumerate(observed):
        if not len(seen):
            continue
        others = np.concatenate([by_point[starts[p] : starts[p + 1]] for p in seen])
        common = np.bincount(others, minlength=n)
        enough = common >= min_common
        shares[i, enough] = common[enough] / len(seen)
        shares[i, i] = UNREACHED
    return shares


def quarter_turns(R_camera_world: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) quarter turns, counter-clockwise, that bring each image upright: down is what most images' y axes say."""
    down = np.median(R_camera_world[:, 1, :], axis=0)
    seen = R_camera_world @ down
    lean_deg = np.degrees(np.arctan2(seen[:, 0], seen[:, 1]))
    turns = np.round(-lean_deg / 90).astype(np.int64) % 4
    return np.where(np.abs(lean_deg) > UPRIGHT_DEG, turns, 0)


def _upright(camera: Camera, T_camera_world: Matrix, turns: int) -> tuple[Matrix, Matrix]:
    """Intrinsics and pose of an image that is turned counter-clockwise so many times."""
    fx, fy, cx, cy, w, h = camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height
    quarter = np.eye(4)
    quarter[:2, :2] = [[0.0, 1.0], [-1.0, 0.0]]  # what was below is now on the right
    for _ in range(turns):
        fx, fy, cx, cy, w, h = fy, fx, cy, w - 1 - cx, h, w
        T_camera_world = quarter @ T_camera_world
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]), T_camera_world


def with_depth_points(model: Model, folder: Path) -> Model:
    """Return the model with points of every view's depth image, seen by all views whose own depth agrees.

    Raises:
        SourceError: a depth image is missing or cannot be read.
    """
    depths = [read_depth(folder, name, camera) for name, camera in zip(model.names, model.cameras, strict=True)]
    points, observed = [model.points], [[rows] for rows in model.observed]
    rng, total = np.random.default_rng(0), len(model.points)
    for camera, T, depth in zip(model.cameras, model.T_camera_world, depths, strict=True):
        v, u = np.nonzero(depth > 0)
        chosen = rng.permutation(len(v))[:DEPTH_POINTS]
        z = depth[v[chosen], u[chosen]].astype(np.float64)
        local = np.stack([(u[chosen] - camera.cx) / camera.fx * z, (v[chosen] - camera.cy) / camera.fy * z, z], axis=1)
        own = (local - T[:3, 3]) @ T[:3, :3]
        for k, found in enumerate(observed):
            found.append(total + np.flatnonzero(_sees(model.cameras[k], model.T_camera_world[k], depths[k], own)))
        points.append(own)
        total += len(own)
    return Model(
        model.names, model.cameras, model.T_camera_world, np.concatenate(points), [np.concatenate(o) for o in observed]
    )


def _sees(camera: Camera, T: Matrix, depth: NDArray[np.float32], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) whether points lie where a view's depth image has its surface."""
    local = points @ T[:3, :3].T + T[:3, 3]
    z = np.maximum(local[:, 2], 1e-9)
    u = np.round(local[:, 0] / z * camera.fx + camera.cx)
    v = np.round(local[:, 1] / z * camera.fy + camera.cy)
    inside = (local[:, 2] > 0) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    column, row = np.where(inside, u, 0).astype(np.int64), np.where(inside, v, 0).astype(np.int64)
    surface = depth[row, column]
    return np.asarray(inside & (surface > 0) & (np.abs(surface - z) < DEPTH_TOLERANCE * z))


def read_depth(folder: Path, name: str, camera: Camera) -> NDArray[np.float32]:
    """Read the depth (H, W) of an image, in the model's unit: ``.npy``, ``.h5`` (MegaDepth's), ``.png`` (thousandths).

    Raises:
        SourceError: there is none, it cannot be read, or its size is not the image's.
    """
    readers: Mapping[str, Callable[[Path], Any]] = {
        "npy": read_array, "h5": _read_h5, "png": lambda path: read_depth_m(path, DEPTH_UNIT)
    }  # fmt: skip
    for ending, read in readers.items():
        path = inside(folder, str(Path(name).with_suffix(f".{ending}")))
        if not path.is_file():
            continue
        try:
            depth = np.asarray(read(path), dtype=np.float32)
        except (OSError, ValueError, KeyError, RuntimeError, FrameError) as error:
            raise SourceError(f"The depth image '{path}' cannot be read: {error}") from error
        if depth.shape != (camera.height, camera.width):
            raise SourceError(f"The depth image '{path}' is not {camera.width}x{camera.height} as its image is.")
        return np.where(np.isfinite(depth), depth, np.float32(0))
    raise SourceError(f"'{folder}' has no depth for '{name}': looked for .npy, .h5 and .png of that name.")


def _read_h5(path: Path) -> Any:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise SourceError(f"'{path}' needs h5py: pip install h5py.") from error
    with open_plain(path) as stream, h5py.File(stream, "r") as file:
        if not isinstance(file.get("depth", getlink=True), h5py.HardLink):
            raise ValueError("it has no 'depth' of its own")
        return hdf5_values(file["depth"], path)


def write_scene(path: Path, scene: Mapping[str, Any]) -> None:
    """Write a scene as ``.npz``, whole or not at all; lists of unequal length become one array and its parts' sizes."""
    observed = scene["p3D_observed"]
    arrays = {key: np.asarray(value) for key, value in scene.items() if key != "p3D_observed"}
    arrays["p3D_observed"] = np.concatenate(observed).astype(np.int64)
    arrays["p3D_observed_counts"] = np.array([len(rows) for rows in observed])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]


def read_scene(path: Path) -> dict[str, Any]:
    """Read what :func:`write_scene` wrote, with the keys of the original's pickles.

    Raises:
        OSError, ValueError, KeyError: the file is missing, damaged or of another kind.
    """
    scene: dict[str, Any] = dict(read_arrays(path))
    counts = scene.pop("p3D_observed_counts")
    if int(counts.sum()) != len(scene["p3D_observed"]) or (counts < 0).any():
        raise ValueError("the views' points do not add up")
    scene["p3D_observed"] = np.split(scene["p3D_observed"], np.cumsum(counts)[:-1])
    for key in [key for key in scene if key.endswith("poses")]:
        scene[key] = [(pose[:, :3], pose[:, 3]) for pose in scene[key]]
    return scene
