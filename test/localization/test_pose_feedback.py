# SPDX-License-Identifier: Apache-2.0
"""The filter learns from refined poses: coarse poses get better by it, and do not speak for themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.kfnet.scoordnet import measure
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, PoseEstimate, SceneCoordinates, TrackingState


@pytest.fixture(scope="module")
def scene_map(room_map) -> SceneMap:
    return SceneMap.load(room_map)


@pytest.fixture(scope="module")
def misplaced(scene_map: SceneMap) -> SceneMap:
    """A map whose head puts everything 0.2 m aside, and whose calibration knows that it errs by as much."""
    head = copy.deepcopy(scene_map.head)
    head.centre += torch.tensor([0.2, 0.0, 0.0])
    scale = 20.0 * scene_map.calibration.measurement_variance_scale
    return replace(scene_map, head=head, calibration=replace(scene_map.calibration, measurement_variance_scale=scale))


def localize(scene_map: SceneMap, room, **options) -> list[PoseEstimate]:
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu", **options))
    return [localizer.process(room[k]).estimate for k in range(10)]


def off_m(T_map_camera: Matrix | None, frame) -> float:
    assert T_map_camera is not None
    return float(np.linalg.norm(T_map_camera[:3, 3] - frame.T_map_camera[:3, 3]))


@pytest.mark.thorough
def test_a_head_that_errs_alike_everywhere_is_corrected(misplaced: SceneMap, room) -> None:
    learning, other = localize(misplaced, room), localize(misplaced, room, pose_feedback=False)
    for run in (learning, other):
        assert {e.state for e in run} == {TrackingState.TRACKING}
        assert max(off_m(e.T_map_camera, room[k]) for k, e in enumerate(run)) < 0.03
    coarse = [
        np.median([off_m(run[k].coarse.T_map_camera, room[k]) for k in range(3, 10)]) for run in (learning, other)
    ]
    assert coarse[1] > 0.1
    assert coarse[0] < 0.5 * coarse[1]


def test_the_report_says_whether_a_refined_pose_stands_behind_the_belief(scene_map: SceneMap, room) -> None:
    confirmed = [e.filter.confirmed for e in localize(scene_map, room)]
    assert not confirmed[0] and all(confirmed[1:])
    for options in ({"pose_feedback": False}, {"recursion": "published"}):
        assert not any(e.filter.confirmed for e in localize(scene_map, room, **options))


@pytest.mark.parametrize("believes_the_measurement", [False, True])
def test_a_confirmed_belief_does_not_support_a_wrong_pose(
    scene_map: SceneMap, room, believes_the_measurement: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Belief and alignment agree on a wrong place; the image's matches are asked, for its cells do not agree."""
    frame = room[9]
    wrong = make_pose(frame.T_map_camera[:3, :3], frame.T_map_camera[:3, 3] + [0.6, 0.0, 0.0])
    features = Backbone(device="cpu").extract(frame.image)
    align, calls = Refiner.align, []

    def misled(self: Refiner, features: BackboneFeatures, starts: Sequence[Matrix], **options: float) -> Alignment:
        calls.append(starts)
        if len(calls) == 1:
            return Alignment(True, "", wrong, np.eye(6) * 1e-6, 0.3, 0.1, 0.9, 8, (0,))
        return align(self, features, starts, **options)

    monkeypatch.setattr(Refiner, "align", misled)
    measurement = measure(scene_map.head, features, scene_map.calibration)
    if believes_the_measurement:  # the cells, too, were of that wrong place
        moved = torch.tensor([0.6, 0.0, 0.0])[:, None, None]
        measurement = SceneCoordinates(measurement.mean + moved, measurement.variance, measurement.valid, 8)
    coarse = CoarsePose(True, "", wrong, np.eye(6) * 1e-4, 1400, 0.95)
    result = CoarseResult(
        frame.stamp_ns, coarse, FilterReport("", 1.0, 3.0, 0.1, confirmed=True), {}, features, None, measurement
    )
    found = Localizer(scene_map, LocalizerConfig(device="cpu")).refine_half(frame, result).estimate
    if believes_the_measurement:
        assert len(calls) == 1 and off_m(found.T_map_camera, frame) > 0.5
    else:
        assert len(calls) > 1 and off_m(found.T_map_camera, frame) < 0.05
