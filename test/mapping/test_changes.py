# SPDX-License-Identifier: Apache-2.0
"""Changes of a place: what is not there any more is retired, and nothing else; sessions of different looks stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from textured_room import HALF_SIZE_M, ROOM_CAMERA, TEXTURE_PX_PER_M, Room

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.evaluation.collection import Collection
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.mapping import update
from kfloc_ros.mapping.build import MadeMap
from kfloc_ros.mapping.changes import Changes, find_changes, write_changes
from kfloc_ros.mapping.merge import merge_maps
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews
from kfloc_ros.pixloc.refiner import query_levels
from kfloc_ros.types import Alignment, Frame, PoseEstimate, TrackingState

WALL = 5
"""Texture of the wall that the camera looks at: z > 0."""
CHANGED_X_M = (0.5, 1.2)


class ChangedRoom(Room):
    """The room with another picture on a part of a wall, or in another light."""

    def __init__(self, length: int, *, changed: bool = False, light: float = 1.0) -> None:
        super().__init__(length, phase=0.37)
        self._light = light
        if changed:
            wall = self._textures[WALL].copy()
            first, last = (round((x + HALF_SIZE_M[0]) * TEXTURE_PX_PER_M) for x in CHANGED_X_M)
            wall[:, first:last] = self._textures[0][::-1, first:last]
            self._textures[WALL] = wall

    def at(self, time_steps: float, index: int = 0, camera: Camera = ROOM_CAMERA) -> Frame:
        frame = super().at(time_steps, index, camera)
        dark = 255 * (frame.image / 255.0) ** (1 / self._light) * self._light
        return replace(frame, image=dark.astype(np.uint8))


@pytest.fixture(scope="module")
def scene_map(room_map: Path) -> SceneMap:
    return SceneMap.load(room_map)


def changes_in(scene_map: SceneMap, source: Room) -> Changes:
    backbone = Backbone(device=torch.device("cpu"))
    return find_changes(scene_map.references, scene_map.camera, source, np.eye(4), backbone)


def is_changed(points: np.ndarray) -> np.ndarray:
    low, high = CHANGED_X_M
    return (points[:, 2] > HALF_SIZE_M[2] - 0.05) & (points[:, 0] > low) & (points[:, 0] < high)


def test_a_place_that_has_not_changed_stays(scene_map: SceneMap) -> None:
    changes = changes_in(scene_map, ChangedRoom(24))
    total = sum(len(view) for view in scene_map.references.views)
    assert changes.aligned >= 5 and len(changes.gone_points) < 0.02 * total
    assert changes.references.ids == scene_map.references.ids
    assert not changes.look_different()


def test_what_has_changed_is_retired_and_told(scene_map: SceneMap, tmp_path: Path) -> None:
    changes = changes_in(scene_map, ChangedRoom(24, changed=True))
    before = np.concatenate([view.points.numpy() for view in scene_map.references.views])
    after = np.concatenate([view.points.numpy() for view in changes.references.views])
    assert is_changed(before).sum() > 200
    assert is_changed(after).sum() < 0.3 * is_changed(before).sum()
    assert (~is_changed(after)).sum() > 0.95 * (~is_changed(before)).sum()
    assert is_changed(changes.gone_points).mean() > 0.8
    assert "contradicted" in changes.summary() and f"view {changes.changed[0].id} at" in changes.summary()
    write_changes(tmp_path / "told", scene_map, changes)
    table = (tmp_path / "told" / "changes.csv").read_text().splitlines()
    assert len(table) == 1 + len(scene_map.references.ids)
    assert (tmp_path / "told" / "changes.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(MapError, match="cannot be written"):
        write_changes(tmp_path / "file", scene_map, changes)


def test_another_light_is_no_change(scene_map: SceneMap) -> None:
    changes = changes_in(scene_map, ChangedRoom(24, light=0.35))
    total = sum(len(view) for view in scene_map.references.views)
    assert len(changes.gone_points) < 0.05 * total and not any(view.retired for view in changes.views)


def test_a_recording_of_elsewhere_tells_nothing(scene_map: SceneMap) -> None:
    far = np.eye(4)
    far[0, 3] = 50.0
    changes = find_changes(scene_map.references, scene_map.camera, ChangedRoom(3), far, Backbone())
    assert changes.images == 0 and not len(changes.gone_points)
    assert "No older reference view was seen again" in changes.summary()


def test_views_of_two_sessions_stay_where_they_look_different(scene_map: SceneMap, tmp_path: Path) -> None:
    ids = set(scene_map.references.ids[:3])
    both = merge_maps(scene_map, scene_map, np.eye(4), spacing_m=0.04, max_points=10**6, look_different=ids)
    sessions = both.references.sessions
    assert sessions.count(1) == len(scene_map.references.ids) and sessions.count(0) == 3
    loaded = SceneMap.load(both.save(tmp_path / "both"))
    assert loaded.references.sessions == sessions
    again = merge_maps(loaded, scene_map, np.eye(4), spacing_m=0.04, max_points=10**6, look_different=ids)
    assert set(again.references.sessions) == {0, 2}  # the second session's views gave way to the third's
    assert SceneMap.load(scene_map.save(tmp_path / "one")).references.sessions == ()


def test_an_image_is_aligned_with_the_session_that_it_looks_like(scene_map: SceneMap) -> None:
    generator = torch.Generator().manual_seed(0)

    def otherwise(view: ReferencePoints) -> ReferencePoints:
        order = torch.randperm(len(view), generator=generator)
        return replace(view, coarse=view.coarse[order])

    own = scene_map.references
    count = len(own.ids)
    other = tuple(otherwise(view) for view in own.views)
    poses = np.concatenate([own.T_map_camera, own.T_map_camera])
    two = ReferenceViews(tuple(range(2 * count)), poses, other + own.views, (0,) * count + (1,) * count)
    frame = Room(40, phase=0.37)[5]
    assert frame.T_map_camera is not None
    image = query_levels(Backbone(device=torch.device("cpu")).extract(frame.image))[0]
    chosen = two.alike(image, frame.T_map_camera, scene_map.camera, 3)
    assert {two.session_of(k) for k in chosen} == {1}
    same = own.alike(image, frame.T_map_camera, scene_map.camera, 3)
    assert same == own.overlapping(frame.T_map_camera, scene_map.camera, 3)


def test_an_update_from_the_command_line_tells_what_has_changed(
    room_map: Path, scene_map: SceneMap, tmp_path: Path, capsys, monkeypatch
) -> None:
    recording = Collection(tmp_path / "recording")
    for k in range(24):
        frame = replace(ChangedRoom(24, changed=True)[k], stamp_ns=10**9 + k * 100_000_000)
        aligned = Alignment(True, "", frame.T_map_camera, np.eye(6), 0.2, 0.1, 1.0, 3, (0,))
        estimate = PoseEstimate(frame.stamp_ns, TrackingState.TRACKING, "", frame.T_map_camera, alignment=aligned)
        recording.offer(frame, replace(estimate, confidence=0.5 if k % 2 else 0.95))
    # the map of the recording itself takes minutes, and has tests of its own
    monkeypatch.setattr(update, "make_map", lambda *args, **options: MadeMap(scene_map, []))
    words = ["map", "update", str(room_map), str(tmp_path / "recording"), "--same-frame", "--no-check"]
    told = tmp_path / "told"
    assert main([*words, "--out", str(tmp_path / "new"), "--changes", str(told), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "older views were seen again" in out and "contradicted" in out and "reference views (before: 10)" in out
    assert {path.name for path in told.iterdir()} == {"changes.png", "changes.csv"}
    assert set(SceneMap.load(tmp_path / "new").references.sessions) <= {0, 1}
