# SPDX-License-Identifier: Apache-2.0
"""Points that other views find elsewhere lose confidence; those that other views do not see keep theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping.point_evidence import EvidenceSettings, PointEvidence
from kfloc_ros.mapping.views import View
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, extract_reference_points
from kfloc_ros.types import Frame

BACKBONE = Backbone(device=torch.device("cpu"))


def view_of(frame: Frame) -> View:
    assert frame.depth_m is not None and frame.T_map_camera is not None
    return View(frame.image, frame.depth_m, frame.camera, frame.T_map_camera, frame.index)


def points_of(frame: Frame) -> ReferencePoints:
    view = view_of(frame)
    features = BACKBONE.extract(view.image)
    return extract_reference_points(features, view.depth_m, view.camera, view.T_map_camera, 300)


def references_of(frame: Frame, points: ReferencePoints) -> ReferenceViews:
    assert frame.T_map_camera is not None
    return ReferenceViews((frame.index,), frame.T_map_camera[None], (points,))


def evidence_of(frames: list[Frame], settings: EvidenceSettings | None = None) -> PointEvidence:
    evidence = PointEvidence(frames[0].camera, settings)
    for frame in frames:
        evidence.add(view_of(frame), BACKBONE.extract(frame.image))
    return evidence


@pytest.fixture(scope="module")
def frames(room: FrameSource) -> list[Frame]:
    return [room[position] for position in range(0, 30, 3)]


def factors(evidence: PointEvidence, frame: Frame, points: ReferencePoints) -> np.ndarray:
    weighed = evidence.weighed(references_of(frame, points)).views[0]
    assert torch.equal(weighed.points, points.points) and torch.equal(weighed.coarse, points.coarse)
    return (weighed.confidence / points.confidence).numpy()


def test_points_that_others_find_elsewhere_lose_confidence(frames: list[Frame]) -> None:
    frame = frames[3]
    assert frame.T_map_camera is not None
    points, aside = points_of(frame), torch.from_numpy(0.06 * frame.T_map_camera[:3, 0]).float()
    wrong = torch.arange(len(points)) % 4 == 0
    placed = torch.where(wrong[:, None], points.points + aside, points.points)
    factor = factors(evidence_of(frames), frame, replace(points, points=placed))
    assert factor.min() > 0 and factor.max() <= 1
    assert np.median(factor[~wrong.numpy()]) > 5 * np.median(factor[wrong.numpy()])


def test_points_that_no_other_view_shows_all_keep_the_same_share(frames: list[Frame]) -> None:
    frame, settings = frames[3], EvidenceSettings()
    unseen = settings.prior_agreeing**2 / settings.prior_found**2
    alone = factors(evidence_of([frame]), frame, points_of(frame))  # the only view is the reference itself
    assert alone == pytest.approx(unseen)
    hidden = [replace(f, depth_m=np.full_like(f.depth_m, 0.2)) for f in frames]  # something close to every other camera
    assert factors(evidence_of(hidden), frame, points_of(frame)) == pytest.approx(unseen)


def test_a_long_recording_is_thinned_evenly(frames: list[Frame]) -> None:
    evidence = evidence_of(frames * 3, EvidenceSettings(max_views=8))
    kept = evidence._images
    assert 4 <= len(kept) <= 8
    order = [frames[k % len(frames)].T_map_camera for k in range(3 * len(frames))]
    step = evidence._step
    assert [image.T_map_camera is order[k * step] for k, image in enumerate(kept)] == [True] * len(kept)


def test_no_view_changes_nothing(frames: list[Frame]) -> None:
    references = references_of(frames[0], points_of(frames[0]))
    assert PointEvidence(frames[0].camera).weighed(references) is references
