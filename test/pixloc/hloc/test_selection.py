# SPDX-License-Identifier: Apache-2.0
"""Which reference images are used, where from a query starts, and scenes read from COLMAP models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycolmap
import pytest

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.pixloc.hloc.plan import average_pose, largest_cluster, rank_by_inliers, similarity_weights
from kfloc_ros.pixloc.reference.views import ReferenceImage, ReferenceScene, read_scene


def scene_of(*rows: list[int]) -> ReferenceScene:
    camera = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
    images = [ReferenceImage(f"{k}.jpg", camera, np.eye(4), np.array(r, dtype=np.int64)) for k, r in enumerate(rows)]
    return ReferenceScene(np.zeros((10, 3)), np.arange(10), np.full(10, 3), tuple(images))


def test_inliers_rank_images() -> None:
    assert rank_by_inliers({4: 30, 7: 12, 2: 10, 9: 55}, min_matches=10, num_dbs=5) == [9, 4, 7]
    assert rank_by_inliers({4: 30, 9: 55}, min_matches=10, num_dbs=1) == [9]
    assert rank_by_inliers({4: 3}, min_matches=10, num_dbs=1) == []


def test_the_largest_cluster_keeps_the_order() -> None:
    scene = scene_of([0, 1], [5, 6], [1, 2], [2, 3], [6, 7], [9])
    assert largest_cluster(scene, [5, 3, 1, 0, 4, 2]) == [3, 0, 2]
    assert largest_cluster(scene, [1, 0]) == [1]
    assert largest_cluster(scene, []) == []
    assert scene.covisibility([0, 2, 1]).tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 2]]


def test_poses_are_averaged() -> None:
    a, b = (make_pose(so3_exp([0, s * 0.2, 0]), [s, 1.0, 0.0]) for s in (-1.0, 1.0))
    middle = average_pose([a, b], [1.0, 1.0])
    assert np.allclose(middle, make_pose(np.eye(3), [0, 1, 0]))
    nearer = average_pose([a, b], [3.0, 1.0])
    assert nearer[0, 3] == pytest.approx(-0.5)
    assert rotation_angle_deg(nearer[:3, :3].T @ a[:3, :3]) < rotation_angle_deg(nearer[:3, :3].T @ b[:3, :3])
    for poses, weights in (([], []), ([a], [0.0]), ([a, b], [1.0]), ([a], [np.nan])):
        with pytest.raises(MapError):
            average_pose(poses, weights)


def test_similar_images_weigh_more() -> None:
    weights = similarity_weights(np.array([1.0, 0.0]), np.array([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
    assert weights == pytest.approx([1.0, 0.5**4, 0.0])


def test_a_colmap_model_is_a_scene(tmp_path: Path) -> None:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_points3D = 30
    model = pycolmap.synthesize_dataset(options)
    model.write(str(tmp_path))
    scene = read_scene(tmp_path)
    assert len(scene.images) == model.num_reg_images()
    assert len(scene.points) == model.num_points3D()
    by_name = {str(image.name): image for image in model.images.values()}
    for view in scene.images:
        image = by_name[view.name]
        assert np.allclose(view.T_camera_map[:3], image.cam_from_world().matrix())
        ids = {p.point3D_id for p in image.points2D if p.has_point3D()}
        assert set(scene.point_ids[view.point_rows].tolist()) == ids
    for ident, xyz, length in zip(scene.point_ids, scene.points, scene.track_lengths, strict=True):
        assert np.allclose(model.points3D[int(ident)].xyz, xyz)
        assert model.points3D[int(ident)].track.length() == length
    with pytest.raises(MapError, match="COLMAP model"):
        read_scene(tmp_path / "absent")
