# SPDX-License-Identifier: Apache-2.0
"""The map tools on a real map: what other programs read back, what a part of a map is still good for."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import matrix_to_quaternion, so3_exp
from kfloc_ros.mapping.merge import crop_map
from kfloc_ros.maps.scene_map import SceneMap


@pytest.fixture(scope="module")
def scene_map(room_map) -> SceneMap:
    return SceneMap.load(room_map)


def test_colmap_reads_the_export_and_sees_every_point_where_it_was_seen(room_map, scene_map, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(["map", "export", str(room_map), "--to", "colmap", "--out", str(out)]) == 0
    model = pycolmap.Reconstruction(str(out))
    references = scene_map.references
    assert len(model.images) == len(references.ids)
    assert len(model.points3D) == sum(map(len, references.views))
    image = model.images[2]
    assert image.cam_from_world().inverse().matrix() == pytest.approx(references.T_map_camera[1][:3], abs=1e-6)
    for point2D in image.points2D[:20]:
        projected = image.project_point(model.points3D[point2D.point3D_id].xyz)
        assert projected == pytest.approx(point2D.xy, abs=0.01)
        assert (projected > 0).all() and projected[0] < scene_map.camera.width


@pytest.mark.parametrize("vector", [(0, 0, 0), (0.3, -0.2, 0.1), (np.pi, 0, 0), (0, np.pi, 0), (0, 0, -3.1)])
def test_quaternions_turn_as_the_matrix_does(vector) -> None:
    R = so3_exp(np.array(vector, dtype=np.float64))
    assert pycolmap.Rotation3d(matrix_to_quaternion(R)).matrix() == pytest.approx(R, abs=1e-9)


def test_ply_holds_all_points(room_map, scene_map, tmp_path: Path) -> None:
    out = tmp_path / "points.ply"
    assert main(["map", "export", str(room_map), "--to", "ply", "--out", str(out)]) == 0
    expected = np.concatenate([view.points.numpy() for view in scene_map.references.views])
    header, data = out.read_bytes().split(b"end_header\n", 1)
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\n")
    assert f"element vertex {len(expected)}".encode() in header
    assert np.frombuffer(data, "<f4").reshape(-1, 4)[:, :3] == pytest.approx(expected)


def test_the_picture_is_one(room_map, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    assert main(["map", "view", str(room_map), "--out", str(out)]) == 0
    image = cv2.imread(str(out))
    assert min(image.shape[:2]) > 300 and image.std() > 10


def test_pack_and_unpack_from_the_command_line(room_map, tmp_path: Path) -> None:
    packed, out = tmp_path / "room.kfmap", tmp_path / "room"
    assert main(["map", "pack", str(room_map), "--out", str(packed)]) == 0
    assert main(["map", "unpack", str(packed), "--out", str(out)]) == 0
    assert main(["map", "verify", str(out)]) == 0


@pytest.mark.parametrize("action", [["export", "--to", "colmap"], ["export", "--to", "ply"], ["view"], ["pack"]])
def test_nothing_that_is_there_is_replaced(room_map, tmp_path: Path, action: list[str]) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    assert main(["map", action[0], str(room_map), *action[1:], "--out", str(there)]) != 0
    assert there.read_text() == "mine"


def test_a_part_of_a_map_has_the_points_of_its_box(room_map, scene_map, tmp_path: Path) -> None:
    points = np.concatenate([view.points.numpy() for view in scene_map.references.views])
    low, high = points.min(axis=0) - 1, points.max(axis=0) + 1
    high[0] = np.median(points[:, 0])
    out = tmp_path / "half"
    box = [repr(float(v)) for v in (*low, *high)]
    assert main(["map", "crop", str(room_map), "--out", str(out), "--box", *box]) == 0
    part = SceneMap.load(out)
    kept = np.concatenate([view.points.numpy() for view in part.references.views])
    assert 0 < len(kept) < len(points) and kept[:, 0].max() <= high[0]
    assert part.bounds_m[1][0] <= high[0] and part.calibration == scene_map.calibration


def test_a_box_with_nothing_in_it_is_refused(scene_map) -> None:
    with pytest.raises(MapError, match="the map reaches from"):
        crop_map(scene_map, (90.0, 90.0, 90.0), (91.0, 91.0, 91.0))
    with pytest.raises(MapError, match="smallest corner first"):
        crop_map(scene_map, (1.0, 0.0, 0.0), (0.0, 1.0, 1.0))
