# SPDX-License-Identifier: Apache-2.0
"""Clouds to ``sensor_msgs/PointCloud2`` and back, and tables of points as PLY; imports nothing of ROS."""

from __future__ import annotations

import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError

FLOAT32 = 7
"""Number of the type in ``sensor_msgs/PointField``."""
MAX_POINTS = 50_000_000
PLY_TYPES = {"<f4": "float", "|u1": "uchar"}
"""NumPy's names of the types of a table, and PLY's."""


def fill_cloud(message: Any, cloud: Cloud, make_field: Callable[[], Any]) -> Any:
    """Put a cloud into a ``PointCloud2``, organised if it is, and return the message.

    The colour is packed into ``rgb`` as everywhere in ROS: 0x00RRGGBB, called a float. ``sigma`` is there if known.

    Args:
        make_field: makes an empty ``PointField``.
    """
    names = ["x", "y", "z", "rgb"] + ([] if cloud.sigma_m is None else ["sigma"])
    shape = cloud.points.shape[:-1]
    table = np.empty((*shape, len(names)), dtype="<f4")
    table[..., :3] = cloud.points
    red, green, blue = np.moveaxis(cloud.colours.astype("<u4"), -1, 0)
    table[..., 3] = (red << 16 | green << 8 | blue).astype("<u4").view("<f4")
    if cloud.sigma_m is not None:
        table[..., 4] = cloud.sigma_m
    message.height, message.width = (1, shape[0]) if len(shape) == 1 else (int(shape[0]), int(shape[1]))
    message.fields = []
    for position, name in enumerate(names):
        field = make_field()
        field.name, field.offset, field.datatype, field.count = name, 4 * position, FLOAT32, 1
        message.fields.append(field)
    message.is_bigendian = False
    message.point_step = 4 * len(names)
    message.row_step = message.point_step * message.width
    message.is_dense = bool(np.isfinite(cloud.points).all())
    # An array.array is taken over as it is; any other sequence is checked byte by byte in Python.
    data = array.array("B")
    data.frombytes(table.tobytes())
    message.data = data
    return message


def read_cloud(message: Any) -> Cloud:
    """The cloud (h, w) of a ``PointCloud2`` as :func:`fill_cloud` makes them.

    Raises:
        FrameError: a field is missing or not a 32-bit float, or there are too few bytes.
    """
    offsets = {field.name: int(field.offset) for field in message.fields if field.datatype == FLOAT32}
    missing = [name for name in ("x", "y", "z", "rgb") if name not in offsets]
    if missing or message.is_bigendian:
        raise FrameError(f"A point cloud has no little-endian 32-bit field {', '.join(missing) or 'at all'}.")
    height, width, step = int(message.height), int(message.width), int(message.point_step)
    data = np.frombuffer(message.data, dtype=np.uint8)
    if height * width > MAX_POINTS or len(data) < height * width * step or step < max(offsets.values()) + 4:
        raise FrameError(f"A point cloud of {width}x{height} points of {step} bytes cannot be in {len(data)} bytes.")
    rows = data[: height * width * step].reshape(height, width, step)

    def column(name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(rows[..., offsets[name] : offsets[name] + 4]).view("<f4")[..., 0]

    packed = column("rgb").view("<u4")
    colours = np.stack([(packed >> shift) & 0xFF for shift in (16, 8, 0)], axis=-1).astype(np.uint8)
    points = np.stack([column(name) for name in "xyz"], axis=-1)
    return Cloud(points, colours, column("sigma") if "sigma" in offsets else None)


@dataclass(frozen=True, eq=False)
class Cloud:
    """Coloured points; organised ones keep the shape of their image."""

    points: NDArray[np.float32]
    """(..., 3) metres, map frame; NaN where there is no point."""
    colours: NDArray[np.uint8]
    """(..., 3) RGB."""
    sigma_m: NDArray[np.float32] | None = None
    """(...) standard deviation per axis, where it is known."""


def ply_bytes(table: NDArray[np.void], comment: str) -> bytes:
    """Return a binary PLY file of a structured array (N,): one vertex a row, one property a field.

    Args:
        table: its fields are little-endian ``float32`` or ``uint8``, lengths in metres.
        comment: one line for the header; line breaks become spaces, and what is not ASCII becomes ``?``.
    """
    properties = [f"property {PLY_TYPES[table.dtype[name].str]} {name}" for name in table.dtype.names or ()]
    lines = ["ply", "format binary_little_endian 1.0", f"comment {' '.join(comment.split())}, metres"]
    lines += [f"element vertex {len(table)}", *properties, "end_header", ""]
    return "\n".join(lines).encode("ascii", "replace") + table.tobytes()
