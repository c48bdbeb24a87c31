# SPDX-License-Identifier: Apache-2.0
"""A small textured room, and the map of it that all tests share.

The map in ``test/data/room`` is committed, so that no test session waits for it. After a change of the format or
of what a map holds, ``python test/helpers/textured_room.py`` builds it anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping import build
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, Matrix

ROOM_MAP = Path(__file__).resolve().parents[1] / "data" / "room"

ROOM_CAMERA = Camera(320, 256, 260.0, 260.0, 159.5, 127.5)
HALF_SIZE_M = np.array([2.2, 1.4, 1.8])
"""Half the room, whose centre is the origin."""
TEXTURE_PX_PER_M = 180.0
MAPPED_VIEWS = 24
POINTS_PER_VIEW, REFERENCE_SPACING_M, HEAD_WIDTH = 260, 0.05, 64
"""Of the committed map: as little as localizes well, so that it stays near 300 kB."""


class Room(FrameSource):
    """The inside of a box with textured walls, seen from a camera that sways; exact depth and poses."""

    name = "room"

    def __init__(self, length: int, phase: float = 0.0) -> None:
        self._length, self._phase = length, phase
        self._textures = [_texture(seed) for seed in range(6)]

    @property
    def camera(self) -> Camera:
        return ROOM_CAMERA

    def __len__(self) -> int:
        return self._length

    def indices(self) -> Sequence[int]:
        return range(self._length)

    def __getitem__(self, position: int) -> Frame:
        if not 0 <= position < self._length:
            raise IndexError(position)
        return self.at(position + self._phase, position)

    def at(self, time_steps: float, index: int = 0, camera: Camera = ROOM_CAMERA) -> Frame:
        """The frame at a point of the trajectory."""
        a = 0.12 * time_steps
        R = so3_exp([0.05 * np.sin(1.3 * a), 0.5 + 0.12 * np.sin(a), 0.03 * np.cos(a)])
        t = np.array([0.12 * np.cos(a), 0.06 * np.sin(0.7 * a), -0.6 + 0.1 * np.sin(1.1 * a)])
        return self.view(make_pose(R, t), index, camera)

    def view(self, T_map_camera: Matrix, index: int = 0, camera: Camera = ROOM_CAMERA) -> Frame:
        """What a camera sees; a distorted one sees through its lens."""
        image, depth = self._render(T_map_camera, camera)
        return Frame(image, camera, index * 100_000_000, index, f"room-{index}", depth, T_map_camera)

    def _render(self, T: Matrix, camera: Camera) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
        pixels = np.stack([u, v], -1).reshape(-1, 1, 2).astype(np.float64)
        xy = cv2.undistortPoints(pixels, camera.K, np.array(camera.distortion or (0.0,) * 4)).reshape(-1, 2)
        rays = np.concatenate([xy, np.ones((len(xy), 1))], 1)
        directions = rays @ T[:3, :3].T
        with np.errstate(divide="ignore"):
            distances = (np.sign(directions) * HALF_SIZE_M - T[:3, 3]) / directions
        wall_axis = np.argmin(distances, axis=1)
        depth = distances[np.arange(len(rays)), wall_axis]
        points = T[:3, 3] + depth[:, None] * directions
        image = np.zeros((len(rays), 3), np.uint8)
        for axis in range(3):
            for side in (0, 1):
                at = (wall_axis == axis) & ((directions[:, axis] > 0) == bool(side))
                if at.any():
                    across, up = (i for i in range(3) if i != axis)
                    places = (points[at][:, [across, up]] + HALF_SIZE_M[[across, up]]) * TEXTURE_PX_PER_M
                    texture = self._textures[2 * axis + side]
                    x, y = places.T.astype(np.float32)
                    # remap takes at most 32767 rows, so the points of a wall are cut into columns.
                    width = 256
                    filled = -len(x) % width
                    x, y = (np.pad(c, (0, filled)).reshape(-1, width) for c in (x, y))
                    image[at] = cv2.remap(texture, x, y, cv2.INTER_LINEAR).reshape(-1, 3)[: at.sum()]
        shape = camera.height, camera.width
        return image.reshape(*shape, 3), depth.reshape(shape).astype(np.float32)


def _texture(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    size = 900
    canvas = np.full((size, size, 3), rng.integers(90, 170, 3), np.float32)
    for _ in range(450):
        x, y = rng.integers(0, size, 2)
        extent = rng.integers(8, 70, 2)
        colour = tuple(float(c) for c in rng.integers(0, 255, 3))
        if rng.random() < 0.5:
            cv2.rectangle(canvas, (int(x), int(y)), (int(x + extent[0]), int(y + extent[1])), colour, -1)
        else:
            cv2.circle(canvas, (int(x), int(y)), int(extent[0] // 2), colour, -1, cv2.LINE_AA)
    noise = cv2.resize(rng.normal(0, 8, (size // 4, size // 4, 3)).astype(np.float32), (size, size))
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


@contextmanager
def small_head() -> Iterator[None]:
    """Make builds train a head of the committed map's size, which takes seconds."""
    small = functools.partial(build.HeadTraining, width=HEAD_WIDTH, blocks=1, batch=1024)
    with mock.patch.object(build, "HeadTraining", small):
        yield


def build_room_map(out: Path, source: FrameSource | None = None, *, overwrite: bool = False) -> SceneMap:
    """Build a map of the room, as the committed one was, from other views where a source is given."""
    config = build.MapBuildConfig(
        train_seconds=120.0,
        train_steps=500,
        augmentations=0,
        points_per_view=POINTS_PER_VIEW,
        reference_spacing_m=REFERENCE_SPACING_M,
        device="cpu",
    )
    with small_head():
        return build.build_map(source or Room(MAPPED_VIEWS), out, config, name="room", overwrite=overwrite)


if __name__ == "__main__":
    build_room_map(ROOM_MAP, overwrite=ROOM_MAP.exists())
    print(f"{ROOM_MAP}: {sum(path.stat().st_size for path in ROOM_MAP.iterdir()) / 1000:.0f} kB")
