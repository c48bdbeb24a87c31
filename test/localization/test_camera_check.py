# SPDX-License-Identifier: Apache-2.0
"""Check of the camera by the images: what is wrong is found with its value, what is right is left alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.covariance import CHI2_6_999
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.localization.camera_check import CHI2_6_95, CameraCheck
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import CameraDoubt, CameraVerdict, sentence
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.camera_fit import (
    CameraFit,
    CameraScore,
    Correction,
    FittedCamera,
    OtherCalibration,
    calibration_offsets,
    combine,
)
from kfloc_ros.types import Frame, PoseEstimate, TrackingState

FRAMES = 24


@pytest.fixture(scope="module")
def scene_map(room_map: Any) -> SceneMap:
    """The room's map, with the scale of fits that the calibration of rendered rooms finds."""
    loaded = SceneMap.load(room_map)
    return replace(loaded, calibration=replace(loaded.calibration, camera_fit_scale=0.5))


def localized(scene_map: SceneMap, room: Any, told: Camera, **options: Any) -> tuple[Localizer, list[PoseEstimate]]:
    """Images of the room's camera, told to be another one's."""
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **options))
    adapter = ImageAdapter(told, localizer.camera)
    estimates = []
    for k in range(FRAMES):
        frame = replace(room[k], image=adapter(room[k].image), camera=adapter.target, source_camera=told)
        estimates.append(localizer.process(frame).estimate)
    return localizer, estimates


def error_m(estimate: PoseEstimate, frame: Any) -> float:
    assert estimate.T_map_camera is not None, estimate.reason
    return float(np.linalg.norm(estimate.T_map_camera[:3, 3] - frame.T_map_camera[:3, 3]))


@pytest.mark.thorough
def test_the_right_camera_is_left_alone(scene_map: SceneMap, room: Any) -> None:
    localizer, estimates = localized(scene_map, room, room.camera)
    assert {e.state for e in estimates} == {TrackingState.TRACKING} and not localizer.camera_note


@pytest.mark.thorough
def test_a_focal_length_that_is_wrong_is_named_and_its_poses_claim_less(scene_map: SceneMap, room: Any) -> None:
    told = replace(room.camera, fx=1.06 * room.camera.fx, fy=1.06 * room.camera.fy)
    _, estimates = localized(scene_map, room, told)
    last = estimates[-1]
    assert last.state is TrackingState.DEGRADED and "focal length" in last.reason
    found = float(last.reason.split(" of ")[1].split(" px")[0])
    assert found == pytest.approx(room.camera.fx, rel=0.015)
    assert f"{told.fx:.0f} px" in last.reason
    assert last.covariance is not None
    sigma_m = math.sqrt(np.trace(last.covariance[:3, :3]))
    assert error_m(last, room[FRAMES - 1]) < 3 * sigma_m


@pytest.mark.thorough
def test_a_camera_that_changes_within_a_run_is_judged_anew(scene_map: SceneMap, room: Any) -> None:
    """A driver loads its calibration late, or that of another camera arrives: what was fitted before is of no use."""
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", max_repeat_s=0.0))
    zoomed = replace(room.camera, fx=1.06 * room.camera.fx, fy=1.06 * room.camera.fy)
    said = []
    for position in range(24):
        told = zoomed if 8 <= position < 16 else room.camera
        image = ImageAdapter(told, scene_map.camera)(room[position].image)
        frame = Frame(image, scene_map.camera, room[position].stamp_ns, position, source_camera=told)
        said.append(localizer.process(frame).estimate.reason)
    assert said[:8] == [""] * 8 and said[17:] == [""] * 7
    assert all("focal length" in reason for reason in said[11:16])
    found = float(said[15].split(" of ")[1].split(" px")[0])
    assert found == pytest.approx(room.camera.fx, rel=0.03)


@pytest.mark.thorough
def test_the_camera_that_was_found_is_used_where_asked(scene_map: SceneMap, room: Any) -> None:
    told = replace(room.camera, fx=1.06 * room.camera.fx, fy=1.06 * room.camera.fy)
    _, wrong = localized(scene_map, room, told)
    localizer, right = localized(scene_map, room, told, camera_check="correct")
    assert right[-1].state is TrackingState.TRACKING and "localizing with the camera that fits" in localizer.camera_note
    assert error_m(right[-1], room[FRAMES - 1]) < 0.5 * error_m(wrong[-1], room[FRAMES - 1])


@pytest.mark.thorough
def test_halves_that_cannot_correct_only_warn(scene_map: SceneMap, room: Any) -> None:
    """``refiner_node`` sees images that ``filter_node`` has used as they are."""
    told = replace(room.camera, fx=1.06 * room.camera.fx, fy=1.06 * room.camera.fy)
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", camera_check="correct"))
    adapter = ImageAdapter(told, localizer.camera)
    for k in range(FRAMES):
        frame = replace(room[k], image=adapter(room[k].image), camera=adapter.target, source_camera=told)
        estimate = localizer.refine_half(frame, localizer.coarse_half(frame)).estimate
    assert estimate.state is TrackingState.DEGRADED and "focal length" in estimate.reason
    assert "localizing with" not in localizer.camera_note


def fit(offsets: tuple[float, ...], focal_sigma: float = 0.003) -> FittedCamera:
    sigma = np.array([focal_sigma, 0.002, 1.0, 1.0, 0.005, 0.002])
    found = CameraFit(np.pad(offsets, (0, 6 - len(offsets))), np.diag(sigma**-2.0), np.eye(4), np.eye(6), 0.1)
    return FittedCamera(found, np.eye(4), 1e-4 * np.eye(6))


def verdict_of(fits: list[FittedCamera]) -> CameraVerdict | None:
    check = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0))
    for one in fits:
        check.add(one, np.eye(4))
    return check.verdict


def test_fits_that_scatter_more_than_they_claim_decide_nothing() -> None:
    steady = verdict_of([fit((0.03, 0.0, 0.0, 0.0, 0.0))] * 8)
    assert steady is not None and steady.wrong == 0
    scattered = verdict_of([fit((0.03 + 0.1 * (-1) ** k, 0.0, 0.0, 0.0, 0.0)) for k in range(8)])
    assert scattered is not None and scattered.wrong is None


def test_a_frame_is_due_before_it_is_counted() -> None:
    check = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0))
    check._made = check._settings.window
    due = [(check.is_due, check.is_due, check.count_frame()) for _ in range(3 * check._settings.period)]
    assert all(len(set(three)) == 1 for three in due) and sum(three[0] for three in due) == 3


def test_a_few_fits_and_fits_of_few_points_decide_nothing() -> None:
    assert verdict_of([fit((0.1, 0.0, 0.0, 0.0, 0.0))] * 2) is None
    assert verdict_of([fit((0.1, 0.0, 0.0, 0.0, 0.0), focal_sigma=0.1)] * 8) is None


def told_and_fitted(offsets: tuple[float, ...]) -> CameraVerdict | None:
    """The verdict on images whose calibration has a principal point 10 px right of the map's."""
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    check = CameraCheck(camera)
    check.begin(replace(camera, cx=330.0), 0.0)
    for _ in range(8):
        check.add(fit(offsets), np.eye(4))
    return check.verdict


def test_images_that_fit_the_maps_own_calibration_better_than_theirs_are_told() -> None:
    """Fits that would allow any camera still tell one of two calibrations from the other."""
    found = told_and_fitted((0.0, 0.0, -9.0, 0.0, 0.0))
    assert found is not None and found.wrong == 2 and found.offsets[2] == pytest.approx(-10.0)
    other = told_and_fitted((0.0, 0.0, -1.0, 0.0, 0.0))
    assert other is not None and other.wrong is None


def test_a_calibration_that_may_be_wrong_widens_the_covariance_until_images_tell() -> None:
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    told, vague = (
        replace(camera, cx=330.0),
        replace(fit((0.0,) * 5).fit, information=np.diag([1e4] * 2 + [1e-4] * 2 + [1e4] * 2)),
    )
    sharp = replace(vague, information=np.diag([1e6, 1e6, 1.0, 1.0, 1e6, 1e6]))

    def sigma_px(given: Camera, one: CameraFit) -> float:
        check = CameraCheck(camera)
        check.begin(given, 0.0)
        score = CameraScore(one.offsets, np.linalg.inv(one.information), np.eye(6))
        return math.sqrt(check.moments(score, given, one)[2, 2])

    assert sigma_px(told, vague) > 4.0 > 2.5 > sigma_px(told, sharp)
    assert sigma_px(replace(camera, cx=320.1), vague) < 2.5


def test_calibrations_of_images_of_other_sizes_are_compared() -> None:
    """A map's images have sides that are rounded to whole cells, so each axis has its own scale."""
    camera = Camera(544, 352, 499.2, 484.5, 271.5, 165.4)
    full = Camera(1088, 725, 2 * 499.2, 484.5 * 725 / 352, 2 * 272.0 - 0.5, 165.9 * 725 / 352 - 0.5)
    same = calibration_offsets(full, camera)
    assert same is not None and np.abs(same).max() < 1e-6
    found = OtherCalibration.of(replace(full, fx=1.1 * full.fx, fy=1.1 * full.fy), camera)
    assert found is not None and found.offsets[:2] == pytest.approx([-math.log(1.1), 0.0], abs=1e-6)
    assert OtherCalibration.of(replace(full, height=544), camera) is None  # of other sides
    assert OtherCalibration.of(replace(full, fx=1.4 * full.fx, fy=1.4 * full.fy), camera) is None  # another lens


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ((0.0, 0.05, 0.0, 0.0, 0.0), "ratio fy/fx of 1.051, camera_info says 1.000"),
        ((0.0, 0.0, 12.0, 0.0, 0.0), "principal point of (344, 240) px, camera_info says (320, 240) px"),
        ((0.0, 0.0, 0.0, 0.0, 0.1), "k1 = +0.100"),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.04), "a skew of +0.040, as a rolling shutter"),
    ],
)
def test_the_sentence_names_both_values(offsets: tuple[float, ...], words: str) -> None:
    verdict = verdict_of([fit(offsets)] * 8)
    assert verdict is not None and verdict.wrong is not None
    told = Camera(1280, 960, 1000.0, 1000.0, 320.0, 240.0)
    assert words in sentence(verdict, told, Camera(640, 480, 500.0, 500.0, 160.0, 120.0))


def test_corrections_add_up() -> None:
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    first = Correction.of(camera, np.array([math.log(1.1), 0.0, 5.0, 0.0, 0.0, 0.0]), None)
    second = Correction.of(camera, np.array([math.log(1.02), 0.0, 0.0, 0.0, 0.01, 0.0]), first)
    assert second.adapter.source.fx == pytest.approx(500.0 * 1.1 * 1.02)
    assert second.adapter.source.distortion[0] == pytest.approx(0.01)


def test_a_map_whose_fits_scatter_doubts_a_camera_less() -> None:
    camera, offset = Camera(640, 480, 500.0, 500.0, 320.0, 240.0), np.array([0.05, 0.0, 0.0, 0.0, 0.0, 0.0])
    of_one_image = np.diag(np.array([0.006, 0.002, 1.0, 1.0, 0.005, 0.002]) ** 2)
    sure, unsure = CameraCheck(camera, fit_scale=1.0), CameraCheck(camera, fit_scale=16.0)
    assert sure.chi2(offset, of_one_image) > CHI2_6_999 > unsure.chi2(offset, of_one_image)


def poses(count: int, step_m: float) -> np.ndarray:
    T = np.tile(np.eye(4), (count, 1, 1))
    T[:, 0, 3] = step_m * np.arange(count)
    return T


def combined(offsets: list[tuple[float, ...]], step_m: float) -> tuple[np.ndarray, np.ndarray]:
    together = combine([fit(one).fit for one in offsets], poses(len(offsets), step_m), 1.0)
    assert together is not None
    return together[0], np.sqrt(np.diag(together[1]))


def test_many_images_of_one_view_tell_as_much_as_one() -> None:
    offsets = (0.02, 0.0, 0.0, 0.0, 0.0)
    _, once = combined([offsets], 0.0)
    found, still = combined([offsets] * 20, 0.0)
    _, moving = combined([offsets] * 20, 2.0)
    assert found[0] == pytest.approx(0.02)
    assert np.allclose(still, once) and np.allclose(moving, once / math.sqrt(20.0), rtol=0.05)


def test_what_hangs_on_a_single_view_is_not_certain() -> None:
    right = [(0.0, 0.0, 0.0, 0.0, 0.0)] * 5
    found, sigma = combined([*right, (0.05, 0.0, 0.0, 0.0, 0.0)], 2.0)
    assert abs(found[0]) < 2 * sigma[0]


def test_an_outlier_among_views_has_little_weight() -> None:
    found, _ = combined([(0.01, 0.0, 0.0, 0.0, 0.0)] * 8 + [(0.3, 0.0, 0.0, 0.0, 0.0)], 2.0)
    assert found[0] == pytest.approx(0.01, abs=0.005)


def doubt_after(focal: float, count: int, focal_sigma: float, step_m: float = 1.0) -> CameraDoubt:
    """What fits of one focal length and standard deviation, from several views, leave of a wrong camera."""
    check = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0), fit_scale=1.0, wrong_prior=0.1)
    for T in poses(count, step_m):
        check.add(replace(fit((focal,), focal_sigma), T_map_camera=T), T)
    return check.doubt


def test_a_wrong_camera_is_possible_until_images_exclude_it() -> None:
    before, vague, sharp = (doubt_after(0.0, *seen) for seen in ((0, 0.0), (1, 0.1), (1, 0.01)))
    assert before.probability == 0.1 and before.focal_sigma > 0.1
    assert before.probability > vague.probability > 4.0 * sharp.probability
    assert before.focal_sigma > vague.focal_sigma > 0.08 > 0.02 > sharp.focal_sigma


def test_vague_images_from_many_places_confirm_a_camera_together() -> None:
    moved_m = np.zeros((6, 6))
    moved_m[2, 0] = 2.0  # a focal length that is wrong by 10 % moves the pose by 20 cm
    one, many, still = (doubt_after(0.0, count, 0.06, step).of_pose(moved_m)[1] for count, step in SEEN)
    assert one > 0.005 > 10.0 * many
    assert still == pytest.approx(one, rel=0.01)  # images of one view tell as much as one


SEEN = ((1, 1.0), (24, 1.0), (24, 0.0))
"""Number of images, and metres between them."""


def test_a_wrong_camera_that_images_show_is_likely() -> None:
    shown = doubt_after(0.15, 1, 0.02)
    assert shown.probability > 0.9 and shown.focal_sigma == pytest.approx(0.15, rel=0.1)


def test_a_camera_that_is_never_wrong_is_not_doubted() -> None:
    never = CameraDoubt.of(0.0, 1e-6 * np.eye(6), 640, (np.full(6, 0.2), 1e-6 * np.eye(6)))
    covariance, risk = never.of_pose(np.eye(6))
    assert risk == 0.0 and not covariance.any()


def test_a_shear_that_an_image_suggests_is_as_likely_as_it_is_clear() -> None:
    """What a rolling shutter does to one image is no property of the camera, so no other image counts."""
    check = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0), fit_scale=1.0)
    none, some, much = (check.shear(None, fit((0.0, 0.0, 0.0, 0.0, 0.0, skew)).fit) for skew in (0.0, 0.012, 0.03))
    assert none is not None and some is not None and much is not None
    assert none.probability < 0.02 < 0.1 < some.probability < 0.9 < much.probability
    moved_m = np.zeros((6, 6))
    moved_m[0, 5] = 1.0
    sigmas = [math.sqrt(doubt.of_pose(moved_m)[0][0, 0]) for doubt in (none, some, much)]
    assert sigmas[0] < 2e-7  # it speaks against a shear, so what it shows of one does not count
    assert 0.003 < sigmas[1] < 0.01 < 0.025 < sigmas[2] < 0.035
    assert check.shear(None, None) is None
    steady = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0), fit_scale=1.0, wrong_prior=0.0)
    certain = steady.shear(None, fit((0.0, 0.0, 0.0, 0.0, 0.0, 0.03)).fit)
    assert certain is not None and not certain.of_pose(moved_m)[0].any()


def test_what_images_said_of_the_camera_counts_where_one_image_deviates() -> None:
    camera, deviating = Camera(640, 480, 500.0, 500.0, 320.0, 240.0), fit((0.022,))
    check = CameraCheck(camera, fit_scale=1.0)
    chi2 = check.chi2_of(deviating.fit)
    assert chi2 is not None and CHI2_6_95 < chi2 < CHI2_6_999
    first = check.another(deviating.fit)
    for k in range(8):
        check.add(fit((0.001 * (-1) ** k,)), np.eye(4))
    assert 0.1 < first < 0.9 and check.another(deviating.fit) < 0.3 * first
    assert check.another(fit((0.001,)).fit) < 0.02
    assert check.another(fit((0.1,)).fit) > 0.9  # a zoom is noticed, whatever was before
    assert check.another(fit((0.0, 0.0, 0.0, 0.0, 0.0, 0.04)).fit) > 0.9  # a shear is of this image alone
    assert CameraCheck(camera, wrong_prior=0.0).another(fit((0.1,)).fit) == 0.0
    assert check.another(replace(deviating.fit, information=np.zeros((6, 6)))) == 0.0


def test_a_zoom_after_many_images_of_the_right_camera_is_doubted_soon() -> None:
    """Fits by views apart: those of the right camera before must not outvote what the last ones show."""
    check = CameraCheck(Camera(640, 480, 500.0, 500.0, 320.0, 240.0))

    def add(focal: float, k: int, is_due: bool = True) -> None:
        at = make_pose(np.eye(3), np.array([0.5 * k, 0.0, 0.0]))
        check.add(replace(fit((focal,)), T_map_camera=at), at, is_due)

    for k in range(40):
        add(0.002 * (-1) ** k, k)
    verdict, before = check.verdict, check.doubt.probability
    assert before < 0.002
    for k in range(40, 44):
        add(0.1, k, is_due=False)  # images that look suspicious are fitted at once
    assert check.doubt.probability > 0.5 and check.doubt.focal_sigma == pytest.approx(0.1, rel=0.1)
    assert check.verdict is verdict  # but are no fair sample of the camera
    for k in range(44, 52):
        add(0.002 * (-1) ** k, k)
    assert check.doubt.probability < 0.01


def test_fits_of_another_camera_do_not_confirm_this_one() -> None:
    camera = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
    check = CameraCheck(camera, wrong_prior=0.1)
    check.begin(camera, 0.0)
    check.add(fit((0.0,)), np.eye(4))
    assert check.doubt.probability < 0.01
    check.begin(replace(camera, fx=550.0, fy=550.0), 0.0)
    assert check.doubt.probability == 0.1
