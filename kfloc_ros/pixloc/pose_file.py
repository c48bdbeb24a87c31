# SPDX-License-Identifier: Apache-2.0
"""Text files of the benchmarks: queries with intrinsics, image pairs, poses, and the figures the original prints.

queries  name MODEL width height params...          COLMAP's models and parameters
pairs    query reference                            one pair a line, best first
poses    name qw qx qy qz tx ty tz                  from the world to the camera
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.metrics import FAILURE, pose_error, recall
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_parameters
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, matrix_to_quaternion, quaternion_to_matrix

THRESHOLDS: tuple[tuple[float, float], ...] = (
    (0.01, 1.0), (0.02, 2.0), (0.03, 3.0), (0.05, 5.0), (0.25, 2.0), (0.5, 5.0), (5.0, 10.0),
)  # fmt: skip
"""Metres and degrees; errors count that are below both."""


def read_queries(pattern: Path) -> dict[str, Camera]:
    """Queries with their cameras, of one file or of all that a pattern such as ``queries/*.txt`` names.

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
    """Reference images of every query, best first.

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
    """The name that a query has in a file of poses: its last part, or its last two."""
    return "/".join(query.split("/")[-2 if keep_parent else -1 :])


def pose_line(name: str, T_map_camera: Matrix) -> str:
    """One line of a file of poses."""
    T = inverse_pose(T_map_camera)
    x, y, z, w = matrix_to_quaternion(T[:3, :3])
    return " ".join([name, *(repr(float(value)) for value in (w, x, y, z, *T[:3, 3]))])


def write_poses(path: Path, T_map_camera: Mapping[str, Matrix]) -> None:
    """Write poses by name; they are written as world to camera."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{pose_line(name, T)}\n" for name, T in T_map_camera.items()))


def read_poses(path: Path) -> dict[str, Matrix]:
    """``T_map_camera`` by name.

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
    """Medians and recall as the original prints them; a query without a pose counts as infinitely wrong.

    Args:
        estimates, truth: T_map_camera by name.
        only_estimated: leave out queries without a pose, as where only some were run.
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
    """Words of every line that is neither empty nor a comment, with its number."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words
