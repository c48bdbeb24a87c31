# SPDX-License-Identifier: Apache-2.0
"""The search of the map: finds the view, the pose without a prior, and admits it when two places look alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.optimizer import RefinerSettings
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.pixloc.refiner import Refiner, failed_alignment
from kfloc_ros.relocalization.decision import RelocalizationSettings, choose, has_more_support, realigned
from kfloc_ros.relocalization.evidence import VERIFYING_VIEWS, Evidence
from kfloc_ros.relocalization.matching import ImageMatches
from kfloc_ros.relocalization.retrieval import ReferenceIndex
from kfloc_ros.relocalization.search import Relocalizer
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, TrackingState

NO_COARSE_POSE = CoarsePose(False, "too few inliers", None, None, 0, 0.0)
NOT_FOUND = failed_alignment("nothing")
FILTER_OFF = FilterReport("off", 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def scene_map(room_map) -> SceneMap:
    return SceneMap.load(room_map)


@pytest.fixture(scope="module")
def features(scene_map: SceneMap, room) -> BackboneFeatures:
    return Backbone(device="cpu").extract(room[9].image)


def away(T: Matrix, frame) -> float:
    return float(np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3]))


def aligning(scene_map: SceneMap, features: BackboneFeatures) -> Callable[[Sequence[Matrix]], Alignment]:
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings())
    return lambda starts: refiner.align(features, starts, max_cost=0.28)


def twice(references: ReferenceViews, shift_m: float) -> ReferenceViews:
    """The same place again, elsewhere."""
    poses = references.T_map_camera.copy()
    poses[:, 0, 3] += shift_m
    offset = torch.tensor([shift_m, 0.0, 0.0])
    views = tuple(replace(view, points=view.points + offset) for view in references.views)
    ids = tuple(i + 1000 for i in references.ids)
    return ReferenceViews(
        references.ids + ids, np.concatenate([references.T_map_camera, poses]), references.views + views
    )


def test_the_view_most_alike_is_near(scene_map: SceneMap, features: BackboneFeatures, room) -> None:
    best, *others = ReferenceIndex(scene_map.references).search(features, 3)
    centres = scene_map.references.T_map_camera[:, :3, 3]
    distance = np.linalg.norm(centres - room[9].T_map_camera[:3, 3], axis=1)
    assert distance[best.position] <= np.median(distance)
    assert best.votes > 0 and all(best.votes >= other.votes for other in others)


def test_an_index_compares_each_image_anew(scene_map: SceneMap, features: BackboneFeatures, room) -> None:
    """What is kept of the last image changes nothing, neither for it nor for another one."""
    other, among = Backbone(device="cpu").extract(room[2].image), [4, 2, 0]
    index = ReferenceIndex(scene_map.references)
    for image, views in ((features, among), (features, None), (other, among), (features, among)):
        assert index.search(image, 3, views) == ReferenceIndex(scene_map.references).search(image, 3, views)


def test_no_more_views_are_returned_than_there_are(scene_map: SceneMap, features: BackboneFeatures) -> None:
    count = len(scene_map.references.ids)
    found = ReferenceIndex(scene_map.references).search(features, 10 * count)
    assert sorted(item.position for item in found) == list(range(count))


def test_a_pose_is_found_from_the_image_alone(scene_map: SceneMap, features: BackboneFeatures, room) -> None:
    found = Relocalizer(scene_map.references, scene_map.camera).find(features, aligning(scene_map, features))
    assert found.success and away(found.T_map_camera, room[9]) < 0.03


def test_an_image_of_elsewhere_has_no_start(scene_map: SceneMap) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (scene_map.camera.height, scene_map.camera.width, 3))
    features = Backbone(device="cpu").extract(noise.astype(np.uint8))
    found = Relocalizer(scene_map.references, scene_map.camera).find(features, aligning(scene_map, features))
    assert not found.success and found.reason


def stage_result(scene_map: SceneMap, room, features: BackboneFeatures, coarse: CoarsePose = NO_COARSE_POSE, **options):
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **options))
    return localizer.refine_half(room[9], CoarseResult(room[9].stamp_ns, coarse, FILTER_OFF, {}, features)).estimate


def test_the_refiner_searches_when_there_is_no_coarse_pose(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    found = stage_result(scene_map, room, features)
    assert found.state is TrackingState.TRACKING and away(found.T_map_camera, room[9]) < 0.03
    assert stage_result(scene_map, room, features, relocalize=False).T_map_camera is None


def test_the_search_does_not_ask_for_what_views_near_the_mapped_ones_cost(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    strict = replace(scene_map, calibration=replace(scene_map.calibration, max_alignment_cost=1e-4))
    found = stage_result(strict, room, features)
    # DEGRADED, since the confidence does ask for it: here the cost is hundreds of times the limit
    assert found.alignment is not None and found.alignment.success and away(found.T_map_camera, room[9]) < 0.03


def test_the_refiner_searches_when_the_coarse_pose_is_refused(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    wrong = room[9].T_map_camera @ np.diag([-1.0, 1.0, -1.0, 1.0])  # looks the other way
    coarse = CoarsePose(True, "", wrong, np.eye(6), 100, 0.5)
    found = stage_result(scene_map, room, features, coarse)
    assert found.state is TrackingState.TRACKING and away(found.T_map_camera, room[9]) < 0.03


def test_two_places_that_look_alike_are_not_guessed(scene_map: SceneMap, features: BackboneFeatures, room) -> None:
    doubled = replace(scene_map, references=twice(scene_map.references, 30.0))
    found = stage_result(doubled, room, features)
    assert found.T_map_camera is None and "two places look alike" in found.reason


def test_nothing_is_searched_while_tracking(
    scene_map: SceneMap, features: BackboneFeatures, room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(self: Relocalizer, *args: object) -> Alignment:
        raise AssertionError("the map was searched")

    monkeypatch.setattr(Relocalizer, "find", searched)
    coarse = CoarsePose(True, "", room[9].T_map_camera, np.eye(6), 100, 0.5)
    estimate = stage_result(scene_map, room, features, coarse)
    assert estimate.state is TrackingState.TRACKING and "relocalize" not in estimate.timings_ms


def test_a_covered_camera_is_searched_now_and_then_and_found_with_its_first_image(scene_map: SceneMap, room) -> None:
    localizer, seen = Localizer(scene_map, LocalizerConfig(device="cpu")), room[9]
    assert localizer.process(seen).estimate.T_map_camera is not None
    random = np.random.default_rng(0)
    searches = []
    for tenths in range(1, 11):
        noise = random.integers(0, 30, seen.image.shape, dtype=np.uint8)
        covered = replace(seen, image=noise, stamp_ns=seen.stamp_ns + tenths * 100_000_000)
        estimate = localizer.process(covered).estimate
        assert estimate.T_map_camera is None or estimate.bridged
        searches.append("relocalize" in estimate.timings_ms)
    assert sum(searches) <= 3
    again = localizer.process(replace(seen, stamp_ns=seen.stamp_ns + 1_100_000_000)).estimate
    assert again.T_map_camera is not None and away(again.T_map_camera, seen) < 0.03


def shifted(T: Matrix, x_m: float, turn_deg: float = 0.0) -> Matrix:
    return T @ make_pose(so3_exp([0.0, np.radians(turn_deg), 0.0]), [x_m, 0.0, 0.0])


def test_matches_agree_with_the_right_pose_and_contradict_others(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    matches = Relocalizer(scene_map.references, scene_map.camera).matches(features)
    truth = room[9].T_map_camera
    views = scene_map.references.best_overlapping(truth, scene_map.camera, 3)
    assert matches.agreement(truth, views) > 0.5 and matches.lightglue_agreement(truth, views) > 0.5
    right = matches.supporting(truth)
    assert right.sum() > 30
    for wrong in (shifted(truth, 0.5), shifted(truth, 0.0, 20.0)):
        assert matches.agreement(wrong, views) < 0.2 and matches.lightglue_agreement(wrong, views) < 0.2
        assert matches.supporting(wrong).sum() < 0.3 * right.sum() and len(matches.supporting(wrong)) == len(right)
    assert matches.agreement(truth @ np.diag([-1.0, 1.0, -1.0, 1.0]), views) == 0.0  # nothing is in view there


def alignment_at(T: Matrix, cost: float = 0.1, reason: str = "") -> Alignment:
    return Alignment(not reason, reason, T, np.eye(6) * 1e-6, 0.3, cost, 0.9, 8, (0,))


def nowhere(starts: Sequence[Matrix]) -> Alignment:
    return failed_alignment("no")


def test_an_alignment_that_only_looks_right_is_doubted(scene_map: SceneMap, features: BackboneFeatures, room) -> None:
    relocalize, truth = Relocalizer(scene_map.references, scene_map.camera), room[9].T_map_camera

    def doubt(T: Matrix, expected: Matrix | None = None) -> str:
        return relocalize.examine(features, nowhere, alignment_at(T), expected).reason

    assert doubt(truth) == ""
    assert doubt(truth, shifted(truth, 0.05)) == ""
    assert "matches agree" in doubt(shifted(truth, 0.6))
    assert "predicted" in doubt(truth, shifted(truth, 0.4))


def test_more_is_asked_where_no_frame_before_speaks_for_an_alignment(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    truth = room[9].T_map_camera
    settings = RelocalizationSettings(certain_agreement=1.01)
    relocalize = Relocalizer(scene_map.references, scene_map.camera, settings)
    assert relocalize.examine(features, nowhere, alignment_at(truth), truth).success
    assert not relocalize.examine(features, nowhere, alignment_at(truth)).success


def test_the_matches_lead_an_alignment_out_of_the_wrong_valley(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    truth = room[9].T_map_camera
    relocalize, align = Relocalizer(scene_map.references, scene_map.camera), aligning(scene_map, features)
    beside = alignment_at(shifted(truth, 0.2, 2.0), cost=0.25)
    found = relocalize.examine(features, align, beside, truth)
    assert found.success and found.final_cost < 0.25 and away(found.T_map_camera, room[9]) < 0.03
    cheaper = alignment_at(shifted(truth, 0.02), cost=1e-4)  # what costs less stays, if the matches agree
    assert relocalize.examine(features, align, cheaper, truth).final_cost == 1e-4


def test_a_doubted_alignment_is_asked_again_by_the_search(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    truth = room[9].T_map_camera
    blind = RelocalizationSettings(
        min_inliers=10**6, min_matched_inliers=10**6
    )  # the matches give no pose to start from
    relocalize, align = Relocalizer(scene_map.references, scene_map.camera, blind), aligning(scene_map, features)
    assert not relocalize.find(features, align).success
    found = relocalize.find(features, align, likely=[shifted(truth, 0.05)])
    assert found.success and away(found.T_map_camera, room[9]) < 0.03


def test_where_the_camera_was_expected_the_matches_say_which_alignment_slid(
    scene_map: SceneMap, features: BackboneFeatures, room
) -> None:
    truth = room[9].T_map_camera
    slid = shifted(truth, 0.3)
    relocalize = Relocalizer(
        scene_map.references, scene_map.camera, RelocalizationSettings(certain_agreement=2.0, near_agreement=0.0)
    )
    made = {0: alignment_at(slid, cost=0.1), 1: alignment_at(truth, cost=0.2)}
    calls: list[int] = []

    def align(starts: Sequence[Matrix]) -> Alignment:
        calls.append(1)
        return made.get(len(calls) - 1, failed_alignment("no"))

    found = relocalize.find(features, align, slid, [slid, truth])
    assert found.success and found.final_cost == 0.2 and away(found.T_map_camera, room[9]) < 0.03


def test_the_refiner_finds_the_way_back_from_a_wrong_local_minimum(
    scene_map: SceneMap, features: BackboneFeatures, room, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = shifted(room[9].T_map_camera, 0.6)
    align, calls = Refiner.align, []

    def misled(self: Refiner, features: BackboneFeatures, starts: Sequence[Matrix], **options: float) -> Alignment:
        calls.append(starts)
        return alignment_at(wrong) if len(calls) == 1 else align(self, features, starts, **options)

    monkeypatch.setattr(Refiner, "align", misled)
    found = stage_result(scene_map, room, features)
    assert len(calls) > 1 and found.state is TrackingState.TRACKING and away(found.T_map_camera, room[9]) < 0.03


def test_where_the_camera_was_expected_less_is_asked_for() -> None:
    settings, here = RelocalizationSettings(), np.eye(4)
    dear, far = alignment_at(shifted(here, 0.1), cost=0.27), alignment_at(shifted(here, 3.0), cost=0.25)
    assert not choose([dear], settings).success
    assert choose([dear], settings, expected=here) is dear
    assert choose([dear, far], settings) is far
    assert choose([dear, far], settings, expected=here) is dear
    clearly = alignment_at(shifted(here, 3.0), cost=0.1)
    assert choose([dear, clearly], settings, expected=here) is clearly


def speaking(count: int, first: int = 0) -> NDArray[np.bool_]:
    return np.isin(np.arange(300), np.arange(first, first + count))


def test_more_matches_count_only_beyond_chance() -> None:
    settings = RelocalizationSettings()
    assert has_more_support(speaking(120), speaking(60), settings)
    assert not has_more_support(speaking(110), speaking(100), settings)  # not by the margin
    assert has_more_support(speaking(24), speaking(15), settings)  # the same ones, and others
    assert not has_more_support(speaking(24), speaking(15, 100), settings)  # of 39 with one place each, 24
    assert not has_more_support(speaking(0), speaking(0), settings)


def test_an_alignment_is_repeated_and_the_better_kept() -> None:
    first, better = alignment_at(np.eye(4), 0.2), alignment_at(shifted(np.eye(4), 0.1), 0.15)
    assert realigned(lambda starts: better, first) is better
    assert realigned(lambda starts: first, better) is better
    failed = alignment_at(np.eye(4), reason="failed")
    assert realigned(lambda starts: better, failed) is failed and realigned(lambda starts: failed, first) is first


@pytest.mark.parametrize("supporting, asked", [(9, 0), (10, 1)])
def test_no_more_lightglue_matches_are_made_for_what_no_match_supports(
    scene_map: SceneMap, supporting: int, asked: int
) -> None:
    class Few:
        def __init__(self) -> None:
            self.asked = 0

        def agreement(self, T: Matrix, views: Sequence[int]) -> float:
            return 0.01

        def supporting(self, T: Matrix) -> NDArray[np.bool_]:
            return np.arange(100) < supporting

        def lightglue_agreement(self, T: Matrix, views: Sequence[int]) -> float:
            self.asked += 1
            return 1.0

    few, settings = Few(), RelocalizationSettings()
    evidence = Evidence(scene_map.references, scene_map.camera, settings, few, lambda starts: NOT_FOUND)  # type: ignore[arg-type]
    found = replace(NOT_FOUND, success=True, T_map_camera=scene_map.references.T_map_camera[0])
    verified = evidence.verified(found, settings.min_agreement, with_lightglue=True)
    assert few.asked == asked and verified.success == bool(asked)


def test_lightglue_begins_with_the_views_nearest_to_the_likeliest_pose(
    scene_map: SceneMap, features: BackboneFeatures, room, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = ImageMatches.lightglue
    monkeypatch.setattr(ImageMatches, "lightglue", lambda self, k: asked.append(k) or real(self, k))

    def views(agreement: float, **options) -> set[int]:
        asked.clear()
        monkeypatch.setattr(ImageMatches, "agreement", lambda *_: agreement)
        relocalizer = Relocalizer(scene_map.references, scene_map.camera, RelocalizationSettings(**options))
        found = relocalizer.find(features, aligning(scene_map, features))
        assert found.success and away(found.T_map_camera, room[9]) < 0.05
        return set(asked)

    near = set(scene_map.references.best_overlapping(room[9].T_map_camera, scene_map.camera, VERIFYING_VIEWS))
    assert not views(agreement=0.5)  # certain by mutual nearest neighbours alone
    assert views(agreement=0.35) == near  # in the mean with LightGlue's
    assert len(views(agreement=0.35, certain_agreement=0.69)) > len(near)
