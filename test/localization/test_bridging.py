# SPDX-License-Identifier: Apache-2.0
"""Poses carried on by optical flow or the motion: near the truth, with a covariance that grows, and not for ever."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.localization.bridging import Bridge, FadingMotion, FlowTracks
from kfloc_ros.types import Frame

PERIOD_NS = 100_000_000
STEPS = 12
CLEAR, DARK = torch.full((8, 8), 0.9), torch.full((8, 8), 0.1)
SMALL = np.diag([0.01**2] * 3 + [0.01**2] * 3)


@pytest.fixture(scope="module")
def frames(room) -> list[Frame]:
    """Views of a camera that moves sideways and turns; position k is at k tenths of a second."""
    return [
        room.view(make_pose(so3_exp([0.0, 0.4 + 0.03 * k, 0.0]), [0.2 - 0.02 * k, 0.0, -0.6]), k) for k in range(STEPS)
    ]


def usual_depth(pixels: np.ndarray, T: np.ndarray) -> float:
    return 1.5


def off(T: np.ndarray, frame: Frame) -> tuple[float, float]:
    error = np.linalg.inv(frame.T_map_camera) @ T
    return float(np.linalg.norm(error[:3, 3])), rotation_angle_deg(error[:3, :3])


def begun(frames: list[Frame], **options) -> Bridge:
    """Return a bridge that begins at the fourth image."""
    limits = {"max_gap_s": 0.5, "longest_s": 5.0, "max_sigma_m": 0.25}
    bridge = Bridge(frames[0].camera, **(limits | options))
    for frame in frames[:4]:
        bridge.observe(frame, CLEAR, frame.T_map_camera, SMALL)
    return bridge


def dark(frame: Frame) -> Frame:
    return Frame(np.zeros_like(frame.image), frame.camera, frame.stamp_ns)


def test_a_steady_motion_goes_on_and_fades() -> None:
    motion = FadingMotion(max_gap_s=0.5)
    for k in range(5):
        motion.observe(k * PERIOD_NS, make_pose(so3_exp([0, 0, 0.02 * k]), [0.03 * k, 0.0, 0.0]))
    (soon, early), (late, more) = (motion.predict((4 + k) * PERIOD_NS) for k in (1, 20))
    assert soon[0, 3] == pytest.approx(0.15, abs=0.005) and late[0, 3] < 0.12 + 0.3 * 0.7  # 0.3 m/s for 0.7 s
    assert rotation_angle_deg(soon[:3, :3]) == pytest.approx(np.degrees(0.1), abs=0.2)
    assert np.all(np.diag(more) > 50 * np.diag(early))


def test_a_fast_camera_is_less_predictable_and_a_gap_ends_a_motion() -> None:
    variances = []
    for step_m in (0.0, 0.1):
        motion = FadingMotion(max_gap_s=0.5)
        for k in range(20):
            motion.observe(k * PERIOD_NS, make_pose(np.eye(3), [step_m * k, 0.0, 0.0]))
        variances.append(motion.predict(24 * PERIOD_NS)[1][0, 0])
    assert variances[1] > 4 * variances[0] > 0
    motion.observe(40 * PERIOD_NS, np.eye(4))
    assert np.array_equal(motion.predict(41 * PERIOD_NS)[0], np.eye(4))  # at rest: no velocity is known


def test_flow_follows_the_camera(frames) -> None:
    tracks = FlowTracks(frames[0].camera)
    assert tracks.follow(frames[0].image, usual_depth) is None
    tracks.begin(frames[0].image, frames[0].T_map_camera)
    sigmas = []
    for frame in frames[1:6]:
        T, covariance = tracks.follow(frame.image, usual_depth)
        away_m, away_deg = off(T, frame)
        assert away_m < min(0.08, 3 * np.sqrt(np.trace(covariance[:3, :3]))) and away_deg < 3.0
        sigmas.append(np.sqrt(covariance[0, 0]))
    assert all(np.diff(sigmas) > 0) and off(frames[0].T_map_camera, frames[5])[1] > 8.0


def test_a_pose_is_carried_on_by_flow_and_says_how_uncertain_it_is(frames) -> None:
    bridge = begun(frames)
    for k in (4, 5, 6):
        found = bridge.carry(frames[k], CLEAR, usual_depth)
        assert found is not None and found.by_flow and found.since_s == pytest.approx(0.1 * (k - 3))
        assert bridge.pose(frames[k].stamp_ns) is found and bridge.carry(frames[k], CLEAR, usual_depth) is found
        error = off(found.T_map_camera, frames[k])[0]
        assert error < 3 * np.sqrt(np.trace(found.covariance[:3, :3])) and error < 0.05
    assert bridge.pose(frames[7].stamp_ns) is None


def test_where_there_is_nothing_to_see_the_motion_carries_a_pose_until_it_is_of_no_use(frames) -> None:
    bridge, found = begun(frames), []
    for k in range(4, 60):
        image = dark(frames[0])
        found.append(bridge.carry(Frame(image.image, image.camera, k * PERIOD_NS), DARK, usual_depth))
    given = [item for item in found if item is not None]
    assert 5 < len(given) < 40 and found[: len(given)] == given  # once it ends, it does not come back
    assert not any(item.by_flow for item in given) and off(given[0].T_map_camera, frames[4])[0] < 0.02
    sigmas = [np.sqrt(np.linalg.eigvalsh(item.covariance[:3, :3])[-1]) for item in given]
    assert all(np.diff(sigmas) > 0) and sigmas[-1] <= 0.25
    assert begun(frames, max_sigma_m=0.0).carry(frames[4], CLEAR, usual_depth) is None
    assert begun(frames, longest_s=0.0).carry(frames[4], CLEAR, usual_depth) is None


def test_an_image_of_another_place_ends_it(frames, room) -> None:
    bridge = begun(frames)
    elsewhere = room.view(make_pose(so3_exp([0.0, -2.4, 0.0]), [0.5, 0.0, 0.5]), 4)
    assert bridge.carry(elsewhere, CLEAR, usual_depth) is None
    assert bridge.carry(dark(frames[5]), DARK, usual_depth) is None


def test_flow_goes_on_after_a_dark_image(frames) -> None:
    bridge = begun(frames)
    assert not bridge.carry(dark(frames[4]), DARK, usual_depth).by_flow
    first = bridge.carry(frames[5], DARK, usual_depth)
    assert not first.by_flow and bridge.carry(frames[6], DARK, usual_depth).by_flow


def test_an_image_is_blind_that_shows_less_than_half_of_those_before(frames) -> None:
    bridge = begun(frames)
    assert not bridge.carry(frames[4], CLEAR, usual_depth).is_blind
    assert bridge.carry(frames[5], DARK, usual_depth).is_blind
    half = CLEAR.clone()
    half[:3] = 0.1
    assert not bridge.carry(frames[6], half, usual_depth).is_blind  # 40 of 64 cells
    bridge.observe(frames[7], DARK, frames[7].T_map_camera, SMALL)  # one bad image of several is not the usual one
    half[:6] = 0.1
    assert bridge.carry(frames[8], half, usual_depth).is_blind


def test_corners_that_are_not_found_are_not_followed_back(frames, monkeypatch) -> None:
    given, real = [], cv2.calcOpticalFlowPyrLK

    def counted(old, new, start, *args, **options):
        there, found, error = real(old, new, start, *args, **options)
        if not given:
            found[::2] = 0
        given.append(len(start))
        return there, found, error

    monkeypatch.setattr(cv2, "calcOpticalFlowPyrLK", counted)
    tracks = FlowTracks(frames[0].camera)
    tracks.begin(frames[0].image, frames[0].T_map_camera)
    tracks.follow(frames[1].image, usual_depth)
    assert len(given) == 2 and 15 < given[1] <= given[0] // 2
