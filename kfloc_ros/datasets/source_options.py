# SPDX-License-Identifier: Apache-2.0
"""Options that every SOURCE takes after its path, for data of another convention: ``PATH?poses=...&mount=...``.

``kfloc check`` names the ones that a recording needs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.posed_images import read_calibration
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import DISTORTION_LENGTHS, Camera, known_coefficients
from kfloc_ros.geometry.lie import interpolate, inverse_pose, make_pose, quaternion_to_matrix
from kfloc_ros.types import Frame, Matrix

OPTIONS = {
    "poses": "world_to_camera, or camera_to_world (default)",
    "pose_offset_s": "seconds after an image at which its pose is found in the poses as they are given",
    "pose_scale": "metres of one unit of the poses' positions",
    "mount": "opengl, ros_body, or X,Y,Z,QX,QY,QZ,QW: the camera's optical frame in the frame that the poses are of",
    "camera": "a camera.txt, or WIDTH,HEIGHT,FX,FY,CX,CY and distortion coefficients",
    "depth_scale": "factor on the depth images",
}
"""By name: what its value is."""
MOUNTS: Mapping[str, Matrix] = {
    "opengl": make_pose(np.diag([1.0, -1.0, -1.0]), np.zeros(3)),
    "ros_body": make_pose(np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]), np.zeros(3)),
}
"""``T_body_camera`` of usual axes: x right, y up, z backward; and x forward, y left, z up."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the options say; the default leaves a source as it is."""

    world_to_camera: bool = False
    pose_offset_s: float = 0.0
    pose_scale: float = 1.0
    T_body_camera: Matrix | None = None
    camera: Camera | None = None
    depth_scale: float = 1.0


def split_options(path: str) -> tuple[str, dict[str, str]]:
    """Take the options of every source off a path; words of its kind, such as a bag's topics, stay there.

    Raises:
        SourceError: an option is given twice.
    """
    base, mark, words = path.partition("?")
    if not mark:
        return path, {}
    own: dict[str, str] = {}
    rest = []
    for word in words.split("&"):
        name, equals, value = word.partition("=")
        if not equals or name not in OPTIONS:
            rest.append(word)
        elif name in own:
            raise SourceError(f"The option '{name}' is given twice in '{path}'.")
        else:
            own[name] = value
    return base + (mark + "&".join(rest) if rest else ""), own


def with_options(source: FrameSource, options: Mapping[str, str]) -> FrameSource:
    """Return a source read as the options say.

    Raises:
        SourceError: a value cannot be understood, or the camera is of images of another size.
    """
    return ReadOtherwise(source, parse_options(options)) if options else source


def parse_options(options: Mapping[str, str]) -> Reading:
    """Return what options say.

    Raises:
        SourceError: a value cannot be understood.
    """
    poses = options.get("poses", "camera_to_world")
    if poses not in ("camera_to_world", "world_to_camera"):
        raise _refusal("poses", poses)
    return Reading(
        world_to_camera=poses == "world_to_camera",
        pose_offset_s=_number("pose_offset_s", options, 0.0, 3600.0),
        pose_scale=_factor("pose_scale", options),
        T_body_camera=_mount(options["mount"]) if "mount" in options else None,
        camera=_camera(options["camera"]) if "camera" in options else None,
        depth_scale=_factor("depth_scale", options),
    )


class ReadOtherwise(DerivedSource):
    """Another source with its poses, camera and depth read by another convention; images stay as they are.

    Raises:
        SourceError: the camera is of images of another size.
    """

    passes_images_on = True

    def __init__(self, source: FrameSource, reading: Reading) -> None:
        super().__init__(source)
        self._reading = reading
        size = (source.camera.width, source.camera.height)
        if reading.camera is not None and (reading.camera.width, reading.camera.height) != size:
            raise SourceError(
                f"The option 'camera' is for images of {reading.camera.width}x{reading.camera.height} pixels, and "
                f"those of '{source.name}' have {size[0]}x{size[1]}."
            )

    @property
    def camera(self) -> Camera:
        return self._reading.camera or self._source.camera

    @property
    def camera_is_guess(self) -> bool:
        return self._reading.camera is None and self._source.camera_is_guess

    def pose(self, position: int) -> Matrix | None:
        reading = self._reading
        T = self._source.pose(position) if reading.pose_offset_s == 0 else self._later(position)
        if T is None:
            return None
        if reading.world_to_camera:
            T = inverse_pose(T)
        T = make_pose(T[:3, :3], T[:3, 3] * reading.pose_scale)
        return T if reading.T_body_camera is None else T @ reading.T_body_camera

    def changed(self, frame: Frame, position: int) -> Frame:
        depth = frame.depth_m
        if depth is not None and self._reading.depth_scale != 1:
            depth = (depth * np.float32(self._reading.depth_scale)).astype(np.float32)
        return replace(frame, camera=self.camera, depth_m=depth, T_map_camera=self.pose(position))

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        if self._reading.world_to_camera or self._reading.pose_offset_s:  # of which frame, is not known any more
            return None
        points = super().visible_points(position)
        return None if points is None else points * self._reading.pose_scale

    @cached_property
    def _stamps(self) -> dict[int, tuple[list[int], list[int]]]:
        """By recording: the stamps and the positions of the frames with a pose, in temporal order."""
        found: dict[int, list[tuple[int, int]]] = {}
        for position, sequence in enumerate(self._source.sequences()):
            if not self._source.fault(position) and self._source.pose(position) is not None:
                found.setdefault(sequence, []).append((self._source.stamp_ns(position), position))
        return {key: ([s for s, _ in sorted(own)], [p for _, p in sorted(own)]) for key, own in found.items()}

    @cached_property
    def _sequences(self) -> Sequence[int]:
        return self._source.sequences()

    def _later(self, position: int) -> Matrix | None:
        """The pose some time after a frame, between those of its recording; None before the first or after the last."""
        stamps, positions = self._stamps.get(self._sequences[position], ([], []))
        wanted = self._source.stamp_ns(position) + round(self._reading.pose_offset_s * 1e9)
        after = bisect.bisect_left(stamps, wanted)
        if after == len(stamps) or (after == 0 and stamps[0] != wanted):
            return None
        last = self._source.pose(positions[after])
        if stamps[after] == wanted or last is None:
            return last
        first = self._source.pose(positions[after - 1])
        share = (wanted - stamps[after - 1]) / (stamps[after] - stamps[after - 1])
        return None if first is None else interpolate(first, last, share)


def _refusal(name: str, value: str) -> SourceError:
    return SourceError(f"The source's option {name}={value!r} cannot be understood. Its value is {OPTIONS[name]}.")


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        raise _refusal(name, text) from None
    if not all(map(math.isfinite, values)):
        raise _refusal(name, text)
    return values


def _number(name: str, options: Mapping[str, str], default: float, limit: float) -> float:
    if name not in options:
        return default
    values = _numbers(name, options[name])
    if len(values) != 1 or abs(values[0]) > limit:
        raise _refusal(name, options[name])
    return values[0]


def _factor(name: str, options: Mapping[str, str]) -> float:
    value = _number(name, options, 1.0, 1e6)
    if value < 1e-6:
        raise _refusal(name, options[name])
    return value


def _mount(text: str) -> Matrix:
    if text in MOUNTS:
        return MOUNTS[text]
    values = _numbers("mount", text)
    if len(values) != 7:
        raise _refusal("mount", text)
    try:
        return make_pose(quaternion_to_matrix(values[3:]), values[:3])
    except ValueError:
        raise _refusal("mount", text) from None


def _camera(text: str) -> Camera:
    if not text[:1].isdigit() or "," not in text:
        return read_calibration(Path(text))
    values = _numbers("camera", text)
    if len(values) < 6 or not all(side.is_integer() for side in values[:2]):
        raise _refusal("camera", text)
    model = "none" if len(values) == 6 else "plumb_bob" if not any(values[11:]) else "rational_polynomial"
    coefficients = values[6:]
    if model == "plumb_bob":
        coefficients += [0.0] * (min(DISTORTION_LENGTHS[model]) - len(coefficients))
    try:
        width, height, fx, fy, cx, cy = values[:6]
        return Camera(int(width), int(height), fx, fy, cx, cy, model, known_coefficients(model, coefficients))
    except FrameError as error:
        raise SourceError(f"The source's option camera={text!r} is no camera: {error}") from error
