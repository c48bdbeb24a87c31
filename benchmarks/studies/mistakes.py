# SPDX-License-Identifier: Apache-2.0
"""Mistakes put into good recordings, to see that ``kfloc check`` finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.types import Frame, Matrix

OPENGL: Matrix = np.diag([1.0, -1.0, -1.0])
BODY: Matrix = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
"""Rotation from a ROS body's axes (forward, left, up) to optical ones."""


class Wrong(DerivedSource):
    """Another source with its poses, frames or camera changed.

    Args:
        pose: makes the pose that is told of the true one.
        shift: frames after an image whose pose is told for it; at the ends of the recording, there is none.
        frame: makes the frame that is told, poses apart.
        camera: makes the camera that is told.
        depth_shift: frames after an image whose depth is told for it.
    """

    def __init__(
        self,
        source: FrameSource,
        *,
        pose: Callable[[Matrix], Matrix] = lambda T: T,
        shift: int = 0,
        frame: Callable[[Frame], Frame] = lambda frame: frame,
        camera: Callable[[Camera], Camera] = lambda camera: camera,
        depth_shift: int = 0,
    ) -> None:
        super().__init__(source)
        self._make, self._shift, self._frame, self._depth_shift = pose, shift, frame, depth_shift
        self._told = camera(source.camera)

    @property
    def camera(self) -> Camera:
        return self._told

    def pose(self, position: int) -> Matrix | None:
        place = position + self._shift
        T = self._source.pose(place) if 0 <= place < len(self._source) else None
        return None if T is None else self._make(T)

    def changed(self, frame: Frame, position: int) -> Frame:
        if self._depth_shift:
            other = min(max(position + self._depth_shift, 0), len(self) - 1)
            frame = replace(frame, depth_m=self._source[other].depth_m)
        frame = self._frame(frame)
        return replace(frame, camera=self._told, T_map_camera=self.pose(position))


@dataclass(frozen=True)
class Mistake:
    """A mistake, and the kind of finding and the value that tell it."""

    name: str
    make: Callable[[FrameSource], FrameSource]
    kind: str
    """Of the finding."""
    value: float | None = None
    tolerance: float = 0.0
    needs: str = ""
    """``depth``, ``video`` or ``fast``, if it needs depth, images that follow each other, or 25 of them a second."""


def scaled(factor: float) -> Callable[[Matrix], Matrix]:
    """Return what multiplies positions."""
    return lambda T: make_pose(T[:3, :3], factor * T[:3, 3])


def on_the_right(T: Matrix) -> Callable[[Matrix], Matrix]:
    """Return what gives the poses of another frame of the same body."""
    return lambda pose: pose @ T


def resized_camera(factor: float) -> Callable[[Camera], Camera]:
    """Return what gives the focal lengths of another lens."""
    return lambda camera: replace(camera, fx=camera.fx * factor, fy=camera.fy * factor)


def with_depth(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Frame], Frame]:
    """Return what changes depth images."""
    return lambda f: f if f.depth_m is None else replace(f, depth_m=change(f.depth_m).astype(np.float32))


def with_image(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Frame], Frame]:
    """Return what changes colour images."""
    return lambda f: replace(f, image=np.ascontiguousarray(change(f.image)))


def bent(camera: Camera, k1: float) -> Callable[[Frame], Frame]:
    """Return what makes images (and depth) of a pinhole camera those of a lens with a distortion k1."""
    lens = replace(camera, distortion_model="plumb_bob", distortion=(k1, 0.0, 0.0, 0.0))
    u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    pixels = np.stack([u, v], -1).reshape(-1, 1, 2).astype(np.float64)
    rays = cv2.undistortPoints(pixels, lens.K, np.array(lens.distortion)).reshape(-1, 2)
    at = camera.pinhole().distort(rays).astype(np.float32).reshape(camera.height, camera.width, 2)
    x, y = np.ascontiguousarray(at[..., 0]), np.ascontiguousarray(at[..., 1])

    def change(frame: Frame) -> Frame:
        image = cv2.remap(frame.image, x, y, cv2.INTER_LINEAR)
        depth = None if frame.depth_m is None else cv2.remap(frame.depth_m, x, y, cv2.INTER_NEAREST)
        return replace(frame, image=image, depth_m=depth)

    return change


class RowByRow(DerivedSource):
    """Images whose rows were exposed one after the other: stripes of neighbouring frames, from top to bottom.

    Args:
        source: frames that follow each other fast.
        frames: number of frames that an image is made of.
    """

    def __init__(self, source: FrameSource, frames: int) -> None:
        super().__init__(source)
        self._frames = frames

    def changed(self, frame: Frame, position: int) -> Frame:
        image = frame.image.copy()
        edges = np.linspace(0, len(image), self._frames + 1).astype(int)
        for k in range(self._frames):
            other = min(max(position + k - self._frames // 2, 0), len(self) - 1)
            image[edges[k] : edges[k + 1]] = self._source[other].image[edges[k] : edges[k + 1]]
        return replace(frame, image=image)


def undistorted_twice(source: FrameSource, k1: float) -> FrameSource:
    """Return a source whose images are rectified, while its calibration tells a distortion."""
    return Wrong(
        source, camera=lambda c: replace(c.pinhole(), distortion_model="plumb_bob", distortion=(k1, 0.0, 0.0, 0.0))
    )


def turned(source: FrameSource) -> FrameSource:
    """Return a source whose images are turned by a quarter, with a calibration of their size."""

    def camera(c: Camera) -> Camera:
        return Camera(c.height, c.width, c.fy, c.fx, c.height - 1 - c.cy, c.cx)

    def frame(f: Frame) -> Frame:
        depth = None if f.depth_m is None else np.ascontiguousarray(np.rot90(f.depth_m, -1))
        return replace(f, image=np.ascontiguousarray(np.rot90(f.image, -1)), depth_m=depth)

    return Wrong(source, frame=frame, camera=camera)


def mirrored(source: FrameSource) -> FrameSource:
    """Return a source whose images are mirrored, left to right."""

    def frame(f: Frame) -> Frame:
        depth = None if f.depth_m is None else np.ascontiguousarray(f.depth_m[:, ::-1])
        return replace(f, image=np.ascontiguousarray(f.image[:, ::-1]), depth_m=depth)

    return Wrong(source, frame=frame, camera=lambda c: replace(c, cx=c.width - 1 - c.cx))


MOUNTING = make_pose(so3_exp(np.radians([18.0, -7.0, 4.0])), [0.08, 0.02, -0.05])

MISTAKES: Sequence[Mistake] = (
    Mistake("poses world to camera", lambda s: Wrong(s, pose=inverse_pose), "inverted"),
    Mistake("poses in OpenGL axes", lambda s: Wrong(s, pose=on_the_right(make_pose(OPENGL, [0, 0, 0]))), "axes"),
    Mistake("poses of a ROS body", lambda s: Wrong(s, pose=on_the_right(make_pose(BODY, [0, 0, 0]))), "axes"),
    Mistake(
        "inverted and OpenGL", lambda s: Wrong(s, pose=lambda T: inverse_pose(T @ make_pose(OPENGL, [0, 0, 0]))),
        "inverted",
    ),
    Mistake("mounting left out, 19.7 deg", lambda s: Wrong(s, pose=on_the_right(MOUNTING)), "mount", 19.7, 2.0),
    Mistake("poses 2 frames ahead", lambda s: Wrong(s, shift=2), "offset", -2.0, 0.4, "video"),
    Mistake("poses 3 frames late", lambda s: Wrong(s, shift=-3), "offset", 3.0, 0.4, "video"),
    Mistake("poses in millimetres", lambda s: Wrong(s, pose=scaled(1000.0)), "pose_unit", 0.001, 1e-4, "depth"),
    Mistake("poses in feet", lambda s: Wrong(s, pose=scaled(1 / 0.3048)), "pose_unit", 0.3048, 0.03, "depth"),
    Mistake("focal length x 1.2", lambda s: Wrong(s, camera=resized_camera(1.2)), "focal", 1 / 1.2, 0.03),
    Mistake("focal length x 0.85", lambda s: Wrong(s, camera=resized_camera(0.85)), "focal", 1 / 0.85, 0.03),
    Mistake("fy x 0.88", lambda s: Wrong(s, camera=lambda c: replace(c, fy=c.fy * 0.88)), "aspect", 1 / 0.88, 0.03),
    Mistake("rolling shutter of 5 frames", lambda s: RowByRow(s, 5), "rolling_shutter", 5.0, 1.5, "fast"),
    Mistake("calibration of half the size", lambda s: Wrong(s, camera=lambda c: replace(
        c, fx=c.fx / 2, fy=c.fy / 2, cx=c.cx / 2, cy=c.cy / 2)), "calibration", 2.0, 0.1),
    Mistake("principal point off by 12 %", lambda s: Wrong(s, camera=lambda c: replace(
        c, cx=c.cx + 0.12 * c.width)), "centre", None),
    Mistake("distortion of -0.25 unknown", lambda s: Wrong(s, frame=bent(s.camera, -0.25)), "distortion", None),
    Mistake("rectified, said to be distorted", lambda s: undistorted_twice(s, -0.3), "pinhole", None),
    Mistake("images mirrored", mirrored, "mirrored"),
    Mistake("images turned by 90 deg", turned, "axes"),
    Mistake("depth x 0.2", lambda s: Wrong(s, frame=with_depth(lambda d: d * 0.2)), "depth_unit", 5.0, 0.3, "depth"),
    Mistake("depth x 5", lambda s: Wrong(s, frame=with_depth(lambda d: d * 5)), "depth_unit", 0.2, 0.015, "depth"),
    Mistake("depth x 1000", lambda s: Wrong(s, frame=with_depth(lambda d: d * 1e3)), "depth_unit", 1e-3, 1e-4, "depth"),
    Mistake("depth shifted by 20 px", lambda s: Wrong(s, frame=with_depth(lambda d: np.roll(d, 20, 1))), "depth_shift",
            20.0, 6.0, "depth"),
    Mistake("depth 4 frames late", lambda s: Wrong(s, depth_shift=-4), "depth_clock", None, 0.0, "depth"),
)  # fmt: skip
