# SPDX-License-Identifier: Apache-2.0
"""Bad frames are left out and counted; good ones all come through, in order."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from kfloc_ros.mapping.frame_checks import BLUR, JUMP, NO_POSE, NO_RIGID_POSE, STAMP, FrameChecks
from kfloc_ros.types import Frame


@pytest.fixture(scope="module")
def frames(room) -> list[Frame]:
    return [room[k] for k in range(20)]


def screened(frames: list[Frame]) -> tuple[list[int], dict[str, int]]:
    checks = FrameChecks()
    kept = [item.position for item in checks.passing(iter(enumerate(frames)))]
    return kept, dict(checks.left_out)


def without(position: int) -> list[int]:
    return [k for k in range(20) if k != position]


def test_good_frames_all_come_through(frames) -> None:
    assert screened(frames) == (list(range(20)), {})


@pytest.mark.parametrize("stamp_ns", [0, 10**18])
@pytest.mark.parametrize("position", [7, 14])
def test_one_wrong_stamp_costs_one_frame(frames, position: int, stamp_ns: int) -> None:
    bad = [*frames]
    bad[position] = replace(bad[position], stamp_ns=stamp_ns)
    assert screened(bad) == (without(position), {STAMP: 1})


def test_poses_that_are_none(frames) -> None:
    bad = [*frames]
    bad[3] = replace(bad[3], T_map_camera=None)
    bad[4] = replace(bad[4], T_map_camera=np.full((4, 4), np.inf))
    bad[5] = replace(bad[5], T_map_camera=np.diag([2.0, 2.0, 2.0, 1.0]))
    kept, left_out = screened(bad)
    assert kept == [k for k in range(20) if k not in (3, 4, 5)]
    assert left_out == {NO_POSE: 2, NO_RIGID_POSE: 1}


def moved(frame: Frame, x_m: float) -> Frame:
    assert frame.T_map_camera is not None
    T = frame.T_map_camera.copy()
    T[0, 3] += x_m
    return replace(frame, T_map_camera=T)


def test_a_pose_that_jumps_away_and_back_is_left_out(frames) -> None:
    bad = [*frames]
    bad[15] = moved(bad[15], 1.0)
    assert screened(bad) == (without(15), {JUMP: 1})


def test_after_a_lasting_jump_and_among_photos_no_frame_is_at_fault(frames) -> None:
    assert screened([*frames[:12], *(moved(frame, 1.0) for frame in frames[12:])])[1] == {}
    photos = [moved(frame, 3.0 * ((k * 7) % 5)) for k, frame in enumerate(frames)]
    assert screened(photos)[1] == {}


def shaken(image: np.ndarray) -> np.ndarray:
    """As if the camera had turned by 13 pixels during the exposure."""
    return cv2.blur(image, (13, 1))


@pytest.mark.parametrize("blur", [shaken, lambda image: cv2.GaussianBlur(image, (0, 0), 3.0)])
def test_a_blurred_image_is_left_out_and_a_faint_one_is_not(frames, blur) -> None:
    bad = [*frames]
    bad[12] = replace(bad[12], image=blur(bad[12].image))
    faint = (bad[16].image // 8 + 100).astype(np.uint8)  # an eighth of the contrast, as sharp as before
    bad[16] = replace(bad[16], image=faint)
    assert screened(bad) == (without(12), {BLUR: 1})
