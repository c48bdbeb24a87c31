# SPDX-License-Identifier: Apache-2.0
"""Tracking without coarse poses: as good as with them, checked by them, and left with any doubt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.evaluation.metrics import pose_errors
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.tracking import ConstantVelocity, FirstPoses, Rivals, Support, Track, TrackSettings
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Alignment, CoarsePose, PoseEstimate, TrackingState

POSE = make_pose(so3_exp([0.1, 0.4, -0.2]), [1.0, 2.0, 3.0])
SIGMA_2 = np.diag([0.02**2] * 3 + [0.01**2] * 3)


def aligned(T: np.ndarray = POSE, cost: float = 0.1, reason: str = "") -> Alignment:
    return Alignment(not reason, reason, T, SIGMA_2 / 100, 0.2, cost, 0.9, 8, (0,))


def coarse(T: np.ndarray = POSE) -> CoarsePose:
    return CoarsePose(True, "", T, SIGMA_2, 500, 0.8)


def moved(x_m: float, turn_deg: float = 0.0) -> np.ndarray:
    return POSE @ make_pose(so3_exp([0, np.radians(turn_deg), 0]), [x_m, 0, 0])


def test_a_track_begins_with_agreement_and_is_checked_in_time() -> None:
    track = Track(TrackSettings(check_period=4))
    assert not track.holds
    assert track.check(aligned(), coarse())
    tracked = 0
    while track.holds:
        assert track.contradiction(aligned(), POSE) == ""
        tracked += 1
    assert tracked == 3
    assert track.check(aligned(), coarse()) and track.holds
    assert not track.check(aligned(moved(0.3)), coarse())  # 15 sigma away
    assert not track.holds
    failed = CoarsePose(False, "none", None, None, 0, 0.0)
    assert not track.check(aligned(), failed)


@pytest.mark.parametrize(
    ("alignment", "predicted", "words"),
    [
        (aligned(), moved(0.3), "wrong by 0.30 m"),
        (aligned(), moved(0.0, 9.0), "9.0 deg"),
        (aligned(cost=0.2), POSE, "less like the map"),
        (aligned(reason="out of view"), POSE, "out of view"),
    ],
)
def test_any_doubt_ends_a_track(alignment: Alignment, predicted: np.ndarray, words: str) -> None:
    track = Track()
    track.check(aligned(), coarse())
    assert words in track.contradiction(alignment, predicted)
    assert not track.holds


def test_constant_velocity_goes_on_as_before() -> None:
    motion = ConstantVelocity(max_gap_s=0.5)
    assert motion.predict(0) is None
    step = make_pose(so3_exp([0.0, 0.02, 0.01]), [0.03, 0.0, 0.01])
    motion.observe(0, POSE)
    motion.observe(100_000_000, POSE @ step)
    assert np.allclose(motion.predict(200_000_000), POSE @ step @ step)
    assert motion.predict(700_000_000) is None


@pytest.fixture(scope="module")
def scene_map(room_map) -> SceneMap:
    return SceneMap.load(room_map)


def localizer(scene_map: SceneMap, **options) -> Localizer:
    return Localizer(scene_map, LocalizerConfig(device="cpu", tracking=True, **options))


def error_m(estimate: PoseEstimate, frame) -> float:
    assert estimate.T_map_camera is not None
    return float(np.linalg.norm(estimate.T_map_camera[:3, 3] - frame.T_map_camera[:3, 3]))


def test_most_frames_do_without_a_coarse_pose(scene_map: SceneMap, room) -> None:
    frames = [room[i] for i in range(12)]
    tracking = localizer(scene_map, tracking_check_period=5)
    estimates = [tracking.process(frame).estimate for frame in frames]
    assert {e.state for e in estimates} == {TrackingState.TRACKING}
    assert [e.tracked for e in estimates] == [i % 5 != 0 for i in range(12)]
    for estimate in estimates:
        assert (estimate.coarse is None) == estimate.tracked
        assert ("pnp" in estimate.timings_ms) != estimate.tracked
        assert estimate.covariance is not None
    assert np.median([error_m(e, f) for e, f in zip(estimates, frames, strict=True)]) < 0.01


def test_the_filter_is_brought_up_to_date_before_a_coarse_pose(scene_map: SceneMap, room) -> None:
    """Eight frames at 10 Hz are longer than its greatest gap: without the frame just before it would start anew."""
    tracking = localizer(scene_map, tracking_check_period=8)
    last = [tracking.process(room[i]).estimate for i in range(9)][-1]
    assert last.filter is not None and not last.tracked
    assert last.filter.reset_reason == ""
    assert last.filter.prior_ratio > 0.3


@pytest.mark.thorough
def test_a_covered_lens_and_another_place_end_the_track(scene_map: SceneMap, room) -> None:
    blank = np.zeros_like(room[2].image)
    elsewhere = replace(room[22], stamp_ns=room[5].stamp_ns)  # carried there between two frames
    frames = [room[0], room[1], replace(room[2], image=blank), room[3], room[4], elsewhere]
    tracking = localizer(scene_map)
    estimates = [tracking.process(frame).estimate for frame in frames]
    assert [e.tracked for e in estimates] == [False, True, False, False, True, False]
    assert estimates[2].bridged and estimates[2].state is TrackingState.DEGRADED
    assert estimates[2].timings_ms["total"] == pytest.approx(
        sum(v for k, v in estimates[2].timings_ms.items() if k != "total")
    )
    assert error_m(estimates[5], elsewhere) < 0.02


def test_a_suggested_pose_and_a_reset_are_answered_with_a_coarse_pose(scene_map: SceneMap, room) -> None:
    tracking = localizer(scene_map)
    assert [tracking.process(room[i]).estimate.tracked for i in range(2)] == [False, True]
    assert not tracking.process(room[2], [room[2].T_map_camera]).estimate.tracked
    assert tracking.process(room[3]).estimate.tracked
    tracking.reset("asked")
    assert not tracking.process(room[4]).estimate.tracked


def test_frames_without_a_coarse_pose_are_not_coarse_failures() -> None:
    found = FrameRecord(0, 0, POSE, estimate=POSE, coarse=POSE)
    tracked = FrameRecord(1, 1, POSE, estimate=POSE, tracked=True)
    failed = FrameRecord(2, 2, POSE)
    records = [found, tracked, failed]
    assert [e.translation_m for e in pose_errors(records)] == [0.0, 0.0, np.inf]
    assert [e.translation_m for e in pose_errors(records, coarse=True)] == [0.0, np.inf]


def test_a_wrong_place_is_left_at_the_next_check(scene_map: SceneMap, room) -> None:
    """A track that somehow holds a wrong pose is put right by the coarse pose, whatever the prediction says."""
    tracking = localizer(scene_map, tracking_check_period=2)
    tracking.process(room[0])
    wrong = room[0].T_map_camera @ make_pose(so3_exp([0.0, 0.3, 0.0]), [0.4, 0.0, 0.0])
    tracking._refine._motion.observe(room[0].stamp_ns + 1, wrong)  # as if it had been aligned there
    estimates = [tracking.process(room[i]).estimate for i in (1, 2, 3)]
    assert error_m(estimates[-1], room[3]) < 0.02


def test_a_jump_is_no_motion_that_goes_on() -> None:
    motion = ConstantVelocity(1.0)
    motion.observe(0, POSE)
    motion.observe(100_000_000, moved(0.1))
    predicted = motion.predict(200_000_000)
    assert predicted is not None and np.allclose(predicted, moved(0.2))
    motion.observe(200_000_000, moved(5.0))
    predicted = motion.predict(300_000_000)
    assert predicted is not None and np.allclose(predicted, moved(5.0))


def missing(first: FirstPoses, number: int, x_m: float = 0.0, confidence: float = 0.5) -> int:
    return first.missing(number * 10**8, moved(x_m), confidence)


def test_first_poses_wait_for_others_that_agree() -> None:
    first = FirstPoses(3)
    assert [missing(first, n, 0.1 * n) for n in range(5)] == [2, 1, 0, 0, 0]
    assert missing(first, 5, 4.0) == 2, "a pose somewhere else begins anew"
    assert missing(first, 6, 4.1) == 1 and missing(first, 100, 4.1) == 2, "too long ago"
    first.reset()
    assert missing(first, 101, 4.1) == 2


def test_a_certain_first_pose_waits_for_none_and_one_is_enough_if_asked() -> None:
    first = FirstPoses(2)
    assert missing(first, 0, confidence=0.95) == 0 and missing(first, 1, 0.1) == 0
    assert missing(FirstPoses(1), 0, confidence=0.1) == 0


def test_after_poses_of_the_map_this_sessions_points_may_stand_in_for_a_second() -> None:
    support, tenths = Support(), 10**8
    own = replace(aligned(), support=5.0, map_support=5.0)
    good = PoseEstimate(0, TrackingState.TRACKING, "", T_map_camera=POSE, alignment=own)

    def judged(stamp: int, is_certain: bool = True, x_m: float = 0.0) -> PoseEstimate:
        weak = replace(own, map_support=1.5)
        unsupported = replace(good, stamp_ns=stamp * tenths, T_map_camera=moved(x_m), alignment=weak)
        estimate = support.judged(unsupported, None, is_certain)
        assert estimate.refined_pose is None, "it never corrects the belief"
        assert estimate.held or "by 1.5 standard deviations" in estimate.reason
        return estimate

    for stamp in (10, 11, 12):
        assert not judged(stamp).held, "one or two may be wrong"
        assert support.judged(replace(good, stamp_ns=stamp * tenths), None, True).refined_pose is not None
        support.observe(replace(good, stamp_ns=stamp * tenths))
    assert judged(13).held and judged(22, x_m=0.3).held and not judged(13, is_certain=False).held
    assert not judged(13, x_m=0.6).held, "no camera moves so far at once"
    assert not judged(12).held and not judged(23).held
    support.observe(judged(20))
    support.observe(judged(20, is_certain=False))
    assert not judged(23).held, "one that is held confirms nothing"
    support.observe(replace(good, stamp_ns=29 * tenths))
    assert judged(30).held and not judged(32).held, "the others are too long ago"
    support.reset()
    assert not judged(30).held


FAR = make_pose(so3_exp([0.0, 0.0, 1.0]), [30.0, 0.0, 0.0])


def weighed(rivals: Rivals, costs: list[tuple[float, float]], step_m: float = 0.2) -> list[int | None]:
    """Submaps that took over, image by image, for costs in the chosen submap and in its rival."""
    taken = []
    for n, (own, other) in enumerate(costs):
        T = moved(step_m * n)

        def align(submap: int, start: np.ndarray, T: np.ndarray = T, other: float = other) -> Alignment:
            assert submap == 7 and np.allclose(start, FAR @ T)
            return aligned(start, other, "" if other < 0.25 else "too costly")

        found = rivals.weigh(T, own, align)
        taken.append(None if found is None else found[0])
    return taken


def begun() -> Rivals:
    rivals = Rivals()
    rivals.begin(moved(-1.0), [(7, aligned(FAR @ moved(-1.0), 0.11))])
    return rivals


def test_images_that_fit_a_rival_better_decide_for_it_and_not_at_the_first_look() -> None:
    rivals = begun()
    assert weighed(rivals, [(0.20, 0.10)]) == [None] and rivals.likelier == 7
    assert weighed(begun(), [(0.20, 0.10)] * 3) == [None, 7, None]
    mixed = begun()
    assert weighed(mixed, [(0.20, 0.10), (0.10, 0.20), (0.10, 0.20)]) == [None] * 3 and mixed.likelier is None


def test_a_rival_that_the_images_refute_is_dropped() -> None:
    rivals = begun()
    assert weighed(rivals, [(0.10, 0.30)] * 3) == [None] * 3
    assert weighed(rivals, [(0.30, 0.10)] * 5) == [None] * 5 and rivals.likelier is None


def test_images_of_one_view_count_once() -> None:
    rivals = begun()
    assert weighed(rivals, [(0.20, 0.10)] * 5, step_m=0.01) == [None] * 5 and rivals.likelier == 7
