# SPDX-License-Identifier: Apache-2.0
"""Images, depth and poses of the simulated room belong together."""

from __future__ import annotations

import itertools
import sys

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.simulation.room import HALF_X_M, HALF_Y_M, HEIGHT_M, room
from kfloc_ros.simulation.scene import RayCaster
from kfloc_ros.simulation.source import RECORDINGS, SimulatedSource
from kfloc_ros.types import Frame, Matrix

SMALL = Camera(160, 120, 131.25, 131.25, 79.5, 59.5)
COARSE = 80.0  # texels per metre, as many a pixel as at full size


def source(which: str, quick: bool = False) -> SimulatedSource:
    return SimulatedSource(which, quick, camera=SMALL, texels_per_m=COARSE)


def points_in(frame: Frame) -> Matrix:
    """Map points (H, W, 3) of every pixel."""
    assert frame.depth_m is not None and frame.T_map_camera is not None
    camera = frame.camera
    v, u = np.mgrid[: camera.height, : camera.width]
    rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones(u.shape)], axis=-1)
    return (rays * frame.depth_m[..., None]) @ frame.T_map_camera[:3, :3].T + frame.T_map_camera[:3, 3]


def look_up(frame: Frame, points: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Where map points are in another frame: x, y in pixels, and depth."""
    assert frame.T_map_camera is not None
    T = inverse_pose(frame.T_map_camera)
    x, y, z = np.moveaxis(points @ T[:3, :3].T + T[:3, 3], -1, 0)
    z = np.maximum(z, 1e-6)
    return frame.camera.fx * x / z + frame.camera.cx, frame.camera.fy * y / z + frame.camera.cy, z


def test_points_lie_in_the_room_and_on_its_walls() -> None:
    frames = [source("map")[i] for i in (0, 120, 240)]
    points = np.concatenate([points_in(frame).reshape(-1, 3) for frame in frames])
    reach = np.array([HALF_X_M, HALF_Y_M, HEIGHT_M])
    assert (np.abs(points[:, :2]) < reach[:2] + 1e-3).all()
    assert (points[:, 2] > -1e-3).all() and (points[:, 2] < HEIGHT_M + 1e-3).all()
    on_blank_wall = np.abs(points[:, 1] + HALF_Y_M) < 1e-3
    assert on_blank_wall.sum() > 100


@pytest.mark.parametrize(("first", "second"), [(("map", 60), ("map", 70)), (("map", 20), ("localize", 195))])
def test_one_frame_warped_into_another_is_that_frame(first: tuple[str, int], second: tuple[str, int]) -> None:
    a, b = source(first[0])[first[1]], source(second[0])[second[1]]
    x, y, z = look_up(b, points_in(a))
    inside = (x > 1) & (x < SMALL.width - 2) & (y > 1) & (y < SMALL.height - 2)
    assert inside.mean() > 0.25, "the two frames must see the same things"
    assert b.depth_m is not None
    seen = cv2.remap(b.depth_m, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    visible = inside & (np.abs(seen - z) < 0.02)
    assert visible.sum() > 0.75 * inside.sum(), "what is not hidden has the depth that geometry says"
    assert np.median(np.abs(seen - z)[visible]) < 1e-3

    def contrast(image: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        return cv2.GaussianBlur(grey, (0, 0), 1.0) - cv2.GaussianBlur(grey, (0, 0), 6.0)  # light changes slowly

    there = cv2.remap(contrast(b.image), x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)

    def agreement(shift: int) -> float:
        here = np.roll(contrast(a.image), shift, axis=1)
        return float(np.corrcoef(here[visible], there[visible])[0, 1])

    assert agreement(0) > 0.7
    assert agreement(0) > max(agreement(-3), agreement(3)) + 0.15, "the picture agrees only where the pose says"


def test_the_same_frame_is_rendered_the_same_and_the_next_one_differs() -> None:
    recording = source("map")
    again = source("map")
    assert (recording[7].image == again[7].image).all()
    assert (recording[7].image != recording[8].image).mean() > 0.5


def test_the_lamp_goes_out_during_the_second_recording() -> None:
    recording = source("localize")
    renderer = recording._renderer
    T = recording[100].T_map_camera
    assert T is not None
    duration = recording.trajectory.duration_s
    light = RECORDINGS["localize"].light
    before, after = (renderer.render(T, light(share * duration, duration)).radiance.mean() for share in (0.2, 0.8))
    assert after < 0.75 * before


@pytest.mark.parametrize("name", list(RECORDINGS))
def test_walks_are_those_of_a_person(name: str) -> None:
    recording = SimulatedSource.from_name(name)
    times = np.arange(0.0, recording.trajectory.duration_s, 0.05)
    poses = [recording.trajectory.pose(t) for t in times]
    speeds = [np.linalg.norm(b[:3, 3] - a[:3, 3]) / 0.05 for a, b in itertools.pairwise(poses)]
    turns = [rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) / 0.05 for a, b in itertools.pairwise(poses)]
    assert 0.15 < np.mean(speeds) < 0.5 and max(speeds) < 0.7
    assert max(turns) < 60
    where = np.array([pose[:3, 3] for pose in poses])
    assert (np.abs(where[:, 0]) < 1.6).all() and (np.abs(where[:, 1]) < 1.15).all(), "clear of the furniture"
    assert (where[:, 2] > 1.1).all() and (where[:, 2] < 1.9).all()


@pytest.mark.parametrize("quick", [False, True])
def test_the_second_walk_passes_elsewhere_but_sees_the_same(quick: bool) -> None:
    first, second = (SimulatedSource(which, quick).trajectory for which in ("map", "localize"))
    known = np.array([first.pose(t) for t in np.arange(0, first.duration_s, 0.1)])
    nearest = []
    for t in np.arange(0, second.duration_s, 0.2):
        T = second.pose(t)
        distance = np.linalg.norm(known[:, :3, 3] - T[:3, 3], axis=1)
        angle = np.degrees(np.arccos(np.clip(known[:, :3, 2] @ T[:3, 2], -1, 1)))
        assert (angle < 20).any(), "somebody looked this way while mapping"
        nearest.append(distance[angle < 25].min())
    assert np.median(nearest) > 0.15, "but from somewhere else"


def test_stamps_are_regular_and_the_source_can_be_opened_by_name() -> None:
    recording = open_source("sim:localize-quick", frames="3:9")
    assert len(recording) == 6 and recording.camera.width == 640
    whole = source("localize", quick=True)
    assert whole[4].stamp_ns - whole[3].stamp_ns == pytest.approx(1e9 / 15, abs=1)
    with pytest.raises(SourceError, match="localize-quick"):
        open_source("sim:kitchen")


def test_compiled_loops_cast_rays_as_embree_does() -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    pytest.importorskip("embreex", reason="embreex has no wheel for this machine")
    faces = room()
    ours, embree = RayCaster(faces, embree=False), RayCaster(faces, embree=True)
    rng = np.random.default_rng(2)
    directions = rng.normal(size=(4000, 3))
    directions = (directions / np.linalg.norm(directions, axis=1)[:, None]).astype(np.float32)
    origin = np.array([0.2, -0.3, 1.5])
    same = ours.hit_face(origin, directions) == embree.hit_face(origin, directions)
    assert same.mean() > 0.998, "but for rays along edges, and surfaces that lie on each other"
    origins = np.broadcast_to(origin.astype(np.float32), directions.shape).copy()
    for reach_m in (0.7, 50.0):
        gap = ours.distance(origins, directions, reach_m) - embree.distance(origins, directions, reach_m)
        assert np.quantile(np.abs(gap), 0.998) < 1e-4


def test_without_embree_the_room_is_rendered_by_the_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    ours = source("map")[40]
    monkeypatch.setitem(sys.modules, "embreex", None)
    assert RayCaster(room())._scene is None
    other = source("map")[40]
    assert ours.depth_m is not None and other.depth_m is not None
    assert np.mean(np.abs(ours.depth_m - other.depth_m) < 1e-3) > 0.99
    assert np.mean(np.abs(ours.image.astype(int) - other.image) > 12) < 0.02
