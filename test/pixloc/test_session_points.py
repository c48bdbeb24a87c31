# SPDX-License-Identifier: Apache-2.0
"""Points of a session's images: their depths are found from the motion, and uncertain ones are not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.pixloc import session_points
from kfloc_ros.pixloc.cost import FeatureImage
from kfloc_ros.pixloc.references import ReferencePoints, choose_points
from kfloc_ros.pixloc.refiner import query_levels
from kfloc_ros.pixloc.session_points import SessionPoints

NOTHING_MAPPED = ReferencePoints(torch.zeros(0, 3), torch.zeros(0, 64), torch.zeros(0, 24), torch.zeros(0))
DISTANCE_M = 2.4
"""Of the wall that the camera looks at."""


@pytest.fixture(scope="module")
def views(room) -> list[tuple[tuple[FeatureImage, FeatureImage], np.ndarray]]:
    """Images of a camera that moves along a wall of the room, and their poses."""
    backbone = Backbone()
    found = []
    for k in range(8):
        T = make_pose(so3_exp(np.zeros(3)), [-0.2 + 0.06 * k, 0.0, 1.8 - DISTANCE_M])
        found.append((query_levels(backbone.extract(room.view(T, k).image)), T))
    return found


def depths_m(points: SessionPoints, T: np.ndarray) -> np.ndarray:
    usable = points.usable(T)
    assert usable is not None
    return usable.points.double().numpy()[:, 2] - T[2, 3]


def test_depths_are_found_from_the_motion(room, views) -> None:
    points = SessionPoints(room.camera)
    for images, T in views:
        points.observe(images, T, NOTHING_MAPPED)
    found = depths_m(points, views[-1][1])
    assert len(found) > 100
    assert np.median(np.abs(found - DISTANCE_M)) < 0.05


def test_points_of_unknown_depth_are_used_only_near_their_image(room, views) -> None:
    points = SessionPoints(room.camera)
    images, T = views[0]
    assert points.usable(T) is None
    points.observe(images, T, NOTHING_MAPPED)
    here = points.usable(T)
    assert here is not None and len(here) > 100
    aside = make_pose(T[:3, :3], T[:3, 3] + [0.4, 0.0, 0.0])
    assert points.usable(aside) is None


def test_the_displacement_is_that_of_the_motion_and_the_width_for_what_leaves_the_image(room, views) -> None:
    points, width = SessionPoints(room.camera), room.camera.width
    images, T = views[0]
    assert points.displacement_px(T, T) == width  # no points yet
    for images, T in views:
        points.observe(images, T, NOTHING_MAPPED)
    aside = make_pose(T[:3, :3], T[:3, 3] + [0.12, 0.0, 0.0])
    assert points.displacement_px(T, T) == 0.0
    assert points.displacement_px(T, aside) == pytest.approx(room.camera.fx * 0.12 / DISTANCE_M, rel=0.1)
    turned = make_pose(T[:3, :3] @ so3_exp(np.array([0.0, np.pi, 0.0])), T[:3, 3])
    assert points.displacement_px(T, turned) == width and points.displacement_px(turned, T) == width


def test_the_map_lends_its_depths(room, views) -> None:
    images, T = views[0]
    wall = torch.cartesian_prod(torch.linspace(-1.5, 1.5, 40), torch.linspace(-1.2, 1.2, 40))
    mapped = ReferencePoints(
        torch.cat([wall, torch.full((len(wall), 1), 1.8)], dim=1),
        torch.zeros(len(wall), 64),
        torch.zeros(len(wall), 24),
        torch.ones(len(wall)),
    )
    points = SessionPoints(room.camera)
    points.observe(images, T, mapped)
    np.testing.assert_allclose(depths_m(points, T), DISTANCE_M, rtol=0.1)


def test_points_that_do_not_find_themselves_are_dropped(room, views) -> None:
    points = SessionPoints(room.camera)
    images, T = views[0]
    points.observe(images, T, NOTHING_MAPPED)
    elsewhere = query_levels(Backbone().extract(np.random.default_rng(0).integers(0, 255, (256, 320, 3), np.uint8)))
    for _ in range(3):
        points.observe(elsewhere, T, NOTHING_MAPPED)
    usable = points.usable(T)
    first = choose_points(images, 300)[1]
    kept = 0 if usable is None else int((usable.coarse @ first.t() > 0.999).any(dim=1).sum())
    assert kept < 30
    points.reset()
    assert len(points) == 0 and points.usable(T) is None


def test_the_nearest_are_those_that_numpy_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels, others = rng.uniform(0, 640, (40, 2)), rng.uniform(0, 640, (90, 2))
    found = session_points._nearest(pixels, others)
    monkeypatch.setattr(session_points, "has_numba", lambda: False)
    index, distance = session_points._nearest(pixels, others)
    assert (found[0] == index).all() and np.allclose(found[1], distance)
