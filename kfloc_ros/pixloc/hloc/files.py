# SPDX-License-Identifier: Apache-2.0
"""Text files of the benchmarks: queries with intrinsics, image pairs, poses; hloc's logs and descriptors.

queries  name MODEL width height params...          COLMAP's models and parameters
pairs    query reference                            one pair a line, best first
poses    name qw qx qy qz tx ty tz                  from the world to the camera
"""

from __future__ import annotations

import importlib
import math
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.metrics import FAILURE, pose_error, recall
from kfloc_ros.files import (
    FREE_BYTES,
    MAX_RATIO,
    check_tensor_list,
    open_plain,
    read_arrays,
    read_bytes,
    read_text,
)
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_parameters
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, matrix_to_quaternion, quaternion_to_matrix
from kfloc_ros.pixloc.hloc.inert_pickle import read_inert

THRESHOLDS: tuple[tuple[float, float], ...] = (
    (0.01, 1.0), (0.02, 2.0), (0.03, 3.0), (0.05, 5.0), (0.25, 2.0), (0.5, 5.0), (5.0, 10.0),
)  # fmt: skip
"""Metres and degrees; an error counts if it is below both."""


def read_queries(pattern: Path) -> dict[str, Camera]:
    """Return queries with their cameras, from one file or from all that a pattern such as ``queries/*.txt`` names.

    Raises:
        SourceError: no file, or a line that is not a query; file and line are named.
    """
    files = [pattern] if pattern.is_file() else sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise SourceError(f"There is no query list '{pattern}'.")
    queries: dict[str, Camera] = {}
    for path in files:
        for number, words in _lines(path):
            try:
                name, model, width, height, *parameters = words
                queries[name] = camera_from_parameters(
                    model, int(width), int(height), [float(word) for word in parameters]
                )
            except (ValueError, FrameError) as error:
                raise SourceError(f"Line {number} of '{path}' is not 'name MODEL w h params...': {error}") from error
    return queries


def read_pairs(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the reference images of every query, best first.

    Raises:
        SourceError: no file, or a line that is not a pair.
    """
    pairs: dict[str, list[str]] = {}
    for number, words in _lines(path):
        if len(words) != 2:
            raise SourceError(f"Line {number} of '{path}' is not 'query reference'.")
        pairs.setdefault(words[0], []).append(words[1])
    return {query: tuple(references) for query, references in pairs.items()}


def result_name(query: str, *, keep_parent: bool) -> str:
    """Return the name of a query in a file of poses: its last part, or its last two."""
    return "/".join(query.split("/")[-2 if keep_parent else -1 :])


def pose_line(name: str, T_map_camera: Matrix) -> str:
    """Return one line of a file of poses."""
    T = inverse_pose(T_map_camera)
    x, y, z, w = matrix_to_quaternion(T[:3, :3])
    return " ".join([name, *(repr(float(value)) for value in (w, x, y, z, *T[:3, 3]))])


def write_poses(path: Path, T_map_camera: Mapping[str, Matrix]) -> None:
    """Write poses by name, as world to camera."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{pose_line(name, T)}\n" for name, T in T_map_camera.items()))


def read_poses(path: Path) -> dict[str, Matrix]:
    """Return ``T_map_camera`` by name.

    Raises:
        SourceError: no file, or a line that is not a pose.
    """
    poses: dict[str, Matrix] = {}
    for number, words in _lines(path):
        try:
            w, x, y, z, *t = (float(word) for word in words[1:])
            if len(t) != 3 or not np.isfinite(t).all():
                raise ValueError("seven finite numbers are due")
            poses[words[0]] = inverse_pose(make_pose(quaternion_to_matrix([x, y, z, w]), t))
        except ValueError as error:
            raise SourceError(f"Line {number} of '{path}' is not 'name qw qx qy qz tx ty tz': {error}") from error
    return poses


def accuracy_text(estimates: Mapping[str, Matrix], truth: Mapping[str, Matrix], *, only_estimated: bool = False) -> str:
    """Return medians and recall in the original's format; a query without a pose has an infinite error.

    Args:
        estimates, truth: T_map_camera by name.
        only_estimated: leave out queries without a pose, for a run over a part of them.
    """
    names = [name for name in truth if name in estimates or not only_estimated]
    errors = [pose_error(estimates[name], truth[name]) if name in estimates else FAILURE for name in names]
    median_m = float(np.median([e.translation_m for e in errors])) if errors else math.nan
    median_deg = float(np.median([e.rotation_deg for e in errors])) if errors else math.nan
    lines = [f"Median errors: {median_m:.3f}m, {median_deg:.3f}deg", "Percentage of test images localized within:"]
    lines += [
        f"\t{100 * metres:.0f}cm, {degrees:.0f}deg : {100 * recall(errors, metres, degrees):.2f}%"
        for metres, degrees in THRESHOLDS
    ]
    return "\n".join(lines)


def _lines(path: Path) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the number and the words of every line that is neither empty nor a comment."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words


@dataclass(frozen=True, eq=False)
class HlocQuery:
    """Entry of one query in a log of hloc."""

    database_ids: tuple[int, ...]
    """COLMAP ids of the images that it was matched with, best retrieved first."""
    T_map_camera: Matrix | None
    """PnP pose; None if PnP failed."""
    num_inliers: int
    point_ids: NDArray[np.int64]
    """(M,) COLMAP id of the 3-D point of every match."""
    inliers: NDArray[np.bool_]
    """(M,)"""
    seen_in: tuple[tuple[int, ...], ...]
    """(M,) positions in ``database_ids`` of the images that the match came from; empty if the log has none."""

    def inlier_counts(self) -> dict[int, int]:
        """Return the number of inliers of every database image that has any, by its id."""
        counts: Counter[int] = Counter()
        for inlier, positions in zip(self.inliers, self.seen_in, strict=False):
            if inlier:
                counts.update(self.database_ids[position] for position in positions)
        return dict(counts)


def read_hloc_log(path: Path) -> dict[str, HlocQuery]:
    """Return every query of a log.

    Raises:
        SourceError: the file is missing, damaged, or not a log.
    """
    try:
        content = read_inert(read_bytes(path))
    except OSError as error:
        raise SourceError(f"The log '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise SourceError(f"The log '{path}' is damaged or not hloc's: {error}") from error
    queries = content.get("loc") if isinstance(content, Mapping) else None
    if not isinstance(queries, Mapping):
        raise SourceError(f"'{path}' is not a log of hloc: it has no entry 'loc'.")
    found: dict[str, HlocQuery] = {}
    for name, entry in queries.items():
        try:
            found[str(name)] = _query(entry)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SourceError(f"The log '{path}' cannot be understood at query '{name}': {error!r}") from error
    return found


def _query(entry: Mapping[str, Any]) -> HlocQuery:
    ids = entry.get("db", entry.get("db_ids", ()))
    if entry.get("log_clusters"):  # matched cluster by cluster: the best one counts
        best = entry.get("best_cluster")
        entry = entry["log_clusters"][0 if best is None else best]
        ids = entry.get("cluster_ids", entry.get("db", ids))
    result = entry.get("PnP_ret") or {}  # None where today's PnP fails
    pose = _pose(result)
    count = len(entry.get("points3D_ids", ()))
    mask = result.get("inliers", result.get("inlier_mask"))
    inliers = np.zeros(count, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    matches = entry.get("keypoint_index_to_db", ((), ()))[1]
    point_ids = [m[0] for m in matches] if len(matches) else entry.get("points3D_ids", ())
    point_ids = np.array([int(ident) for ident in point_ids], dtype=np.int64)
    if mask is None and len(inliers) != len(point_ids):
        inliers = np.zeros(len(point_ids), dtype=bool)
    if len(inliers) != len(point_ids):
        raise ValueError(f"{len(inliers)} inlier flags for {len(point_ids)} matches")
    database_ids = tuple(int(ident) for ident in ids)
    seen_in = tuple(tuple(int(position) for position in m[1]) for m in matches)
    if any(not 0 <= position < len(database_ids) for positions in seen_in for position in positions):
        raise ValueError("a match names a database image that the query has not")
    number = int(result.get("num_inliers", int(inliers.sum())))
    return HlocQuery(database_ids, pose, number, point_ids, inliers, seen_in)


def _pose(result: Mapping[str, Any]) -> Matrix | None:
    if not result or not result.get("success", True):
        return None
    if "qvec" in result:
        w, x, y, z = (float(value) for value in result["qvec"])
        t = result["tvec"]
    else:
        state = result["cam_from_world"].state
        x, y, z, w = (float(value) for value in state["rotation"].state["quat"])
        t = state["translation"]
    return inverse_pose(make_pose(quaternion_to_matrix([x, y, z, w]), np.asarray(t, dtype=np.float64).reshape(3)))


def read_descriptors(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return one vector an image, by its name.

    Raises:
        SourceError: the file is missing, damaged, or of an unknown kind, or h5py is needed and not installed.
    """
    if not path.is_file():
        raise SourceError(
            f"There are no global descriptors '{path}'; give them with --global-descriptors, or do without by "
            "do_pose_approximation=false."
        )
    try:
        if path.suffix == ".npz":
            found: dict[str, Any] = dict(read_arrays(path))
        elif path.suffix == ".safetensors":
            check_tensor_list(path)
            found = dict(load_file(path))
        elif path.suffix in (".h5", ".hdf5"):
            found = _read_hdf5(path)
        else:
            raise SourceError(f"Global descriptors are .h5, .npz or .safetensors, not '{path.name}'.")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, zipfile.BadZipFile) as error:
        raise SourceError(f"The global descriptors '{path}' cannot be read: {error}") from error
    return {name: np.asarray(vector, dtype=np.float64).reshape(-1) for name, vector in found.items()}


def _read_hdf5(path: Path) -> dict[str, Any]:
    """Read hloc's ``<image name>/global_descriptor``; names contain slashes and thus groups."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise SourceError(
            f"Reading '{path.name}' needs h5py; install it with `pip install h5py`, or convert the file to .npz."
        ) from error
    found: dict[str, Any] = {}
    taken = 0

    def visit(name: str, item: Any) -> None:
        nonlocal taken
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] == "global_descriptor":
            values = hdf5_values(item, path, taken)
            taken += values.nbytes
            found[name.rpartition("/")[0]] = values

    with open_plain(path) as stream, h5py.File(stream, "r") as file:
        file.visititems(visit)
    return found


def hdf5_values(dataset: Any, path: Path, taken: int = 0) -> NDArray[Any]:
    """Return the values of a data set of an HDF5 file, whose size is checked before memory is taken.

    Args:
        dataset: of h5py.
        path: file that it is in.
        taken: bytes that were read from the file before.

    Raises:
        ValueError: it is larger than what the file can hold, lies in another file, or is no array of numbers.
    """
    limit = FREE_BYTES + MAX_RATIO * path.stat().st_size
    if getattr(dataset, "dtype", None) is None or dataset.dtype.kind not in "fiu" or dataset.external:
        raise ValueError(f"'{dataset.name}' is no array of numbers in this file")
    if taken + dataset.size * dataset.dtype.itemsize > limit:
        raise ValueError(f"'{dataset.name}' unpacks to more than {limit} bytes")
    return np.asarray(dataset[()])
