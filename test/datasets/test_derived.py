# SPDX-License-Identifier: Apache-2.0
"""A source made of another passes on what it does not change, and hides what would no longer be true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.frames import DerivedSource, FrameSource, Selection
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.types import Frame, Matrix

T_NEW_OLD = make_pose(so3_exp([0.3, -0.2, 1.0]), [5.0, -1.0, 2.0])


class Recorded(FrameSource):
    """Five frames with all that a source can tell; counts how often an image is read."""

    name = "recorded"
    camera = Camera(8, 6, 7.0, 7.0, 3.5, 2.5)
    camera_is_guess = True
    reads = 0

    def __len__(self) -> int:
        return 5

    def indices(self) -> Sequence[int]:
        return range(10, 15)

    def __getitem__(self, position: int) -> Frame:
        self.reads += 1
        index = self.indices()[position]
        image = np.full((6, 8, 3), index, np.uint8)
        return Frame(image, self.camera, index, index, T_map_camera=self.pose(position))

    def encoded_image(self, position: int) -> bytes | None:
        return bytes([self.indices()[position]])

    def pose(self, position: int) -> Matrix | None:
        return None if position == 2 else make_pose(np.eye(3), [position, 0.0, 0.0])

    def visible_points(self, position: int) -> np.ndarray | None:
        return np.full((2, 3), float(position))


class Darker(DerivedSource):
    """The images changed, and nothing else."""

    def changed(self, frame: Frame, position: int) -> Frame:
        return replace(frame, image=frame.image // 2)


def test_what_is_not_changed_is_passed_on() -> None:
    source = Recorded()
    derived = Selection(source, [4, 1])
    assert len(derived) == 2 and list(derived.indices()) == [14, 11]
    assert (derived.name, derived.camera, derived.camera_is_guess) == ("recorded", source.camera, True)
    assert derived.encoded_image(0) == b"\x0e" and derived.pose(1)[0, 3] == 1.0
    assert (derived.visible_points(0) == 4.0).all() and source.reads == 0
    assert [frame.index for frame in derived] == [14, 11] and derived[-1].index == 11
    with pytest.raises(IndexError):
        derived[2]


def test_an_image_that_was_changed_is_not_had_as_it_was_recorded() -> None:
    derived = Darker(Recorded())
    assert derived[1].image[0, 0, 0] == 5 and derived.encoded_image(1) is None


def test_what_is_remembered_is_not_read_again_until_it_is_forgotten() -> None:
    source = Recorded()
    kept = Remembered(source, 2)
    for position in (0, 1, 0, 1, -5, 1):
        assert kept[position].index == 10 + position % 5
    assert source.reads == 2
    assert kept[2].index == 12 and kept[1].index == 11 and source.reads == 3
    assert kept[0].index == 10 and source.reads == 4
