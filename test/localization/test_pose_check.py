# SPDX-License-Identifier: Apache-2.0
"""Check of poses by the whole image: what contradicts a pose is said, and a pose without contradiction stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.localization.camera_check import CameraCheck
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import EVIDENCE, confidence_of, fit_score
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.camera_fit import CameraFit, CameraScore, FittedCamera
from kfloc_ros.pixloc.image_check import BlockMatch, TwoParts
from kfloc_ros.pixloc.refiner import Inspection
from kfloc_ros.types import Frame, PoseEstimate, TrackingState

CAMERA = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
OTHER = replace(CAMERA, fx=505.0, fy=505.0)
"""Camera of another calibration than the map's."""


def localized(room_map: Any, room: Any, change: Any, **options: Any) -> list[PoseEstimate]:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", **options))
    estimates = []
    for k in range(0, 24, 4):
        localizer.reset("each frame for itself")
        frame = room[k]
        estimates.append(localizer.process(replace(frame, image=change(frame.image))).estimate)
    return estimates


def with_its_middle_moved(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    out, part = image.copy(), image[h // 5 : 4 * h // 5, w // 5 : 4 * w // 5]
    shift = w // 12
    out[h // 5 : 4 * h // 5, w // 5 + shift : 4 * w // 5 + shift] = part
    return out


@pytest.mark.thorough
def test_good_images_are_tracking_and_confident(room_map: Any, room: Any) -> None:
    estimates = localized(room_map, room, lambda image: image)
    assert {e.state for e in estimates} == {TrackingState.TRACKING}
    assert min(e.confidence or 0.0 for e in estimates) > 0.8
    assert all(set(e.evidence) <= set(EVIDENCE) for e in estimates)


@pytest.mark.thorough
def test_a_part_that_moved_is_said_and_lowers_the_confidence(room_map: Any, room: Any) -> None:
    good = localized(room_map, room, lambda image: image)
    moved = localized(room_map, room, with_its_middle_moved)
    tracking = [e for e in moved if e.state is TrackingState.TRACKING]
    assert len(tracking) <= 1
    assert all(e.reason for e in moved if e.state is TrackingState.DEGRADED)
    for before, after in zip(good, moved, strict=True):
        if after.confidence is not None and after.state is TrackingState.DEGRADED:
            assert after.confidence < (before.confidence or 0.0)
            assert after.covariance is not None and before.covariance is not None
            assert np.trace(after.covariance) > np.trace(before.covariance)


def test_a_pose_that_its_covariance_does_not_fix_is_not_tracking(room_map: Any, room: Any) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good = localizer.process(room[0])
    assert good.estimate.state is TrackingState.TRACKING and good.estimate.covariance is not None
    vague = replace(good.estimate, covariance=good.estimate.covariance + np.diag([0.15**2, 0, 0, 0, 0, 0]))
    checked = localizer._refine.check(room[0], good.features, vague)
    assert checked.state is TrackingState.DEGRADED and "probability of only 0." in checked.reason
    assert checked.confidence is not None and checked.confidence < 0.5
    assert checked.T_map_camera is not None  # it is still given


def test_a_pose_is_not_tracking_until_images_exclude_a_camera_that_would_move_it_far(
    room_map: Any, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    refiner, fit_camera = localizer._refine.refiner, localizer._refine.refiner.fit_camera
    monkeypatch.setattr(refiner, "fit_camera", lambda candidate: None)  # no image tells anything
    before = localizer.process(room[0]).estimate
    assert before.state is TrackingState.DEGRADED and "do not tell yet whether the camera" in before.reason
    monkeypatch.setattr(refiner, "fit_camera", fit_camera)
    after = localizer.process(room[1]).estimate
    assert after.state is TrackingState.TRACKING
    assert before.covariance is not None and after.covariance is not None
    assert np.trace(before.covariance[:3, :3]) > 2.0 * np.trace(after.covariance[:3, :3])


def test_a_camera_that_is_known_to_be_right_needs_no_images(
    room_map: Any, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu", wrong_camera_percent=0.0))
    monkeypatch.setattr(localizer._refine.refiner, "fit_camera", lambda candidate: None)
    assert localizer.process(room[0]).estimate.state is TrackingState.TRACKING


@pytest.mark.parametrize(("together", "state"), [(5.0, "TRACKING"), (2.5, "DEGRADED")])
def test_for_a_moment_after_poses_of_the_map_it_is_enough_that_the_sessions_points_agree(
    room_map: Any, room: Any, together: float, state: str
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good = [localizer.process(room[k]) for k in range(3)][-1]
    assert good.estimate.alignment is not None
    alignment = replace(good.estimate.alignment, support=together, map_support=1.0)
    later = replace(good.estimate, stamp_ns=good.estimate.stamp_ns + 10**8, alignment=alignment)
    assert localizer._refine.check(room[2], good.features, later).state is TrackingState[state]
    localizer.reset("a test")
    again = localizer._refine.check(room[2], good.features, replace(later, stamp_ns=later.stamp_ns + 1))
    assert again.state is TrackingState.DEGRADED


@pytest.mark.parametrize("support", [-0.5, 1.5])
def test_a_pose_that_the_points_own_matches_hardly_support_is_not_tracking(
    room_map: Any, room: Any, support: float
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good = localizer.process(room[0])
    assert good.estimate.alignment is not None
    unsupported = replace(good.estimate, alignment=replace(good.estimate.alignment, map_support=support))
    checked = localizer._refine.check(room[0], good.features, unsupported)
    assert checked.state is TrackingState.DEGRADED and f"by {support:.1f} standard" in checked.reason
    assert checked.T_map_camera is not None


@pytest.mark.parametrize(("matching", "state"), [(6, TrackingState.DEGRADED), (13, TrackingState.TRACKING)])
def test_a_pose_that_little_of_the_image_is_for_is_not_tracking(
    room_map: Any, room: Any, monkeypatch: pytest.MonkeyPatch, matching: int, state: TrackingState
) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good = localizer.process(room[0])
    seen = Inspection(BlockMatch(14, matching, 0, (0.0, 0.0), 0.0), None, None)
    monkeypatch.setattr(localizer._refine.refiner, "inspect", lambda candidate: seen)
    checked = localizer._refine.check(room[0], good.features, replace(good.estimate, state=TrackingState.TRACKING))
    assert checked.state is state
    assert ("6 parts of the image match" in checked.reason) == (state is TrackingState.DEGRADED)


def test_a_pose_that_another_explanation_of_the_image_moves_is_as_unsure_as_that_is_likely(
    room_map: Any, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that deviates is no other camera yet; a part that moved counts by what it does to the pose."""
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good, refiner = localizer.process(room[0]), localizer._refine.refiner
    T, likely = good.estimate.T_map_camera, {"another": 0.1}
    assert T is not None
    elsewhere = T @ make_pose(np.eye(3), np.array([0.3, 0.0, 0.0]))
    loose = fitted(elsewhere, 1e-4 * np.eye(6))
    cameras = localizer._refine._check._cameras
    assert cameras is not None
    monkeypatch.setattr(refiner, "fit_camera", lambda candidate: loose)
    monkeypatch.setattr(cameras, "count_frame", lambda: True)
    monkeypatch.setattr(cameras, "add", lambda *fit: None)
    monkeypatch.setattr(cameras, "chi2_of", lambda fit: 30.0)
    monkeypatch.setattr(cameras, "another", lambda fit: likely["another"])

    def checked() -> tuple[PoseEstimate, float]:
        estimate = localizer._refine.check(room[0], good.features, good.estimate)
        assert estimate.covariance is not None
        return estimate, float(np.sqrt(np.trace(estimate.covariance[:3, :3])))

    unlikely, sigma_m = checked()
    assert "this image fits" not in unlikely.reason and 0.09 < sigma_m < 0.15
    likely["another"] = 0.9
    other, sigma_m = checked()
    assert other.state is TrackingState.DEGRADED and "this image fits" in other.reason and sigma_m > 0.3
    moved = TwoParts(1e6, 0.25, (20.0, 0.0), np.array([[0.2, 0, 0, 0, 0, 0], np.zeros(6)]))
    likely["another"], loose = 0.0, replace(fitted(T, 1e-4 * np.eye(6)), parts=moved)
    assert 0.17 < checked()[1] < 0.2


def test_the_covariance_grows_with_a_cost_beyond_the_maps_limit_but_not_at_once(room_map: Any, room: Any) -> None:
    localizer = Localizer(SceneMap.load(room_map), LocalizerConfig(device="cpu"))
    good = localizer.process(room[0])
    assert good.estimate.alignment is not None
    limit = localizer._refine.refiner.settings.max_cost

    def variance(ratio: float) -> float:
        costly = replace(good.estimate, alignment=replace(good.estimate.alignment, final_cost=ratio * limit))
        covariance = localizer._refine.check(room[0], good.features, costly).covariance
        assert covariance is not None
        return float(np.trace(covariance[:3, :3]))

    assert variance(1.001) == pytest.approx(variance(0.5), rel=0.2)
    assert variance(0.5) < variance(1.1) < 2.0 * variance(0.5) < variance(1.3) < 6.0 * variance(0.5)


def test_a_pose_that_moves_far_with_a_free_camera_scores_worse_than_one_that_stays() -> None:
    T = np.eye(4)
    near, far = np.eye(4), np.eye(4)
    near[0, 3], far[0, 3] = 0.005, 0.2
    sure, vague = 1e-4 * np.eye(6), 0.09 * np.eye(6)
    assert fit_score(T, fitted(near, sure)) < fit_score(T, fitted(far, vague)) < fit_score(T, fitted(far, sure))
    assert confidence_of({"fit_score": fit_score(T, fitted(near, sure))}) > confidence_of({}) > 0.5
    assert confidence_of({"fit_score": fit_score(T, fitted(far, sure))}) < confidence_of({})


def fitted(T: np.ndarray, covariance: np.ndarray) -> FittedCamera:
    return FittedCamera(CameraFit(np.zeros(6), np.eye(6), np.eye(4), np.eye(6), 0.1), T, covariance)


def test_evidence_against_a_pose_lowers_its_confidence() -> None:
    usual = confidence_of({})
    worse = {"cost_ratio": 1.4, "missing_share": 0.6, "camera_score": 4.0, "sigma_score": 1.0, "fit_score": 1.0}
    assert 0.5 < usual < 1.0
    assert all(confidence_of({name: value}) < usual for name, value in worse.items())
    assert confidence_of(worse) < 0.2
    assert 0.0 <= confidence_of({"camera_score": 1e6}) < 1e-6
    assert confidence_of({}, odds=0.1) < usual < confidence_of({}, odds=10.0)


def test_a_camera_that_is_not_known_counts_less_the_more_images_confirm_it() -> None:
    check = CameraCheck(CAMERA)
    before = check.moments(None, OTHER)
    score = CameraScore(np.zeros(6), np.diag([1e-6] * 2 + [0.01] * 2 + [1e-6] * 2), np.zeros((6, 6)))
    confirmed = check.moments(score, OTHER)
    assert np.sqrt(before[0, 0]) == pytest.approx(0.005)
    assert confirmed[0, 0] < 0.2 * before[0, 0]
    assert np.trace(confirmed) < 0.01 * np.trace(before)


def test_the_calibration_that_the_map_was_made_with_counts_less() -> None:
    check = CameraCheck(CAMERA)
    half = Camera(320, 240, 250.0, 250.0, 160.0, 120.0)
    same, other = (check.moments(None, given)[0, 0] for given in (half, OTHER))
    assert same == check.moments(None)[0, 0] and same < 0.1 * other


def test_calibrations_that_nearly_agree_are_of_one_camera_and_err_by_their_difference() -> None:
    check = CameraCheck(CAMERA)
    near = check.moments(None, replace(CAMERA, cx=320.6))
    assert np.sqrt(near[2, 2]) == pytest.approx(0.64, abs=0.03) and near[0, 0] == check.moments(None)[0, 0]
    far = check.moments(None, replace(CAMERA, cx=323.0))
    assert far[2, 2] > 4.0 * near[2, 2] and far[0, 0] > 10.0 * near[0, 0]


def test_an_offset_that_the_images_show_counts_in_full() -> None:
    check = CameraCheck(CAMERA)
    shown = np.array([0.01, 0.0, 0.0, 0.0, 0.0, 0.0])
    moments = check.moments(CameraScore(shown, np.diag([1e-8] * 6), np.zeros((6, 6))), OTHER)
    assert np.sqrt(moments[0, 0]) == pytest.approx(0.01, rel=0.05)


def test_the_usual_error_of_calibrations_is_an_option() -> None:
    better = CameraCheck(CAMERA, calibration_error=0.001).moments(None, OTHER)
    assert np.sqrt(better[0, 0]) == pytest.approx(0.001)


@pytest.mark.thorough
def test_the_readout_of_a_rolling_shutter_widens_poses_of_a_camera_that_moves(room_map: Any, room: Any) -> None:
    def last_covariance(readout_s: float) -> np.ndarray:
        localizer = Localizer(
            SceneMap.load(room_map), LocalizerConfig(device="cpu", rolling_shutter_readout_s=readout_s)
        )
        for k in range(3):
            estimate = localizer.process(room[k]).estimate
        assert estimate.state is TrackingState.TRACKING and estimate.covariance is not None
        return estimate.covariance

    still, rolling = last_covariance(0.0), last_covariance(0.03)
    assert (np.linalg.eigvalsh(rolling - still) > 0.0).all()
    moved = room[2].T_map_camera[:3, 3] - room[1].T_map_camera[:3, 3]
    step_s = 1e-9 * (room[2].stamp_ns - room[1].stamp_ns)
    assert (rolling - still)[0, 0] >= (0.03 * np.linalg.norm(moved) / step_s) ** 2 / 13


@pytest.mark.parametrize("is_zoomed", [False, True])
def test_an_image_with_another_calibration_is_aligned_with_the_maps_camera_too(
    room_map: Any, room: Any, is_zoomed: bool
) -> None:
    frame, factor = room[0], 1.1
    camera = frame.camera
    told = replace(camera, fx=factor * camera.fx, fy=factor * camera.fy)
    zoom = np.array([[factor, 0.0, (1 - factor) * camera.cx], [0.0, factor, (1 - factor) * camera.cy]])
    image = cv2.warpAffine(frame.image, zoom, (camera.width, camera.height)) if is_zoomed else frame.image
    loaded = SceneMap.load(room_map)
    loaded = replace(loaded, calibration=replace(loaded.calibration, camera_fit_scale=0.5))  # of rendered rooms
    localizer = Localizer(loaded, LocalizerConfig(device="cpu"))
    adapted = ImageAdapter(told, localizer.camera)(image)
    estimate = localizer.process(Frame(adapted, localizer.camera, frame.stamp_ns, 0, source_camera=told)).estimate
    cameras = localizer._refine._check._cameras
    assert cameras is not None and cameras.mapped_probability is not None
    if is_zoomed:  # it is of the camera that it comes with
        assert cameras.mapped_probability < 0.2 and estimate.state is TrackingState.TRACKING
    else:
        assert cameras.mapped_probability > 0.5 and estimate.state is TrackingState.DEGRADED
