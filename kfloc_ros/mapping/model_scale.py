# SPDX-License-Identifier: Apache-2.0
"""The scale of a reconstruction, which images alone do not tell.

It comes from depth images, from poses that are known roughly (odometry, another tracker), or from one length that was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose

DEPTH_VIEWS = 30
MIN_DEPTH_PAIRS = 200
MIN_BASELINE_M = 0.05
Array = NDArray[np.float64]


@dataclass(frozen=True)
class KnownLength:
    """The measured distance between the camera's places in two frames."""

    first: int
    second: int
    metres: float


def known_length(words: Sequence[str] | None) -> KnownLength | None:
    """``FRAME FRAME METRES``, as given on a command line.

    Raises:
        SourceError: these are no two numbers of frames and a length.
    """
    if words is None:
        return None
    try:
        return KnownLength(int(words[0]), int(words[1]), float(words[2]))
    except (ValueError, IndexError) as error:
        raise SourceError(f"--sfm-length takes two numbers of frames and metres, not '{' '.join(words)}'.") from error


def metres_per_unit(
    source: FrameSource, poses: Mapping[int, Matrix], points: Mapping[int, Array], length: KnownLength | None
) -> float:
    """Metres of a unit of the model.

    Args:
        source: whose depth or poses tell it where no length is given.
        poses: ``T_model_camera`` by position.
        points: (N, 3) of the model, that each image sees, by position.
        length: that was measured.

    Raises:
        SourceError: nothing tells the scale, or the length is between frames without a place.
    """
    if length is not None:
        return _scale_from_length(poses, length, len(source))
    scale = _scale_from_depth(source, poses, points)
    if scale is None:
        scale = scale_from_poses(poses, {k: T for k in poses if (T := source.pose(k)) is not None})
    if scale is None:
        raise SourceError(
            f"How large things are cannot be told from images: '{source.name}' has neither depth nor poses. Measure "
            "how far the camera was apart in two frames and pass --sfm-length FRAME FRAME METRES."
        )
    return scale


def _scale_from_length(poses: Mapping[int, Matrix], length: KnownLength, count: int) -> float:
    for frame in (length.first, length.second):
        if frame not in poses:
            raise SourceError(f"Frame {frame} of the measured length has no place among the {count} images.")
    apart = float(np.linalg.norm(poses[length.first][:3, 3] - poses[length.second][:3, 3]))
    if not (length.metres > 0 and apart > 1e-9):
        raise SourceError("The measured length must be between two different places, and positive.")
    return length.metres / apart


def _scale_from_depth(source: FrameSource, poses: Mapping[int, Matrix], points: Mapping[int, Array]) -> float | None:
    """Median ratio of the measured depth to the model's at its points."""
    camera = source.camera.pinhole()
    adapter = ImageAdapter(source.camera, camera)
    ratios: list[Array] = []
    known = list(poses)
    for position in known[:: max(1, len(known) // DEPTH_VIEWS)]:
        depth_m = source[position].depth_m
        if depth_m is None:
            continue
        T = inverse_pose(poses[position])
        local = points[position] @ T[:3, :3].T + T[:3, 3]
        local = local[local[:, 2] > 1e-6]
        u = np.round(camera.fx * local[:, 0] / local[:, 2] + camera.cx).astype(np.int64)
        v = np.round(camera.fy * local[:, 1] / local[:, 2] + camera.cy).astype(np.int64)
        inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
        measured = adapter.nearest(depth_m)[v[inside], u[inside]]
        ratios.append((measured / local[inside, 2])[measured > 0].astype(np.float64))
    pairs = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(np.median(pairs)) if len(pairs) >= MIN_DEPTH_PAIRS else None


def scale_from_poses(model: Mapping[int, Matrix], known: Mapping[int, Matrix]) -> float | None:
    """Median ratio of the distances between the same two frames in two sets of poses, far apart ones counting.

    Distances, not places: odometry drifts, and neither knows the other's frame.
    """
    frames = [k for k, T in known.items() if np.isfinite(T).all() and k in model]
    if len(frames) < 2:
        return None
    a, b = (np.stack([poses[k][:3, 3] for k in frames]) for poses in (model, known))
    apart_model, apart_m = (np.linalg.norm(c[:, None] - c[None], axis=2)[np.triu_indices(len(c), 1)] for c in (a, b))
    far = (apart_m > max(MIN_BASELINE_M, float(np.median(apart_m)))) & (apart_model > 1e-9)
    return float(np.median(apart_m[far] / apart_model[far])) if far.any() else None
