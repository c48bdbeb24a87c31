# SPDX-License-Identifier: Apache-2.0
"""Points get their depths from other views; those found elsewhere lose confidence, those not seen keep theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.point_depths import DepthSettings
from kfloc_ros.mapping.point_evidence import EvidenceSettings, PointEvidence
from kfloc_ros.mapping.views import View
from kfloc_ros.pixloc.patches import with_patches
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


def evidence_of(
    frames: list[Frame], settings: EvidenceSettings | None = None, depths: DepthSettings | None = None
) -> PointEvidence:
    evidence = PointEvidence(frames[0].camera, settings, depths)
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
    kept = evidence._images.items
    assert 4 <= len(kept) <= 8
    order = [frames[k % len(frames)].T_map_camera for k in range(3 * len(frames))]
    step = evidence._images.step
    assert [image.T_map_camera is order[k * step] for k, image in enumerate(kept)] == [True] * len(kept)


def test_no_view_changes_nothing(frames: list[Frame]) -> None:
    references = references_of(frames[0], points_of(frames[0]))
    assert PointEvidence(frames[0].camera).weighed(references) is references


@pytest.fixture(scope="module")
def all_frames(room: FrameSource) -> list[Frame]:
    return [room[position] for position in range(0, 40)]


def with_patches_of(frame: Frame) -> ReferencePoints:
    assert frame.T_map_camera is not None
    return with_patches(points_of(frame), frame.image, frame.camera, frame.T_map_camera)


def at_other_depths(points: ReferencePoints, frame: Frame, factor: torch.Tensor) -> ReferencePoints:
    assert frame.T_map_camera is not None
    centre = torch.from_numpy(frame.T_map_camera[:3, 3])
    return replace(points, points=(centre + (points.points - centre) * factor[:, None]).float())


def placed(frames: list[Frame], number: int, points: ReferencePoints) -> ReferencePoints | None:
    """Return the points with depths by the other frames; None if these do not tell them."""
    references = references_of(frames[number], points)
    found = evidence_of(frames, depths=SETTINGS).placed(references)
    return None if found is references else found.views[0]


SETTINGS = DepthSettings(min_points=30)


def test_wrong_depths_are_found_by_other_views(all_frames: list[Frame]) -> None:
    points = with_patches_of(all_frames[12])
    factor = 1 + 0.03 * torch.sin(torch.arange(len(points)))
    found = placed(all_frames, 12, at_other_depths(points, all_frames[12], factor))
    assert found is not None
    before = (at_other_depths(points, all_frames[12], factor).points - points.points).norm(dim=1)
    after = (found.points - points.points).norm(dim=1)
    moved = found.points.ne(at_other_depths(points, all_frames[12], factor).points).any(dim=1)
    assert moved.float().mean() > 0.3
    assert after[moved].median() < 0.35 * before[moved].median()
    assert torch.equal(found.confidence, points.confidence)


def test_depths_stay_and_patches_go_where_poses_contradict_each_other(all_frames: list[Frame]) -> None:
    rng = np.random.default_rng(3)
    points = with_patches_of(all_frames[12])
    drifting = []
    for frame in all_frames:
        assert frame.T_map_camera is not None
        off = make_pose(so3_exp(rng.normal(0, np.radians(1.5), 3)), rng.normal(0, 0.03, 3))
        drifting.append(replace(frame, T_map_camera=frame.T_map_camera @ off))
    found = placed([*drifting[:12], all_frames[12], *drifting[13:]], 12, points)
    assert found is not None and found.patches is None
    assert torch.equal(found.points, points.points) and torch.equal(found.confidence, points.confidence)


def test_patches_that_no_other_view_shows_are_left_out(all_frames: list[Frame]) -> None:
    points = with_patches_of(all_frames[12])
    assert points.patches is not None
    wrong = torch.arange(len(points)) % 4 == 0
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, points.patches.shape, dtype=np.uint8))
    factor = 1 + 0.03 * torch.sin(torch.arange(len(points)))
    spoiled = replace(points, patches=torch.where(wrong[:, None], noise, points.patches))
    found = placed(all_frames, 12, at_other_depths(spoiled, all_frames[12], factor))
    assert found is not None and found.patches is not None
    flat = (found.patches == 0).all(dim=1)
    assert flat[wrong].float().mean() > 0.8
    assert flat[~wrong].float().mean() < 0.5


def test_depths_and_patches_stay_where_few_views_tell(all_frames: list[Frame]) -> None:
    points = with_patches_of(all_frames[12])
    assert placed(all_frames[10:15:2], 1, points) is None
