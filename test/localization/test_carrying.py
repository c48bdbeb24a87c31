# SPDX-License-Identifier: Apache-2.0
"""Poses where the map does not show the view: carried on with this session's images, said so, and not for ever."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.localization.carrying import Carrier
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.pixloc.session_points import SessionPoints
from kfloc_ros.types import CoarsePose, Frame, PoseEstimate, TrackingState

STEPS = 32
TURN_RAD, MOVE_M = 0.05, 0.02
MAPPED_STEPS = 8
"""Steps in which the map still shows most of the view."""


@pytest.fixture(scope="module")
def frames(room) -> list[Frame]:
    """Views of a camera that turns away from what is mapped, moving sideways."""
    found = []
    for k in range(STEPS):
        R = so3_exp(np.array([0.0, 0.5 + TURN_RAD * k, 0.0]))
        found.append(room.view(make_pose(R, [0.1 - MOVE_M * k, 0.02 * np.sin(k), -0.6]), k))
    return found


def localize(room_map, frames: list[Frame], **options) -> list[PoseEstimate]:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", **options))
    return [localizer.process(frame).estimate for frame in frames]


def off(estimate: PoseEstimate, frame: Frame) -> tuple[float, float]:
    assert estimate.T_map_camera is not None
    between = np.linalg.inv(frame.T_map_camera) @ estimate.T_map_camera
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


@pytest.mark.thorough
def test_a_camera_that_turns_away_from_the_map_keeps_its_pose_for_a_while(room_map, frames) -> None:
    without = localize(room_map, frames, carry_s=0.0)
    assert without[-1].T_map_camera is None and without[-3].T_map_camera is None
    carried = localize(room_map, frames)
    assert all(e.T_map_camera is not None for e in carried)
    same = [np.array_equal(a.T_map_camera, b.T_map_camera) for a, b in zip(carried, without, strict=True)]
    assert all(same[:MAPPED_STEPS])  # where the map settles the pose, nothing else changes it
    by_session = [e for e in carried if e.alignment is not None and e.alignment.carried]
    assert len(by_session) >= 6
    for estimate in by_session:
        assert estimate.state is TrackingState.DEGRADED and "this session's images" in estimate.reason
        assert estimate.refined_pose is None  # neither the filter nor odometry takes it for a pose of the map
    errors = np.array([off(e, f) for e, f in zip(carried, frames, strict=True)])
    assert errors[:, 0].max() < 0.08 and errors[:, 1].max() < 1.5
    sigmas = [np.sqrt(np.trace(e.covariance[:3, :3])) for e in by_session]
    assert all(error < 3 * sigma for error, sigma in zip(errors[-len(by_session) :, 0], sigmas, strict=True))


@pytest.mark.thorough
def test_it_ends_after_the_time_that_was_given_and_the_map_takes_over_again(room_map, frames) -> None:
    carried = [e.alignment is not None and e.alignment.carried for e in localize(room_map, frames, carry_s=0.3)]
    assert 1 <= sum(carried) <= 3 and not carried[-1]
    turned_back = [replace(f, stamp_ns=(2 * STEPS - k) * 100_000_000) for k, f in enumerate(frames)]
    estimates = localize(room_map, [*frames, *reversed(turned_back)])
    assert np.mean([e.T_map_camera is not None for e in estimates]) > 0.9
    assert estimates[-1].state is TrackingState.TRACKING
    assert off(estimates[-1], frames[0])[0] < 0.02


@pytest.mark.thorough
def test_points_of_the_session_are_found_after_a_sudden_turn(room_map, frames, monkeypatch) -> None:
    turned = replace(frames[MAPPED_STEPS + 12], stamp_ns=frames[MAPPED_STEPS + 7].stamp_ns)  # by 17 deg in 0.1 s
    given = [*frames[: MAPPED_STEPS + 7], turned]
    estimate = localize(room_map, given, relocalize=False)[-1]
    assert not estimate.bridged and estimate.alignment is not None and estimate.alignment.success
    assert off(estimate, turned)[0] < 0.08 and off(estimate, turned)[1] < 1.5
    monkeypatch.setattr(Carrier, "_located", lambda *_: None)
    without = localize(room_map, given, relocalize=False)[-1]
    assert without.T_map_camera is None or without.bridged or off(without, turned)[0] > 0.08


@pytest.mark.parametrize(("sigma_m", "off_m"), [(0.08, 0.1), (0.02, 0.1), (0.08, 1.0)])
def test_a_pose_that_is_too_uncertain_is_fused_with_what_this_session_knows(
    room_map, frames, sigma_m: float, off_m: float
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    for frame in frames[:MAPPED_STEPS]:
        last = localizer.process(frame)
    now = frames[MAPPED_STEPS]
    features, carrier = localizer.prepare(now).features, localizer._refine._carrier
    T = now.T_map_camera @ make_pose(np.eye(3), [off_m, 0.0, 0.0])
    covariance = np.diag([sigma_m**2] * 3 + [math.radians(1.0) ** 2] * 3)
    uncertain = replace(last.estimate.alignment, T_map_camera=T, covariance=covariance)
    fused = carrier.fused(now.stamp_ns, features, last.estimate.T_map_camera, uncertain)
    if sigma_m == 0.02:  # good enough to be claimed
        assert fused is uncertain
        return
    error = now.T_map_camera[:3, 3] - fused.T_map_camera[:3, 3]
    assert np.linalg.norm(error) < 0.3 * off_m
    if off_m < 0.5:
        assert np.trace(fused.covariance[:3, :3]) < 0.3 * np.trace(covariance[:3, :3])
    else:  # they contradict each other: the covariance holds both
        apart = T[:3, 3] - fused.T_map_camera[:3, 3]
        assert apart @ np.linalg.solve(fused.covariance[:3, :3], apart) < 4.0
    after_ns = int((LocalizerConfig().carry_s + 1.0) * 1e9)
    late = carrier.fused(now.stamp_ns + after_ns, features, last.estimate.T_map_camera, uncertain)
    assert late is uncertain


def test_images_are_learned_by_motion_where_little_time_passes(room_map, frames, monkeypatch) -> None:
    def learned(given: list[Frame]) -> int:
        poses, observe = [], SessionPoints.observe
        monkeypatch.setattr(SessionPoints, "observe", lambda *a: poses.append(a[2]) or observe(*a))
        assert all(e.T_map_camera is not None for e in localize(room_map, given))
        monkeypatch.undo()
        return len(poses)

    moving = [replace(f, stamp_ns=1 + k * 1_000_000) for k, f in enumerate(frames[:MAPPED_STEPS])]  # 1 ms apart
    standing = [replace(frames[0], stamp_ns=f.stamp_ns) for f in moving]
    assert learned(standing) == 1
    assert learned(moving) >= 3


def test_an_image_without_content_is_not_searched_while_its_pose_is_carried_on(room_map, frames, monkeypatch) -> None:
    def stages(**options) -> set[str]:
        localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", **options))
        for frame in frames[:4]:
            assert localizer.process(frame).estimate.state is TrackingState.TRACKING
        covered = replace(frames[4], image=np.full_like(frames[4].image, 60))
        return set(localizer.process(covered).estimate.timings_ms)

    assert "relocalize" not in stages() and "search_near" not in stages()
    assert "search_near" in stages(carry_s=0.0)


def test_an_image_without_content_is_aligned_only_where_that_is_certain_at_once(room_map, frames, monkeypatch) -> None:
    def kinds(**options) -> set[bool]:
        given, real = [], Refiner.align
        monkeypatch.setattr(
            Refiner, "align", lambda *args, **k: given.append(k.get("only_certain", False)) or real(*args, **k)
        )
        localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", **options))
        for frame in frames[:4]:
            localizer.process(frame)
        given.clear()
        localizer.process(replace(frames[4], image=np.full_like(frames[4].image, 60)))
        monkeypatch.undo()
        return set(given)

    assert kinds() == {True} and kinds(carry_s=0.0) == {False}


@pytest.mark.parametrize("sigma", [0.002, 0.3])
def test_a_coarse_pose_that_is_not_refined_replaces_a_carried_one_that_is_known_less_only(
    room_map, frames, sigma: float
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", relocalize=False))
    for frame in frames[:4]:
        assert localizer.process(frame).estimate.state is TrackingState.TRACKING
    covered = replace(frames[4], image=np.full_like(frames[4].image, 60))
    T = make_pose(so3_exp(np.array([0.0, 0.1, 0.0])), [0.2, 0.0, 0.0]) @ frames[4].T_map_camera
    accepted = CoarsePose(True, "", T, sigma**2 * np.eye(6), 500, 0.9)
    coarse = replace(localizer.coarse_half(covered), pose=accepted)
    estimate = localizer.refine_half(covered, coarse).estimate
    assert estimate.state is TrackingState.DEGRADED and "not refined" in estimate.reason
    if sigma < 0.01:
        assert not estimate.bridged and np.array_equal(estimate.T_map_camera, T)
        return
    assert estimate.bridged and off(estimate, frames[4])[0] < 0.05 and 0 < estimate.confidence <= 1
    assert np.all(np.diag(estimate.covariance) < sigma**2)


def test_a_reset_forgets_the_images_of_the_session(room_map, frames) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    for frame in frames[:MAPPED_STEPS]:
        localizer.process(frame)
    localizer.reset("a test")
    assert localizer.process(frames[-1]).estimate.T_map_camera is None
