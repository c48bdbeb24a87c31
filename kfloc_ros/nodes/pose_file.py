# SPDX-License-Identifier: Apache-2.0
"""The last pose on disk: written whole or not at all, and believed only after a check; imports nothing of ROS."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfloc_ros.errors import KflocError
from kfloc_ros.mapping.map_format import DESCRIPTION
from kfloc_ros.mapping.outline import MapOutline
from kfloc_ros.types import Matrix

FORMAT = "kfloc_pose"
VERSION = 1
_MAX_BYTES = 100_000
_MAX_ROTATION_ERROR = 1e-4


class PoseFileError(KflocError):
    """A pose file cannot be written, or what it holds cannot be used."""


@dataclass(frozen=True, eq=False)
class SavedPose:
    """A pose of the camera in a map."""

    map_id: str
    """See :func:`map_id`."""
    stamp_ns: int
    T_map_camera: Matrix
    covariance: Matrix


def map_id(scene_map: MapOutline) -> str:
    """Name and checksum of a map: a pose means nothing in another one, or in one that was built again."""
    description = scene_map.path / DESCRIPTION if scene_map.path is not None else None
    content = description.read_bytes() if description is not None and description.is_file() else b""
    return f"{scene_map.name} {hashlib.sha256(content).hexdigest()[:16]}"


def save_pose(path: Path, pose: SavedPose) -> None:
    """Replace the file in one step.

    Raises:
        PoseFileError: it cannot be written; an older file is still whole then.
    """
    values = {
        "format": FORMAT,
        "version": VERSION,
        "map": pose.map_id,
        "stamp_ns": pose.stamp_ns,
        "T_map_camera": pose.T_map_camera.tolist(),
        "covariance": pose.covariance.tolist(),
    }
    temporary: str | None = None
    try:
        if path.exists() and not path.is_file():
            raise PoseFileError(f"The last pose cannot be saved in '{path}': that is no plain file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(values, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        why = getattr(error, "strerror", None) or error
        raise PoseFileError(f"The last pose cannot be saved in '{path}': {why}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_pose(path: Path, expected_map_id: str) -> SavedPose | None:
    """The pose in a file; None where there is no file.

    Raises:
        PoseFileError: the file is damaged or belongs to another map.
    """
    try:
        if not path.is_file() and path.exists():
            raise PoseFileError(f"'{path}' is no plain file; no pose is read from it.")
        if path.stat().st_size > _MAX_BYTES:
            raise PoseFileError(f"'{path}' is larger than any pose file; it is not used.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise PoseFileError(
            f"The last pose in '{path}' cannot be read: {error}. The search begins without it."
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise PoseFileError(f"'{path}' holds no pose of this version; it is not used.")
    if values.get("map") != expected_map_id:
        raise PoseFileError(f"The last pose in '{path}' is of another map, or of this one before it was built again.")
    try:
        T = np.array(values["T_map_camera"], dtype=np.float64)
        covariance = np.array(values["covariance"], dtype=np.float64)
        saved = SavedPose(expected_map_id, int(values["stamp_ns"]), T, covariance)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PoseFileError(f"The last pose in '{path}' is damaged: {error}.") from error
    if not _is_sound(T, covariance):
        raise PoseFileError(f"The last pose in '{path}' is damaged: it is no rigid pose with a covariance.")
    return saved


def _is_sound(T: Matrix, covariance: Matrix) -> bool:
    if T.shape != (4, 4) or covariance.shape != (6, 6):
        return False
    if not (np.isfinite(T).all() and np.isfinite(covariance).all()) or not np.array_equal(T[3], [0, 0, 0, 1]):
        return False
    R = T[:3, :3]
    rigid = np.abs(R @ R.T - np.eye(3)).max() < _MAX_ROTATION_ERROR and np.linalg.det(R) > 0
    return bool(rigid and (np.diagonal(covariance) >= 0).all())
