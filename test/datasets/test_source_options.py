# SPDX-License-Identifier: Apache-2.0
"""Options of every source: taken off the path, and read as they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.posed_images import write_calibration
from kfloc_ros.datasets.source_options import MOUNTS, split_options, with_options
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.types import Frame, Matrix

CAMERA = Camera(8, 6, 7.0, 7.0, 3.5, 2.5)


class Recorded(FrameSource):
    """Ten frames at 10 Hz, of two recordings; one has no pose."""

    name = "recorded"
    camera = CAMERA
    reads = 0

    def __len__(self) -> int:
        return 10

    def indices(self) -> Sequence[int]:
        return range(10)

    def sequences(self) -> Sequence[int]:
        return [0] * 6 + [1] * 4

    def stamp_ns(self, position: int) -> int:
        return 100_000_000 * position

    def pose(self, position: int) -> Matrix | None:
        return None if position == 3 else make_pose(so3_exp([0, 0.1 * position, 0]), [position, 2.0, 0.0])

    def visible_points(self, position: int) -> np.ndarray:
        return np.full((2, 3), float(position))

    def encoded_image(self, position: int) -> bytes:
        return b"jpeg"

    def __getitem__(self, position: int) -> Frame:
        self.reads += 1
        image, depth = np.zeros((6, 8, 3), np.uint8), np.full((6, 8), 2.0, np.float32)
        stamp = self.stamp_ns(position)
        return Frame(image, CAMERA, stamp, position, depth_m=depth, T_map_camera=self.pose(position))


def read(words: str) -> FrameSource:
    return with_options(Recorded(), split_options(f"DIR?{words}")[1])


def test_own_options_are_taken_off_and_others_stay() -> None:
    assert split_options("bag:/b?image=/a&poses=world_to_camera&pose=tf") == (
        "bag:/b?image=/a&pose=tf", {"poses": "world_to_camera"}
    )  # fmt: skip
    assert split_options("DIR?depth_scale=5") == ("DIR", {"depth_scale": "5"})
    assert split_options("DIR@train") == ("DIR@train", {})
    with pytest.raises(SourceError, match="twice"):
        split_options("DIR?depth_scale=5&depth_scale=5")


def test_without_options_a_source_stays_what_it_is() -> None:
    source = Recorded()
    assert with_options(source, {}) is source


def test_direction_unit_and_mount_of_poses() -> None:
    T = Recorded().pose(4)
    assert T is not None
    inverted = read("poses=world_to_camera").pose(4)
    assert np.allclose(inverted, inverse_pose(T))
    scaled = read("pose_scale=0.001").pose(4)
    assert np.allclose(scaled[:3, 3], T[:3, 3] / 1000) and np.allclose(scaled[:3, :3], T[:3, :3])
    # the mount is in metres, whatever the unit of the poses is
    both = read("pose_scale=0.5&mount=1,0,0,0,0,0,1")
    assert np.allclose(both.pose(4), make_pose(T[:3, :3], T[:3, 3] / 2) @ make_pose(np.eye(3), [1, 0, 0]))
    assert both.pose(3) is None and np.allclose(both[4].T_map_camera, both.pose(4))
    assert np.allclose(both.visible_points(4), 2.0) and both.encoded_image(0) == b"jpeg"


@pytest.mark.parametrize(
    ("name", "forward", "up"), [("opengl", [0, 0, -1], [0, 1, 0]), ("ros_body", [1, 0, 0], [0, 0, 1])]
)
def test_named_mounts(name: str, forward: list[float], up: list[float]) -> None:
    """The optical frame looks along z and has y down."""
    R = MOUNTS[name][:3, :3]
    assert np.allclose(R @ [0, 0, 1], forward) and np.allclose(R @ [0, -1, 0], up)
    assert np.linalg.det(R) == pytest.approx(1)


def test_poses_of_another_time_lie_between_those_of_the_same_recording() -> None:
    later = read("pose_offset_s=0.05")
    assert later.pose(1)[0, 3] == pytest.approx(1.5)
    assert later.pose(2)[0, 3] == pytest.approx(2.5)  # between the neighbours of the frame without a pose
    assert later.pose(5) is None and later.pose(9) is None and later.pose(6)[0, 3] == pytest.approx(6.5)
    earlier = read("pose_offset_s=-0.2")
    assert earlier.pose(4)[0, 3] == pytest.approx(2.0) and earlier.pose(1) is None and earlier.pose(7) is None
    assert earlier.visible_points(4) is None


def test_offsets_read_no_images() -> None:
    source = Recorded()
    with_options(source, {"pose_offset_s": "0.1"}).pose(4)
    assert source.reads == 0


def test_camera_and_depth(tmp_path: Path) -> None:
    told = Camera(8, 6, 9.0, 9.5, 3.0, 2.0, "plumb_bob", (-0.2, 0.0, 0.0, 0.0))
    write_calibration(tmp_path / "camera.txt", told)
    for words in ("camera=8,6,9,9.5,3,2,-0.2", f"camera={tmp_path / 'camera.txt'}"):
        source = read(words)
        assert source.camera == told and source[0].camera == told
    assert read("depth_scale=5")[0].depth_m.max() == 10.0
    with pytest.raises(SourceError, match="640x480"):
        read("camera=640,480,500,500,320,240")


@pytest.mark.parametrize(
    "words",
    ["poses=w2c", "pose_scale=0", "pose_scale=x", "depth_scale=-1", "depth_scale=nan", "mount=1,2,3", "mount=up",
     "mount=0,0,0,0,0,0,0", "pose_offset_s=1e9", "camera=8,6,7", "camera=8,6,-7,7,3,2", "camera=8.5,6,7,7,3,2"],
)  # fmt: skip
def test_values_that_cannot_be_understood_are_refused(words: str) -> None:
    with pytest.raises(SourceError, match=words.partition("=")[0]):
        read(words)


def test_every_kind_of_source_takes_them() -> None:
    plain, other = open_source("sim:map-quick"), open_source("sim:map-quick?mount=opengl", frames="0:4")
    assert np.allclose(other.pose(2), plain.pose(2) @ MOUNTS["opengl"]) and len(other) == 4
    with pytest.raises(SourceError, match="poses"):
        open_source("sim:map-quick?poses=sideways")
