# SPDX-License-Identifier: Apache-2.0
"""A robot's TF in a bag: what is played to the nodes, and what is left for them to find out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from robot_bag import T_BASE_CAMERA, T_MAP_ODOM, add_robot

from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.bags.truth import BagTransforms
from kfloc_ros.bags.writer import write_bag
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.replay.evaluate import replay_records, transform_accuracy
from kfloc_ros.replay.recording import Played, PoseSeen, Recording, TransformSeen
from kfloc_ros.types import Matrix

S = 10**9


@pytest.fixture(scope="module")
def bag(room, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "robot"
    write_bag(room, path, depth=False)
    return add_robot(path)


def test_the_map_is_left_out_and_the_odometry_found(bag: Path) -> None:
    with BagStream(bag) as stream:
        transforms = BagTransforms(stream, "map", "base_link")
        said = {(edge.parent, edge.child) for event in transforms.moving(ReplayRange()) for edge in event.edges}
        assert [(edge.parent, edge.child) for edge in transforms.static] == [("base_link", "camera")]
        half = list(transforms.moving(ReplayRange(duration_s=stream.duration_s / 2)))
        assert 0 < len(half) < len(list(transforms.moving(ReplayRange())))
    assert said == {("odom", "base_footprint"), ("base_footprint", "base_link")}
    assert transforms.odom_frame == "odom"
    np.testing.assert_allclose(transforms.T_base_camera(S), T_BASE_CAMERA, atol=1e-9)


def test_without_odometry_the_base_is_the_root(room, tmp_path: Path) -> None:
    path = tmp_path / "cart"
    write_bag(room, path, depth=False)
    with BagStream(add_robot(path, odometry=False)) as stream:
        assert BagTransforms(stream, "map", "base_link").odom_frame == ""


def test_a_frame_that_leads_nowhere_is_refused_with_those_there_are(bag: Path) -> None:
    with BagStream(bag) as stream, pytest.raises(SourceError, match=r"'arm' to 'camera'.*base_link, camera, odom"):
        BagTransforms(stream, "map", "arm")


def pose_seen(T: Matrix, stamp_ns: int) -> PoseSeen:
    xyz, xyzw = tuple(T[:3, 3]), tuple(matrix_to_quaternion(T[:3, :3]))
    return PoseSeen(stamp_ns, stamp_ns, "map", xyz, xyzw, tuple(np.diag([1e-4] * 3 + [4e-4] * 3).reshape(-1)))


def test_poses_of_the_base_are_judged_as_the_cameras(bag: Path, room) -> None:
    frame = room[3]
    T_map_base = frame.T_map_camera @ inverse_pose(T_BASE_CAMERA)
    recording = Recording(played=[Played(frame.stamp_ns, 0)], poses=[pose_seen(T_map_base, frame.stamp_ns)])
    with BagStream(bag) as stream:
        records = replay_records(recording, {}, {}, BagTransforms(stream, "map", "base_link"))
    np.testing.assert_allclose(records[0].estimate, frame.T_map_camera, atol=1e-9)
    lever_m = np.linalg.norm(T_BASE_CAMERA[:3, 3])
    assert np.trace(records[0].covariance[:3, :3]) == pytest.approx(3e-4 + 2 * 4e-4 * lever_m**2)


@pytest.mark.thorough
@pytest.mark.parametrize("error_m", [0.0, 0.03])
def test_tf_is_judged_at_the_times_of_the_images(bag: Path, room, error_m: float) -> None:
    T = T_MAP_ODOM @ make_pose(so3_exp([0.0, 0.0, 0.0]), [error_m, 0.0, 0.0])
    xyz, xyzw = tuple(T[:3, 3]), tuple(matrix_to_quaternion(T[:3, :3]))
    first_ns, last_ns = room[2].stamp_ns, room[20].stamp_ns
    recording = Recording(
        played=[Played(room[i].stamp_ns, 0) for i in range(1, 40)],
        map_transforms=[TransformSeen("odom", stamp_ns, xyz, xyzw) for stamp_ns in (first_ns, last_ns)],
    )
    truth = {room[i].stamp_ns: room[i].T_map_camera for i in range(1, 40)}
    with BagStream(bag) as stream:
        result = transform_accuracy(recording, truth, BagTransforms(stream, "map", "base_link"))
    assert (result.frames, result.localized) == (39, 19), "before the first and after the last it does not answer"
    assert result.recall["1cm_1deg"] == pytest.approx(0.0 if error_m else 19 / 39)
    assert result.recall["5cm_5deg"] == pytest.approx(19 / 39)
