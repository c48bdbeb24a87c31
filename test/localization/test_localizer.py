# SPDX-License-Identifier: Apache-2.0
"""The pipeline on a real map of a small room: right poses, honest covariance, no silent nonsense."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kfloc_ros.config import build_config
from kfloc_ros.errors import ConfigError, FrameError
from kfloc_ros.evaluation.offline import localize_source
from kfloc_ros.frames import Selection
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.jobs import HELPERS
from kfloc_ros.localization import coarse
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CellPart
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc import kernels
from kfloc_ros.types import Frame, PoseEstimate, TrackingState
from kfloc_ros.visualization.stream import watch


@pytest.fixture(scope="module")
def scene_map(room_map) -> SceneMap:
    return SceneMap.load(room_map)


def localize(scene_map: SceneMap, frames: list[Frame], **options) -> list[PoseEstimate]:
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **options))
    return [localizer.process(frame).estimate for frame in frames]


def errors_m(estimates: list[PoseEstimate], frames: list[Frame]) -> np.ndarray:
    pairs = zip(estimates, frames, strict=True)
    return np.array([np.linalg.norm(e.T_map_camera[:3, 3] - f.T_map_camera[:3, 3]) for e, f in pairs])


def errors_deg(estimates: list[PoseEstimate], frames: list[Frame]) -> np.ndarray:
    pairs = zip(estimates, frames, strict=True)
    return np.array([rotation_angle_deg(e.T_map_camera[:3, :3].T @ f.T_map_camera[:3, :3]) for e, f in pairs])


def test_a_sequence_is_localized_to_the_centimetre(scene_map: SceneMap, room) -> None:
    frames = [room[i] for i in range(0, 24, 2)]
    estimates = localize(scene_map, frames)
    assert [e.stamp_ns for e in estimates] == [f.stamp_ns for f in frames]
    assert {e.state for e in estimates} == {TrackingState.TRACKING}
    assert np.median(errors_m(estimates, frames)) < 0.01
    assert np.median(errors_deg(estimates, frames)) < 0.3


def test_refinement_is_better_than_the_coarse_pose(scene_map: SceneMap, room) -> None:
    frames = [room[i] for i in range(0, 16, 2)]
    coarse = localize(scene_map, frames, refine=False)
    refined = localize(scene_map, frames)
    assert all(e.alignment is None for e in coarse)
    assert np.median(errors_m(refined, frames)) < 0.7 * np.median(errors_m(coarse, frames))


def test_the_covariance_is_symmetric_positive_and_of_the_errors_size(scene_map: SceneMap, room) -> None:
    frames = [room[i] for i in range(0, 24, 2)]
    estimates = localize(scene_map, frames)
    for estimate, error in zip(estimates, errors_m(estimates, frames), strict=True):
        covariance = estimate.covariance
        assert np.allclose(covariance, covariance.T) and np.linalg.eigvalsh(covariance)[0] > 0
        sigma_m = float(np.sqrt(np.trace(covariance[:3, :3])))
        assert error < 6 * sigma_m
        assert sigma_m < 0.2


def test_measuring_parts_of_the_cells_changes_poses_by_less_than_their_errors(scene_map: SceneMap, room) -> None:
    frames = [room[i] for i in range(12)]
    parts = localize(scene_map, frames)
    whole = localize(scene_map, frames, alternate_cells=False)
    moved = [np.linalg.norm(a.T_map_camera[:3, 3] - b.T_map_camera[:3, 3]) for a, b in zip(parts, whole, strict=True)]
    assert moved[0] == 0.0 and max(moved) > 0.0  # the first frame is measured whole
    assert max(moved) < 0.002


def test_a_quarter_of_the_cells_is_measured_once_settled_and_all_in_the_frame_that_resets(
    scene_map: SceneMap, room
) -> None:
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    results = [localizer.process(room[i]).coarse for i in range(10)]
    shares = [float(result.measurement.valid.float().mean()) for result in results]
    assert shares == pytest.approx([1.0] + 5 * [0.5] + 4 * [0.25])
    last = torch.stack([result.measurement.valid for result in results[-4:]])
    assert (last.sum(0) == 1).all()  # in four frames, every cell once

    turned = room[9].T_map_camera @ make_pose(so3_exp([0.0, math.radians(14), 0.0]), np.zeros(3))
    localization = localizer.process(replace(room.view(turned), stamp_ns=room[10].stamp_ns))
    assert "search window" in localization.coarse.filter.reset_reason
    assert localization.coarse.scene_coordinates.valid.float().mean() > 0.99
    assert np.linalg.norm(localization.estimate.T_map_camera[:3, 3] - turned[:3, 3]) < 0.03


def test_after_a_frame_without_a_coarse_pose_a_quarter_is_measured_and_all_once_that_has_one(
    scene_map: SceneMap, room
) -> None:
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    covered = [replace(room[k], image=np.full_like(room[k].image, 60)) for k in (4, 5, 6)]
    results = [localizer.coarse_half(frame) for frame in (*(room[k] for k in range(4)), *covered, room[7], room[8])]
    shares = [float(result.measurement.valid.float().mean()) for result in results]
    assert [result.pose.success for result in results] == 4 * [True] + 3 * [False] + 2 * [True]
    assert shares == pytest.approx(5 * [1.0] + 2 * [0.25] + 2 * [1.0])
    first = Localizer(scene_map, LocalizerConfig(device="cpu")).coarse_half(room[7])
    assert np.array_equal(results[7].pose.T_map_camera, first.pose.T_map_camera)  # as if nothing had been before
    options = {"alternate_cells": False}, {"recursion": "published"}
    for option in options:
        localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **option))
        assert all(localizer.coarse_half(frame).measurement.valid.float().mean() > 0.99 for frame in covered)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_successive_turns_cover_every_cell_once(parts: int) -> None:
    masks = [CellPart(parts, turn).mask(15, 20, torch.device("cpu")) for turn in range(parts)]
    assert (sum(mask.int() for mask in masks) == 1).all()


def test_the_filter_is_used_from_the_second_frame_and_not_after_a_gap(scene_map: SceneMap, room) -> None:
    frames = [room[0], room[1], room[2], replace(room[3], stamp_ns=room[3].stamp_ns + 10_000_000_000)]
    shares = [e.filter.prior_ratio for e in localize(scene_map, frames)]
    assert shares[0] == 0.0 and shares[3] == 0.0
    assert shares[1] > 0.3 and shares[2] > 0.3


def test_the_halves_joined_by_hand_give_what_process_gives(scene_map: SceneMap, room) -> None:
    """As ``filter_node`` and ``refiner_node`` join them."""
    whole, first, second = (Localizer(scene_map, LocalizerConfig(device="cpu")) for _ in range(3))
    for k in range(6):
        hints = [room[k].T_map_camera] if k == 3 else []
        one = whole.process(room[k], hints)
        coarse = first.coarse_half(room[k])
        other = second.refine_half(room[k], coarse, hints)
        first.correct_belief(room[k].stamp_ns, other.estimate.refined_pose)
        assert one.coarse is not None
        assert torch.equal(one.coarse.scene_coordinates.mean, coarse.scene_coordinates.mean)
        assert np.array_equal(one.estimate.T_map_camera, other.estimate.T_map_camera)
        assert np.array_equal(one.estimate.covariance, other.estimate.covariance)


def test_what_viewers_draw_is_what_localize_writes(scene_map: SceneMap, room) -> None:
    """``show``, ``view`` and ``localize`` go through one loop; the belief they draw was corrected by refined poses."""
    source = Selection(room, range(0, 12, 2))
    config = LocalizerConfig(device="cpu")
    records = list(localize_source(Localizer(scene_map, config), source))
    drawn = list(watch(Localizer(scene_map, config), source))
    assert len(records) == len(drawn) == 6
    for record, view in zip(records, drawn, strict=True):
        assert np.array_equal(record.estimate, view.estimate.T_map_camera)
        assert np.array_equal(record.coarse, view.coarse.pose.T_map_camera)
        assert np.array_equal(record.covariance, view.estimate.covariance)
    assert drawn[-1].coarse.filter.confirmed


def test_a_frozen_camera_is_lost_after_a_second_whether_tracking_or_not(scene_map: SceneMap, room) -> None:
    frames = [replace(room[0], stamp_ns=k * 300_000_000) for k in range(7)]
    for tracking in (False, True):
        estimates = localize(scene_map, frames, tracking=tracking)
        assert [e.state is TrackingState.TRACKING for e in estimates] == [True] * 4 + [False] * 3
        assert "repeats one image" in estimates[-1].reason and estimates[-1].T_map_camera is None


def test_former_options_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="'relocalize'"):
        build_config(LocalizerConfig, {"first_fix": True})
    with pytest.raises(ConfigError, match="remove it"):
        build_config(LocalizerConfig, {"nis_mode": "surer"})


def test_the_same_frames_give_the_same_poses(scene_map: SceneMap, room) -> None:
    frames = [room[0], room[1]]
    first, second = localize(scene_map, frames), localize(scene_map, frames)
    assert all(np.array_equal(a.T_map_camera, b.T_map_camera) for a, b in zip(first, second, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("value", [0, 255])
def test_a_blank_image_gives_no_pose_of_its_own_and_a_reason(scene_map: SceneMap, room, value: int) -> None:
    good, blank = room[0], replace(room[1], image=np.full_like(room[1].image, value))
    frames = [blank, good, replace(blank, stamp_ns=good.stamp_ns + 100_000_000), replace(room[2], stamp_ns=10**9)]
    first, _, soon, _ = carried_on = localize(scene_map, frames)
    late = localize(scene_map, [good, replace(blank, stamp_ns=good.stamp_ns + 700_000_000)])[1]
    assert [e.state.name for e in carried_on] == ["INITIALIZING", "TRACKING", "DEGRADED", "TRACKING"]
    assert soon.bridged and "at a fading speed" in soon.reason and soon.refined_pose is None
    assert late.state is TrackingState.LOST
    for estimate in (first, late):
        assert estimate.T_map_camera is None and estimate.covariance is None and estimate.reason


def test_a_frame_of_another_size_is_refused(scene_map: SceneMap, room) -> None:
    frame = room[0]
    with pytest.raises(FrameError, match=str(frame.image.shape[1] // 2)):
        localize(scene_map, [replace(frame, image=np.ascontiguousarray(frame.image[:, ::2]))])


def test_cells_measured_beside_the_frame_before_are_those_that_the_frame_needs(scene_map: SceneMap, room) -> None:
    """Whether a quarter is enough is decided before both threads ask, so no cell is measured twice."""
    frames = [room[i] for i in range(10)]
    alone = localize(scene_map, frames)
    localizer, shares = Localizer(scene_map, LocalizerConfig(device="cpu")), []
    ahead = localizer.prepare(frames[0])
    for k, frame in enumerate(frames):
        coarse = localizer.coarse_half(frame, ahead=ahead)
        if k + 1 < len(frames):  # beside steps 6 to 8 of this frame
            ahead = localizer.prepare(frames[k + 1])
            ahead.help()
            shares.append(float(ahead.measuring._begun.float().mean()))
        localization = localizer.refine_half(frame, coarse)
        localizer.correct_belief(frame.stamp_ns, localization.estimate.refined_pose)
        assert (localization.estimate.T_map_camera == alone[k].T_map_camera).all()
        if k > 1:
            assert shares[k - 1] == pytest.approx(float(coarse.measurement.valid.float().mean()))


@pytest.mark.parametrize("tracking", [False, True])
def test_threads_that_share_a_frame_change_no_bit(
    scene_map: SceneMap, room, monkeypatch: pytest.MonkeyPatch, tracking: bool
) -> None:
    frames, before, helped = [room[i] for i in range(0, 12, 2)], torch.get_num_threads(), []
    enlist = HELPERS.enlist
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(HELPERS, "enlist", lambda *tasks: helped.append(len(tasks)) or enlist(*tasks))
        shared = localize(scene_map, frames, tracking=tracking, tracking_check_period=3)
        monkeypatch.setattr(HELPERS, "enlist", lambda *tasks: None)
        alone = localize(scene_map, frames, tracking=tracking, tracking_check_period=3)
    finally:
        torch.set_num_threads(before)
    assert set(helped) == {1, 2}, "a fit of the camera, or the head of the frame before; flow and head"
    assert not tracking or any(a.tracked and not b.tracked for a, b in itertools.pairwise(shared))
    for a, b in zip(shared, alone, strict=True):
        assert np.array_equal(a.T_map_camera, b.T_map_camera) and np.array_equal(a.covariance, b.covariance)


def test_the_first_fit_of_a_camera_finds_its_loop_compiled(
    scene_map: SceneMap, room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is compiled for the types of its arguments, so that the warm-up calls it with those of an image."""
    numba, given, descend = pytest.importorskip("numba"), [], kernels.descend_with_camera

    def noted(*arguments: Any) -> Any:
        given.append([numba.typeof(argument) for argument in arguments])
        return descend(*arguments)

    monkeypatch.setattr(kernels, "descend_with_camera", noted)
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    localizer.warm_up()
    in_warm_up, found = given[:], localizer.process(room[0])
    T, refiner = found.estimate.T_map_camera, localizer.refiner
    assert refiner.fit_camera(refiner.prepared(found.features, T)) is not None
    assert in_warm_up and all(types == in_warm_up[0] for types in given)


def test_the_warm_up_solves_poses_after_an_image_without_one(room_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    poses, solve = [], coarse.solve_pnp
    monkeypatch.setattr(coarse, "solve_pnp", lambda *args: poses.append(solve(*args)) or poses[-1])
    Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu")).warm_up()
    assert [pose.success for pose in poses] == [False, True, True]  # of noise, and of two images of a wall
