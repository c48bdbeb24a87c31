# SPDX-License-Identifier: Apache-2.0
"""Point clouds as binary PLY files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.visualization.clouds import Cloud


def write_ply(path: Path, cloud: Cloud, comment: str = "") -> int:
    """Write x, y, z in metres, red, green, blue, and sigma where the cloud has it; returns the number of points.

    Points that are not finite are left out.
    """
    points = np.asarray(cloud.points, dtype=np.float32).reshape(-1, 3)
    finite = np.isfinite(points).all(axis=1)
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    if cloud.sigma_m is not None:
        fields.append(("sigma", "<f4"))
    table = np.zeros(int(finite.sum()), dtype=fields)
    for k, name in enumerate("xyz"):
        table[name] = points[finite, k]
    for k, name in enumerate(("red", "green", "blue")):
        table[name] = cloud.colours.reshape(-1, 3)[finite, k]
    if cloud.sigma_m is not None:
        table["sigma"] = cloud.sigma_m.reshape(-1)[finite]
    kinds = {"<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"comment {' '.join(comment.split()) or 'kfloc'}, metres"]
    lines += [f"element vertex {len(table)}", *(f"property {kinds[kind]} {name}" for name, kind in fields)]
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "\n".join([*lines, "end_header", ""]).encode("ascii", "replace")
    path.write_bytes(header + table.tobytes())
    return len(table)


def surest(cloud: Cloud, max_sigma_m: float) -> Cloud:
    """The points (N, 3) of a cloud that are finite and no less certain than this."""
    points = cloud.points.reshape(-1, 3)
    keep = np.isfinite(points).all(axis=1)
    sigma: NDArray[np.float32] | None = None
    if cloud.sigma_m is not None:
        sigma = cloud.sigma_m.reshape(-1)
        keep &= sigma <= max_sigma_m
        sigma = sigma[keep]
    return Cloud(points[keep], cloud.colours.reshape(-1, 3)[keep], sigma)


def merged(clouds: list[Cloud], voxel_m: float) -> Cloud:
    """Clouds (N, 3) as one: of the points in a voxel, the surest one (or the first)."""
    if not clouds:
        return Cloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.float32))
    points = np.concatenate([c.points for c in clouds])
    colours = np.concatenate([c.colours for c in clouds])
    sigma = np.concatenate([np.zeros(len(c.points), np.float32) if c.sigma_m is None else c.sigma_m for c in clouds])
    order = np.argsort(sigma, kind="stable")
    _, first = np.unique(np.floor(points[order] / voxel_m).astype(np.int64), axis=0, return_index=True)
    chosen = order[first]
    return Cloud(points[chosen], colours[chosen], sigma[chosen])
