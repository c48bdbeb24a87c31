# SPDX-License-Identifier: Apache-2.0
"""References away from a place know nothing of the images near it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping.checked_references import CheckedReferences
from kfloc_ros.mapping.point_depths import DepthSettings
from kfloc_ros.mapping.point_evidence import EvidenceSettings, PointEvidence, Thinned, evenly
from kfloc_ros.mapping.views import View
from kfloc_ros.pixloc.patches import with_patches
from kfloc_ros.pixloc.references import ReferenceViews, extract_reference_points, view_distances
from kfloc_ros.types import Frame

BACKBONE = Backbone(device=torch.device("cpu"))
PLACE, LEAST_M = 12, 0.3


def view_of(frame: Frame) -> View:
    assert frame.depth_m is not None and frame.T_map_camera is not None
    return View(frame.image, frame.depth_m, frame.camera, frame.T_map_camera, frame.index)


@pytest.fixture(scope="module")
def views(room: FrameSource) -> list[View]:
    return [view_of(room[position]) for position in range(40)]


def references_of(views: list[View]) -> ReferenceViews:
    """Every third view as a reference, with depths that are off by up to 3 %."""
    taken, points = views[::3], []
    for view in taken:
        found = extract_reference_points(
            BACKBONE.extract(view.image), view.depth_m, view.camera, view.T_map_camera, 300
        )
        found = with_patches(found, view.image, view.camera, view.T_map_camera)
        centre = torch.from_numpy(view.T_map_camera[:3, 3])
        factor = 1 + 0.03 * torch.sin(torch.arange(len(found)))
        points.append(replace(found, points=(centre + (found.points - centre) * factor[:, None]).float()))
    return ReferenceViews(tuple(v.index for v in taken), np.stack([v.T_map_camera for v in taken]), tuple(points))


def checked(views: list[View], images: list[View], references: ReferenceViews) -> CheckedReferences:
    evidence = PointEvidence(views[0].camera, depths=DepthSettings(min_points=30))
    for view in images:
        evidence.add(view, BACKBONE.extract(view.image))
    return CheckedReferences.of(evidence, references)


def same(a: ReferenceViews, b: ReferenceViews) -> bool:
    return a.ids == b.ids and all(
        torch.equal(x.points, y.points) and torch.equal(x.confidence, y.confidence)
        for x, y in zip(a.views, b.views, strict=True)
    )


@pytest.fixture(scope="module")
def references(views: list[View]) -> ReferenceViews:
    return references_of(views)


def test_images_near_a_place_do_not_tell_of_the_references_away_from_it(
    views: list[View], references: ReferenceViews
) -> None:
    place = views[PLACE].T_map_camera
    is_near = view_distances(np.stack([view.T_map_camera for view in views]), place) < LEAST_M
    assert 3 < is_near.sum() < 30
    spoiled = [
        replace(view, image=np.ascontiguousarray(view.image[::-1])) if near else view
        for view, near in zip(views, is_near, strict=True)
    ]
    whole, other = checked(views, views, references), checked(views, spoiled, references)
    assert not same(whole.views, other.views), "near images are evidence for the map as a whole"
    away, also = whole.away_from(place, LEAST_M), other.away_from(place, LEAST_M)
    assert away is not None and also is not None and same(away, also)
    assert (view_distances(away.T_map_camera, place) >= LEAST_M).all()
    assert not same(away, whole.views.selected([whole.views.ids.index(k) for k in away.ids]))
    moved = [
        bool((a.points != references.views[references.ids.index(k)].points).any())
        for k, a in zip(away.ids, away.views, strict=True)
    ]
    assert any(moved), "the images that remain still tell depths"


def test_with_all_images_the_references_are_those_of_the_map(views: list[View], references: ReferenceViews) -> None:
    found = checked(views, views, references)
    alone = found.away_from(views[PLACE].T_map_camera, 0.0)
    assert alone is not None
    for k, points in zip(alone.ids, alone.views, strict=True):
        of_map = found.views.views[found.views.ids.index(k)]
        assert torch.equal(points.points, of_map.points)
        torch.testing.assert_close(points.confidence, of_map.confidence)
    assert found.away_from(views[PLACE].T_map_camera, 50.0) is None
    first = found.first(4)
    assert first.views.ids == references.ids[:4]
    some = first.away_from(views[PLACE].T_map_camera, 0.0)
    assert some is not None and set(some.ids) <= set(references.ids[:4])


def test_views_all_over_the_recording_are_kept(views: list[View], references: ReferenceViews) -> None:
    evidence = PointEvidence(views[0].camera, EvidenceSettings(spread=6))
    for view in views:
        evidence.add(view, BACKBONE.extract(view.image))
    indices = [view.index for view in evidence.spread]
    assert len(indices) == 6 and indices[0] == views[0].index and indices[-1] >= views[-9].index
    found = CheckedReferences.of(evidence, references).with_spread(2)
    assert [view.index for view in found.spread] == [indices[0], indices[-1]]
    kept = Thinned[int](5)
    for k in range(23):
        if kept.wants_next():
            kept.keep(k)
    assert kept.items == list(range(0, 23, kept.step)) and len(kept.items) <= 5
    assert evenly([], 3) == [] and evenly([1], 3) == [1]
