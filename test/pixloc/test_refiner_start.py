# SPDX-License-Identifier: Apache-2.0
"""Alignment from starts that are off by about the width of a search window, and its covariance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.covariance import camera_frame
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc import refiner as refiner_module
from kfloc_ros.pixloc.cost import Linearization
from kfloc_ros.pixloc.optimizer import MEASURED_M, RefinerSettings, disagreement
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Alignment


def test_points_find_themselves_from_starts_a_window_away(room, room_map) -> None:
    scene_map = SceneMap.load(room_map)
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings(max_cost=1.0))
    backbone, rng = Backbone(device=torch.device("cpu")), np.random.default_rng(0)
    for k in range(6):
        frame = room.view(make_pose(so3_exp(np.array([0.0, 0.1 * k - 0.2, 0.0])), [0.1 * k - 0.2, 0.0, -0.6]), k)
        features = backbone.extract(frame.image)
        for px in (20, 30, 40):
            axis = rng.normal(size=3) * [1, 1, 0]
            turn = px / scene_map.camera.fx * axis / np.linalg.norm(axis)
            end = refiner.align(features, [frame.T_map_camera @ make_pose(so3_exp(turn), np.zeros(3))])
            assert end.success and end.T_map_camera is not None and end.support > 6.0
            assert np.linalg.norm((end.T_map_camera - frame.T_map_camera)[:3, 3]) < 0.1


def test_where_only_a_certain_pose_is_wanted_others_are_not_aligned(room, room_map, monkeypatch) -> None:
    scene_map = SceneMap.load(room_map)
    refiner = Refiner(scene_map.references, scene_map.camera, RefinerSettings(max_cost=1.0))
    frame = room.view(make_pose(np.eye(3), [0.1, 0.0, -0.6]), 0)
    features = Backbone(device=torch.device("cpu")).extract(frame.image)
    near, far = (frame.T_map_camera @ make_pose(so3_exp([0.0, turn, 0.0]), np.zeros(3)) for turn in (0.02, 0.35))
    usual, certain = (refiner.align(features, [near], only_certain=c) for c in (False, True))
    assert certain.success and np.array_equal(certain.T_map_camera, usual.T_map_camera)
    descents, real = [], refiner_module.descend
    monkeypatch.setattr(refiner_module, "descend", lambda *args: descents.append(1) or real(*args))
    hopeless = refiner.align(features, [far], only_certain=True)
    assert not hopeless.success and "few points" in hopeless.reason and not descents
    assert refiner.align(features, [far]).final_cost < np.inf and descents
    both = refiner.align(features, [far, near], only_certain=True)
    assert both.success and both.support >= refiner.settings.certain_support
    aside = frame.T_map_camera @ make_pose(so3_exp([0.0, 40.0 / scene_map.camera.fx, 0.0]), np.zeros(3))
    points = scene_map.references.points_near(frame.T_map_camera, scene_map.camera, 1)
    narrow, wide = (
        refiner.align(features, [aside], further=points, with_map=False, only_certain=True, wide=w)
        for w in (False, True)
    )
    assert wide.success and not narrow.success


def test_the_covariance_holds_what_the_reference_views_disagree_by(room, room_map) -> None:
    scene_map = SceneMap.load(room_map)
    frame = room.view(make_pose(so3_exp(np.array([0.0, 0.05, 0.0])), [0.05, 0.0, -0.6]), 0)
    features = Backbone(device=torch.device("cpu")).extract(frame.image)
    references = scene_map.references.selected(scene_map.references.nearest(frame.T_map_camera, 3))

    def apart_m(shift_m: float) -> float:
        moved = replace(references.views[1], points=references.views[1].points + torch.tensor([shift_m, 0.0, 0.0]))
        views = replace(references, views=(references.views[0], moved, *references.views[2:]))
        alignment = Refiner(views, scene_map.camera, RefinerSettings(max_cost=1.0)).align(
            features, [frame.T_map_camera]
        )
        assert alignment.success and alignment.covariance is not None
        assert (np.linalg.eigvalsh(alignment.covariance) > 0).all()
        of_points = alignment.covariance - alignment.disagreement
        assert (np.linalg.eigvalsh(of_points) > 0).all(), "it is a part of the covariance"
        return float(np.sqrt(np.trace(alignment.disagreement[:3, :3])))

    together, apart = apart_m(0.0), apart_m(0.05)
    assert apart > 1.25 * together and apart > 0.009, "one view of three is 5 cm away from the others"


def test_a_view_alone_and_views_that_agree_do_not_disagree() -> None:
    def view(gradient: float, count: int = 100, information: float = 1.0) -> Linearization:
        return Linearization(0.1, information * np.eye(6), np.full(6, gradient), count, 1.0)

    assert not disagreement([view(0.5)]).any() and not disagreement([]).any()
    assert not disagreement([view(0.0), view(0.0)]).any()
    assert not disagreement([view(0.5), view(-0.5, count=3)]).any(), "too few points to say anything"
    assert not disagreement([view(0.0, information=0.0)] * 2).any(), "a covered camera"
    apart = disagreement([view(0.13), view(-0.13)])
    np.testing.assert_allclose(apart, np.full((6, 6), 0.01), rtol=1e-6)


def test_the_covariance_grows_away_from_the_reference_views(room, room_map) -> None:
    scene_map = SceneMap.load(room_map)
    frame = room.view(make_pose(so3_exp(np.array([0.0, 0.3, 0.0])), [0.2, 0.0, -0.6]), 0)
    features = Backbone(device=torch.device("cpu")).extract(frame.image)

    def aligned(settings: RefinerSettings) -> Alignment:
        return Refiner(scene_map.references, scene_map.camera, settings).align(features, [frame.T_map_camera])

    even, grown = aligned(RefinerSettings()), aligned(RefinerSettings(covariance_doubling_m=0.1))
    assert even.distance_m > 0.01 and even.covariance is not None and grown.covariance is not None
    of_points = even.covariance - even.disagreement
    factor = 1.0 + min(even.distance_m, MEASURED_M) / 0.1
    np.testing.assert_allclose(grown.covariance - grown.disagreement, factor * of_points, rtol=1e-9)


def test_a_map_may_be_surer_upwards_than_sideways(room, room_map) -> None:
    scene_map = SceneMap.load(room_map)
    frame = room.view(make_pose(so3_exp(np.array([0.0, 0.3, 0.0])), [0.2, 0.0, -0.6]), 0)
    features = Backbone(device=torch.device("cpu")).extract(frame.image)

    def of_camera(settings: RefinerSettings) -> np.ndarray:
        aligned = Refiner(scene_map.references, scene_map.camera, settings).align(features, [frame.T_map_camera])
        assert aligned.T_map_camera is not None and aligned.covariance is not None
        turn = camera_frame(aligned.T_map_camera)
        return turn @ aligned.covariance @ turn.T

    even, shaped = of_camera(RefinerSettings()), of_camera(RefinerSettings(sideways=1.25))
    ratio = np.sqrt(np.diag(shaped) / np.diag(even))
    np.testing.assert_allclose(ratio, [1.25, 0.8, 1.0, 0.8, 1.25, 1.0], rtol=1e-9)
    assert np.linalg.slogdet(shaped)[1] == pytest.approx(np.linalg.slogdet(even)[1])


def test_a_rotation_of_the_map_grows_with_the_distance_from_its_views() -> None:
    settings = RefinerSettings(own_error_m=0.003, own_error_rad=0.004, own_error_growth=0.002)
    variances = np.diag(settings.own_covariance_at(1.5))
    np.testing.assert_allclose(variances, [9e-6] * 3 + [25e-6] * 3)
