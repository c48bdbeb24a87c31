# SPDX-License-Identifier: Apache-2.0
"""Trajectories as TUM text: ``t tx ty tz qx qy qz qw`` per line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, quaternion_to_matrix
from kfloc_ros.messages.poses import ns_to_stamp
from kfloc_ros.types import Matrix


def read_tum(path: Path) -> dict[int, Matrix]:
    """Poses by stamp in nanoseconds, as :func:`tum_text` writes them.

    Raises:
        SourceError: a line is not eight numbers.
    """
    poses: dict[int, Matrix] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            seconds, _, fraction = words[0].partition(".")
            x, y, z, *xyzw = (float(word) for word in words[1:])
            stamp_ns = int(seconds) * 10**9 + int(f"{fraction:0<9}"[:9])
            poses[stamp_ns] = make_pose(quaternion_to_matrix(xyzw), [x, y, z])
        except ValueError:
            raise SourceError(f"Line {number} of '{path}' is not 't tx ty tz qx qy qz qw': {line!r}.") from None
    return poses


def tum_text(poses: Iterable[tuple[int, Matrix | None]]) -> str:
    """``t tx ty tz qx qy qz qw`` a line, t in seconds with nanosecond digits; missing poses are left out."""
    lines = []
    for stamp_ns, T_map_camera in poses:
        if T_map_camera is None or not np.isfinite(T_map_camera).all():
            continue
        seconds, nanoseconds = ns_to_stamp(stamp_ns)
        numbers = [*T_map_camera[:3, 3], *matrix_to_quaternion(T_map_camera[:3, :3])]
        lines.append(f"{seconds}.{nanoseconds:09d} " + " ".join(f"{n:.9f}" for n in numbers) + "\n")
    return "".join(lines)
