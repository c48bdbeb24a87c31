# SPDX-License-Identifier: Apache-2.0
"""Poses and stamps to ROS messages and back, trajectories as TUM text, covariances moved between bodies; no ROS."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.covariance import move_covariance
from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, quaternion_to_matrix, unit_quaternion
from kfloc_ros.types import Matrix

_NS_PER_S = 1_000_000_000
MAX_COORDINATE_M = 1e8
"""Nothing on Earth is further away, and its square is still exact enough in single precision."""


@dataclass(frozen=True, eq=False)
class BodyPose:
    """A pose ``T_map_body`` (4, 4) with its covariance (6, 6) in the convention of :mod:`kfloc_ros.types`."""

    T_map_body: Matrix
    covariance: Matrix

    def moved(self, T_body_other: Matrix) -> BodyPose:
        """The pose of another frame fixed to the same body.

        See :func:`kfloc_ros.geometry.covariance.move_covariance`.
        """
        covariance = move_covariance(self.covariance, self.T_map_body, T_body_other)
        return BodyPose(self.T_map_body @ T_body_other, covariance)

    def fault(self) -> str:
        """Why this pose must not be published, or empty: it has to be finite and its covariance positive."""
        if not (np.isfinite(self.T_map_body).all() and np.isfinite(self.covariance).all()):
            return "the pose or its covariance is not finite"
        if (np.diagonal(self.covariance) <= 0).any():
            return "the covariance has a variance that is not positive"
        return ""


class Header(NamedTuple):
    """The ``std_msgs/Header`` at the beginning of a serialized message."""

    stamp_ns: int
    frame_id: str
    """Without the leading slash of ROS 1."""
    end: int
    """Where the next field begins, before its alignment."""


def stamp_to_ns(stamp: Any) -> int:
    """Nanoseconds of a ``builtin_interfaces/Time``."""
    return int(stamp.sec) * _NS_PER_S + int(stamp.nanosec)


def ns_to_stamp(stamp_ns: int) -> tuple[int, int]:
    """Seconds and nanoseconds of a ``builtin_interfaces/Time``."""
    return divmod(stamp_ns, _NS_PER_S)


def fill_stamp(stamp: Any, stamp_ns: int) -> None:
    """Put nanoseconds into a ``builtin_interfaces/Time``."""
    stamp.sec, stamp.nanosec = ns_to_stamp(stamp_ns)


def serialized_header(data: bytes, *, ros1: bool = False) -> Header:
    """Return the header that a serialized message begins with, without reading the rest.

    Args:
        data: CDR with its four bytes of encapsulation or, with ``ros1``, ROS 1's serialization.

    Raises:
        FrameError: the data is too short.
    """
    kind = "<III" if ros1 else "<iII" if data[1:2] == b"\x01" else ">iII"
    try:
        seconds, nanoseconds, length = struct.unpack_from(kind, data, 4)
    except struct.error as error:
        raise FrameError(f"A serialized message of {len(data)} bytes is too short for a header.") from error
    end = 16 + length
    if end > len(data):
        raise FrameError(f"A serialized message of {len(data)} bytes is cut off within its header.")
    text = bytes(data[16:end]).rstrip(b"\0").decode("utf-8", "replace")
    return Header(int(seconds) * _NS_PER_S + int(nanoseconds), text.lstrip("/"), end)


@dataclass(frozen=True)
class Quaternions:
    """Conversions between rotation matrices (3, 3) and unit quaternions (x, y, z, w) at ROS's border."""

    from_matrix: Callable[[Matrix], ArrayLike] = matrix_to_quaternion
    to_matrix: Callable[[ArrayLike], ArrayLike] = quaternion_to_matrix


_quaternions = Quaternions()


def use_quaternions(conversions: Quaternions) -> None:
    """Have all later messages of this process read and filled with these conversions."""
    global _quaternions
    _quaternions = conversions


def fill_pose(message: Any, T: Matrix) -> None:
    """Put a transform into a ``geometry_msgs/Pose``."""
    _fill_xyz(message.position, T)
    _fill_quaternion(message.orientation, T)


def fill_transform(message: Any, T: Matrix) -> None:
    """Put a transform into a ``geometry_msgs/Transform``."""
    _fill_xyz(message.translation, T)
    _fill_quaternion(message.rotation, T)


def fill_pose_with_covariance(message: Any, pose: BodyPose, *, diagonal: bool = False) -> None:
    """Put a pose into a ``geometry_msgs/PoseWithCovariance``; ``diagonal`` leaves out the cross terms."""
    fill_pose(message.pose, pose.T_map_body)
    symmetric = 0.5 * (pose.covariance + pose.covariance.T)
    if diagonal:
        symmetric = np.diag(np.diagonal(symmetric))
    message.covariance = [float(value) for value in symmetric.reshape(-1)]


def pose_from_message(message: Any) -> Matrix:
    """Transform of a ``geometry_msgs/Pose``. Raises ValueError for no rotation, and for a place off the Earth."""
    return _transform(message.position, message.orientation)


def transform_from_message(message: Any) -> Matrix:
    """Transform of a ``geometry_msgs/Transform``. Raises ValueError like :func:`pose_from_message`."""
    return _transform(message.translation, message.rotation)


def _transform(xyz: Any, q: Any) -> Matrix:
    translation = np.array([xyz.x, xyz.y, xyz.z], dtype=np.float64)
    if not (np.abs(translation) <= MAX_COORDINATE_M).all():
        raise ValueError(f"A translation must be finite and no longer than {MAX_COORDINATE_M:g} m, got {translation}.")
    return make_pose(_quaternions.to_matrix(unit_quaternion([q.x, q.y, q.z, q.w])), translation)


def _fill_xyz(message: Any, T: Matrix) -> None:
    message.x, message.y, message.z = (float(value) for value in T[:3, 3])


def _fill_quaternion(message: Any, T: Matrix) -> None:
    message.x, message.y, message.z, message.w = map(float, np.asarray(_quaternions.from_matrix(T[:3, :3])))


_LAST_NS = (2**31 - 1 - 86_400) * 1_000_000_000
"""ROS time ends in 2038; transforms are stamped ahead of their images, and sent again with later stamps."""
_IN_A_ROW = 3
"""So many images with earlier stamps, one later than the other, are no disorder any more."""


def check_stamp(stamp_ns: int) -> None:
    """Raise FrameError for a stamp that cannot be sent on, or not with what is added to it."""
    if not 0 < stamp_ns <= _LAST_NS:
        raise FrameError(
            f"An image has the time stamp {1e-9 * stamp_ns:.0f} s, which is no time that ROS can work with. "
            "Have the camera driver fill header.stamp with its clock's seconds and nanoseconds."
        )


class StampGuard:
    """Judges the stamps of images in the order of their arrival.

    Args:
        window_s: an image may come this much too late to be called out of order; by more, time went backwards.
    """

    def __init__(self, window_s: float) -> None:
        self._window_ns = int(window_s * 1e9)
        self._newest_ns: int | None = None
        self._late: list[int] = []

    def fault(self, stamp_ns: int) -> str:
        """Why an image must be dropped, or empty.

        Raises:
            FrameError: the stamp is zero, before 1970, or at the end of ROS time.
        """
        if stamp_ns == 0:
            raise FrameError(
                "An image has no time stamp (it is 0), so its pose would have no time. "
                "Have the camera driver fill header.stamp."
            )
        check_stamp(stamp_ns)
        newest_ns = self._newest_ns
        if newest_ns is None or stamp_ns > newest_ns or newest_ns - stamp_ns > self._window_ns:
            return self._accept(stamp_ns)
        if stamp_ns == newest_ns:
            return "it has the same stamp as the one before"
        if self._late and stamp_ns <= self._late[-1]:
            self._late = []
        self._late.append(stamp_ns)
        if len(self._late) >= _IN_A_ROW:
            return self._accept(stamp_ns)
        return f"it is {1e-6 * (newest_ns - stamp_ns):.0f} ms older than one that came before it"

    def forget(self) -> None:
        """The next stamp may be any."""
        self._newest_ns = None

    def _accept(self, stamp_ns: int) -> str:
        self._newest_ns, self._late = stamp_ns, []
        return ""


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
