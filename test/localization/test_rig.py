# SPDX-License-Identifier: Apache-2.0
"""Three cameras on one body: one pose from all, also when two of them are covered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.rig import RigLocalizer, RigView, _Candidate, _joined, _largest_group
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.poses import BodyPose
from kfloc_ros.types import Frame, Matrix, TrackingState

SIGMA = np.diag([0.01**2] * 3 + [0.005**2] * 3)
T_OPTICAL = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


def mount(yaw_deg: float) -> Matrix:
    """``T_base_camera`` of a camera on a mast that looks to the side by an angle."""
    return make_pose(so3_exp([0, 0, np.radians(yaw_deg)]), [0, 0, 1.4]) @ make_pose(np.eye(3), [0.15, 0, 0]) @ T_OPTICAL


MOUNTS = [mount(0.0), mount(120.0), mount(-120.0)]


def candidate(position: int, x: float, state: TrackingState = TrackingState.TRACKING, scale: float = 1.0) -> _Candidate:
    return _Candidate(position, BodyPose(make_pose(np.eye(3), [x, 0, 0]), scale * SIGMA), state, 100.0)


def test_poses_that_agree_are_joined_by_their_information() -> None:
    joint = _joined([candidate(0, 0.0), candidate(1, 0.03, scale=3.0)])
    assert joint.T_map_body[0, 3] == pytest.approx(0.03 / 4)
    assert joint.covariance[0, 0] == pytest.approx(0.75 * SIGMA[0, 0])


def test_the_largest_group_that_agrees_counts() -> None:
    group = _largest_group([candidate(0, 5.0), candidate(1, 0.0), candidate(2, 0.01)])
    assert [item.position for item in group] == [1, 2]
    assert _largest_group([]) == []


@pytest.fixture(scope="module")
def demo() -> SceneMap:
    return SceneMap.load(resolve_map("demo_room"))


def base_pose(number: int) -> Matrix:
    """``T_map_base`` of a robot that turns while it drives."""
    return make_pose(so3_exp([0, 0, 0.9 * number]), [0.6 * np.cos(0.5 * number), 0.4 * np.sin(0.5 * number), 0.0])


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[list[Frame]]]:
    """Images of the three cameras at 12 places."""
    from kfloc_ros.simulation.render import Renderer, Sensor
    from kfloc_ros.simulation.scene import build_room
    from kfloc_ros.simulation.source import CAMERA, DAY

    renderer, sensor = Renderer(build_room(), CAMERA), Sensor(CAMERA)
    places = []
    for number in range(12):
        frames = []
        for k, T_base_camera in enumerate(MOUNTS):
            T = base_pose(number) @ T_base_camera
            image = sensor.expose(renderer.render(T, DAY), T, T, T, np.random.default_rng((number, k)))
            frames.append(Frame(image, CAMERA, 10**12 + number * 10**9, T_map_camera=T))
        places.append(frames)
    yield places


def covered(frame: Frame) -> Frame:
    return Frame(np.full_like(frame.image, 60), frame.camera, frame.stamp_ns)


def error(T: Matrix | None, truth: Matrix) -> float:
    """Metres, where 10 cm count as much as 4 deg; infinity without a pose."""
    if T is None:
        return float("inf")
    between = inverse_pose(truth) @ T
    return max(float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3]) / 40.0)


@pytest.mark.slow
def test_recall_is_that_of_the_camera_that_is_not_covered(demo: SceneMap, pictures: list[list[Frame]]) -> None:
    rng = np.random.default_rng(7)
    config = LocalizerConfig(camera_check="off", max_repeat_s=0.0)
    rig, rows = RigLocalizer(demo, config, 3), []
    for number, frames in enumerate(pictures):
        free = int(rng.integers(3))
        shown = [frame if k == free else covered(frame) for k, frame in enumerate(frames)]
        rig.reset("another place")
        views = [RigView(k, frame, MOUNTS[k]) for k, frame in enumerate(shown)]
        result = rig.process(views)
        alone = Localizer(demo, config, rig.localizers[0].backbone).process(frames[free]).estimate.T_map_camera
        T_alone = None if alone is None else alone @ inverse_pose(MOUNTS[free])
        truth = base_pose(number)
        rows.append((error(result.T_map_base, truth), error(T_alone, truth), free in result.used))
    ours, single, used = (np.array(column) for column in zip(*rows, strict=True))
    print(f"within 10 cm, 4 deg: rig {np.mean(ours < 0.1):.2f}, the uncovered camera alone {np.mean(single < 0.1):.2f}")
    assert np.mean(ours < 0.1) >= np.mean(single < 0.1) > 0.5
    assert used[ours < 0.1].all()


@pytest.mark.slow
def test_three_cameras_are_never_worse_than_the_best_single_one(demo: SceneMap, pictures: list[list[Frame]]) -> None:
    config = LocalizerConfig(camera_check="off", max_repeat_s=0.0)
    rig, rows = RigLocalizer(demo, config, 3), []
    for number, frames in enumerate(pictures):
        rig.reset("another place")
        result = rig.process([RigView(k, frame, MOUNTS[k]) for k, frame in enumerate(frames)])
        singles = [
            error(T @ inverse_pose(MOUNTS[k]) if T is not None else None, base_pose(number))
            for k, T in enumerate(item.estimate.T_map_camera for item in result.views)
        ]
        rows.append((error(result.T_map_base, base_pose(number)), *singles))
        assert result.localization.estimate.covariance is not None
    errors = np.array(rows)
    recalls = (errors < 0.1).mean(axis=0)
    print(f"within 10 cm, 4 deg: rig {recalls[0]:.2f}, cameras {recalls[1:]}; medians {np.median(errors, axis=0)}")
    assert recalls[0] >= recalls[1:].max()
    assert np.median(errors[:, 0]) <= 1.1 * np.median(errors[:, 1:], axis=0).min()


@pytest.mark.thorough
@pytest.mark.parametrize("print_m", [None, 0.8, 1.2])
def test_a_second_camera_beside_the_first_tells_a_print_from_the_room(
    room: Any, room_map: Path, print_m: float | None
) -> None:
    """What is 2.4 m away in the map hangs as a flat print before the cameras: the images are too far apart."""
    baseline_m = 0.2
    rig = RigLocalizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", max_repeat_s=0.0), 2)
    left = room[3]
    right = room.view(left.T_map_camera @ make_pose(np.eye(3), [baseline_m, 0.0, 0.0]), 3)
    if print_m is not None:
        shift_px = round(left.camera.fx * baseline_m / print_m)
        image = np.concatenate([left.image[:, shift_px:], np.full_like(left.image[:, :shift_px], 90)], axis=1)
        right = Frame(image, left.camera, left.stamp_ns, 3)
    mounts = [np.eye(4), make_pose(np.eye(3), [baseline_m, 0.0, 0.0])]
    result = rig.process([RigView(k, frame, T) for k, (frame, T) in enumerate(zip((left, right), mounts, strict=True))])
    state = result.localization.estimate.state
    assert (state is TrackingState.TRACKING) == (print_m is None), result.localization.estimate.reason
