# SPDX-License-Identifier: Apache-2.0
"""The building's rooms are alike but for their posters, lie side by side in one frame, and have doors between them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from building_walks import door_distance_m, room_at

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.simulation.building import (
    PITCH_X_M,
    ROOMS,
    ROOMS_IN_A_ROW,
    BuildingSource,
    T_building_room,
    WalkSource,
    build_building,
)
from kfloc_ros.simulation.room import DOOR_HEIGHT_M, HALF_X_M, HALF_Y_M, HEIGHT_M, HIGH_Y_M, LOW_Y_M, own_faces, room
from kfloc_ros.types import Frame

CAMERA = Camera(96, 64, 70.0, 70.0, 47.5, 31.5)
COARSE = 10.0


def points_of(frame: Frame) -> np.ndarray:
    """(N, 3) points that the pixels see, in the building's frame."""
    assert frame.depth_m is not None and frame.T_map_camera is not None
    v, u = np.mgrid[: CAMERA.height, : CAMERA.width]
    rays = np.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones(u.shape)], axis=-1)
    points = (rays * frame.depth_m[..., None]).reshape(-1, 3)
    return points @ frame.T_map_camera[:3, :3].T + frame.T_map_camera[:3, 3]


@pytest.mark.thorough
def test_rooms_do_not_overlap_and_poses_are_the_buildings() -> None:
    middles = np.array([T_building_room(k)[:3, 3] for k in range(1, ROOMS + 1)])
    apart = np.abs(middles[:, None] - middles[None])[np.triu_indices(ROOMS, 1)]
    assert ((apart[:, 0] >= 5.0) | (apart[:, 1] >= 4.0)).all()
    source = BuildingSource(7, camera=CAMERA, texels_per_m=COARSE)
    assert 80 <= len(source) <= 110
    poses = np.stack([source.pose(position) for position in range(len(source))])
    assert (np.abs(poses[:, :3, 3] - T_building_room(7)[:3, 3]) < [2.5, 2.0, 2.6]).all()
    assert np.array_equal(source[5].T_map_camera, poses[5])
    assert [room_at(*middle[:2]) for middle in middles] == list(range(1, ROOMS + 1))
    assert door_distance_m(PITCH_X_M / 2) < 1e-9 and door_distance_m(PITCH_X_M) == pytest.approx(PITCH_X_M / 2)


def test_rooms_differ_in_a_few_posters_alone_and_share_all_other_pictures() -> None:
    scene = build_building(COARSE)
    shell = room(doorways=True)
    own = own_faces(shell)
    assert len(own) == 5 and len(scene.faces) == ROOMS * len(shell) - 2 * 2 * (ROOMS_IN_A_ROW - 1)
    shown, seldom = np.unique(scene.picture_of, return_counts=True)
    assert len(scene.atlas.packing.left) == len(shell) + ROOMS * len(own)
    assert (seldom == 1).sum() == ROOMS * len(own) and set(own).isdisjoint(shown.tolist())
    assert scene.patch_of.max() < len(scene.light_map.left) == len(shell)


def test_through_an_open_door_the_next_room_is_seen_and_through_a_closed_one_nothing() -> None:
    source = BuildingSource(2, camera=CAMERA, texels_per_m=COARSE)
    out = next(k for k in range(60, len(source)) if source.pose(k)[0, 3] - PITCH_X_M > 2.2)
    points = points_of(source[out])
    beyond = points[points[:, 0] > PITCH_X_M + HALF_X_M + 0.31]
    assert len(beyond) > 300 and beyond[:, 0].max() > 2 * PITCH_X_M
    wall = points[np.abs(points[:, 0] - (PITCH_X_M + HALF_X_M)) < 1e-3]
    assert ((wall[:, 1] > HIGH_Y_M - 1e-3) | (wall[:, 1] < LOW_Y_M + 1e-3) | (wall[:, 2] > DOOR_HEIGHT_M - 1e-3)).all()
    last = BuildingSource(ROOMS_IN_A_ROW, camera=CAMERA, texels_per_m=COARSE)
    closed = points_of(last[out])
    assert closed[:, 0].max() < (ROOMS_IN_A_ROW - 0.5) * PITCH_X_M + 1e-3


@pytest.mark.parametrize(("start", "end"), [(1, 3), (3, 1), (7, 8)])
def test_a_walk_leads_through_the_doors_and_through_no_wall(start: int, end: int) -> None:
    source = WalkSource(start, end, camera=CAMERA, texels_per_m=COARSE)
    poses = np.stack([source.pose(position) for position in range(len(source))])
    rooms = [room_at(x, y) for x, y in poses[:, :2, 3]]
    step = 1 if end > start else -1
    assert list(dict.fromkeys(rooms)) == list(range(start, end + step, step))
    for x, y, z in poses[:, :3, 3] - [T_building_room(number)[:3, 3] for number in rooms]:
        assert abs(y) < HALF_Y_M and 0.8 < z < HEIGHT_M
        assert abs(x) < HALF_X_M - 0.1 or (LOW_Y_M + 0.1 < y < HIGH_Y_M - 0.1 and z < DOOR_HEIGHT_M)
    moves = [np.linalg.inv(a) @ b for a, b in itertools.pairwise(poses)]
    assert max(np.linalg.norm(T[:3, 3]) for T in moves) < 0.08  # 1.2 m/s
    assert max(rotation_angle_deg(T[:3, :3]) for T in moves) < 6.0


def test_depth_and_pose_agree_through_a_door() -> None:
    """Points seen from the doorway lie on the surfaces of the next room, not behind its walls."""
    source = WalkSource(1, 2, camera=CAMERA, texels_per_m=COARSE)
    middle = int(np.argmin([abs(source.pose(k)[0, 3] - PITCH_X_M / 2) for k in range(len(source))]))
    points = points_of(source[middle])
    inside = (points[:, 0] > PITCH_X_M / 2) & (points[:, 0] < PITCH_X_M + HALF_X_M + 1e-3)
    assert inside.mean() > 0.9 and (np.abs(points[:, 1]) < HALF_Y_M + 1e-3).all()
    assert (points[:, 2] > -1e-3).all() and (points[:, 2] < HEIGHT_M + 1e-3).all()


def test_sources_are_named_by_room() -> None:
    assert open_source("sim:building-3").name == "building-3"
    assert open_source("sim:building-10-localize").name == "building-10-localize"
    assert open_source("sim:building-walk-3-1").name == "building-walk-3-1"
    for name in (
        "sim:building-0", "sim:building-11", "sim:building-2-dance", "sim:building", "sim:building-x",
        "sim:building-walk-2-2", "sim:building-walk-5-6", "sim:building-walk-0-1", "sim:building-walk-9-11",
    ):  # fmt: skip
        with pytest.raises(SourceError, match="building"):
            open_source(name)
