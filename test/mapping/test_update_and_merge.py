# SPDX-License-Identifier: Apache-2.0
"""A map that grows: what is added is found in its own frame, and what was known stays known."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_frame import InFrame
from textured_room import small_head

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.kfnet.scoordnet import RoughnessScale, SCoordNetEnsemble, heads_of, transformed_head
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping import build
from kfloc_ros.mapping.merge import LARGER, SMALLER, merge_maps
from kfloc_ros.mapping.registration import register
from kfloc_ros.mapping.update import Updated, update_map
from kfloc_ros.maps.format import read_description
from kfloc_ros.maps.scene_map import Calibration, SceneMap, transformed
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

T_MAP_SESSION = make_pose(so3_exp(np.array([0.1, 0.8, -0.05])), np.array([2.0, -0.5, 1.0]))


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


@pytest.fixture(scope="module")
def updated(scene_map: SceneMap, room) -> Updated:
    config = build.MapBuildConfig(
        train_seconds=120.0, train_steps=200, augmentations=0, reference_spacing_m=0.03, device="cpu"
    )
    session = InFrame(type(room)(26, phase=30.0), inverse_pose(T_MAP_SESSION))
    with small_head():
        return update_map(scene_map, session, config)


def errors_m(scene_map: SceneMap, room, times: list[float]) -> list[float]:
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    errors = []
    for time in times:
        localizer.reset("one by one")
        frame = room.at(time)
        T = localizer.process(frame).estimate.T_map_camera
        errors.append(np.inf if T is None else float(np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3])))
    return errors


@pytest.mark.thorough
def test_a_recording_is_found_in_the_map_and_both_are_localized_in_what_results(updated, room, tmp_path) -> None:
    assert updated.placement is not None and updated.placement.moved and updated.placement.agreeing >= 3
    T = updated.placement.T_map_session
    assert np.linalg.norm(T[:3, 3] - T_MAP_SESSION[:3, 3]) < 0.03
    assert rotation_angle_deg(T[:3, :3].T @ T_MAP_SESSION[:3, :3]) < 0.5
    out = updated.scene_map.save(tmp_path / "grown")
    assert read_description(out)["version"] == 4
    grown = SceneMap.load(out)
    assert isinstance(grown.head, SCoordNetEnsemble) and len(heads_of(grown.head)) == 2
    assert "26 views" in grown.provenance["session_2"]
    assert np.median(errors_m(grown, room, [3.4, 9.6, 15.3])) < 0.02
    assert np.median(errors_m(grown, room, [36.4, 41.6, 47.3])) < 0.03
    assert main(["map", "verify", str(out)]) == 0
    assert main(["map", "info", str(out)]) == 0


@pytest.mark.thorough
def test_views_of_both_are_there_where_they_add_coverage(scene_map, updated) -> None:
    views = updated.scene_map.references
    old = len(scene_map.references.ids)
    assert len(views.ids) > old / 2 and len(set(views.ids)) == len(views.ids)
    assert set(views.sessions) == {0, 1} and len(views.sessions) == len(views.ids)
    seen = [view for view in updated.changes.views if view.images]
    assert seen and sum(view.contradicted for view in seen) < 0.1 * sum(view.points for view in seen)
    assert "Registered by" in updated.text and "older views were seen again" in updated.text
    low, high = updated.scene_map.bounds_m
    assert all(a <= b for a, b in zip(low, scene_map.bounds_m[0], strict=True))
    assert all(a >= b for a, b in zip(high, scene_map.bounds_m[1], strict=True))


def in_another_frame(scene_map: SceneMap, T: Matrix) -> SceneMap:
    (head,) = heads_of(scene_map.head)
    return replace(
        scene_map, head=transformed_head(head, T), references=transformed(scene_map.references, T), name="other"
    )


def test_two_maps_become_one_from_the_command_line(scene_map, room_map, room, tmp_path: Path, capsys) -> None:
    other = in_another_frame(scene_map, inverse_pose(T_MAP_SESSION)).save(tmp_path / "other")
    out = tmp_path / "both"
    assert main(["map", "merge", str(room_map), str(other), "--out", str(out), "--name", "both"]) == 0
    assert "Registered by" in capsys.readouterr().out
    both = SceneMap.load(out)
    assert both.name == "both" and len(heads_of(both.head)) == 2
    assert np.median(errors_m(both, room, [3.4, 9.6, 15.3])) < 0.02
    assert main(["map", "merge", str(room_map), str(other), "--out", str(out)]) == 2  # exists
    assert main(["map", "merge", str(room_map), str(other), "--out", str(out), "--force", "--same-frame"]) == 0
    assert len(SceneMap.load(out).references.ids) == 2 * len(scene_map.references.ids)  # as told: beside each other


def test_registration_finds_the_motion(scene_map) -> None:
    found = register(scene_map.references, in_another_frame(scene_map, inverse_pose(T_MAP_SESSION)).references)
    assert np.abs(found.T_fixed_moving - T_MAP_SESSION).max() < 0.01
    assert found.views >= 3 and found.residual_m < 0.05


def test_maps_that_do_not_belong_together_are_refused(scene_map) -> None:
    torch.manual_seed(0)
    views = tuple(
        ReferencePoints(torch.randn(200, 3), F.normalize(torch.randn(200, 64)), F.normalize(torch.randn(200, 24)),
                        torch.ones(200))
        for _ in range(5)
    )  # fmt: skip
    elsewhere = ReferenceViews(tuple(range(5)), np.tile(np.eye(4), (5, 1, 1)), views)
    with pytest.raises(MapError, match="do not show the same place"):
        register(scene_map.references, elsewhere)
    larger = transformed(scene_map.references, np.eye(4))
    larger = replace(larger, views=tuple(replace(v, points=v.points * 1.08) for v in larger.views))
    with pytest.raises(MapError, match=r"0\.9\d times too small|not metres|do not show"):
        register(scene_map.references, larger)


def test_cameras_and_heads_must_fit(scene_map) -> None:
    join = functools.partial(merge_maps, scene_map, T_older_newer=np.eye(4), spacing_m=0.04, max_points=100_000)
    zoomed = replace(scene_map.camera, fx=2 * scene_map.camera.fx)
    with pytest.raises(MapError, match="focal length"):
        join(newer=replace(scene_map, camera=zoomed))
    (head,) = heads_of(scene_map.head)
    with pytest.raises(MapError, match="limit of 8"):
        join(newer=replace(scene_map, head=SCoordNetEnsemble([head] * 8)))


def test_what_is_rough_in_both_parts_is_rough_in_the_whole(scene_map: SceneMap) -> None:
    def told(roughness: RoughnessScale | None) -> SceneMap:
        return replace(scene_map, calibration=replace(scene_map.calibration, roughness=roughness))

    def merged(a: RoughnessScale | None, b: RoughnessScale | None) -> RoughnessScale | None:
        whole = merge_maps(told(a), told(b), np.eye(4), spacing_m=0.1, max_points=10_000)
        return whole.calibration.roughness

    assert scene_map.calibration.roughness is not None  # a map that is built has it
    assert merged(RoughnessScale(0.02, 1.5), RoughnessScale(0.03, 1.0)) == RoughnessScale(0.03, 1.5)
    assert merged(None, RoughnessScale(0.03, 1.0)) is None


def test_every_value_of_two_calibrations_is_merged() -> None:
    """A value that is left out would make a merged map claim more than its parts."""
    by_hand = {"measurement_variance_scale", "flow_temperature", "learned_process_scale", "roughness", "sideways"}
    assert by_hand | {*LARGER, *SMALLER} == {item.name for item in fields(Calibration)}


def test_a_merged_map_claims_no_more_than_its_parts(scene_map: SceneMap) -> None:
    other = replace(scene_map, calibration=replace(scene_map.calibration, patch_covariance_scale=7.0))
    for a, b in ((scene_map, other), (other, scene_map)):
        merged = merge_maps(a, b, np.eye(4), spacing_m=0.03, max_points=1000)
        assert merged.calibration.patch_covariance_scale == 7.0
