# SPDX-License-Identifier: Apache-2.0
"""The truth of a replay: topic, TF, file, and none that is made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grey_frames import PERIOD_NS, START_NS, Grey, pose
from robot_bag import add_transforms

from kfloc_ros.bags.stream import BagStream
from kfloc_ros.bags.truth import at_stamps, read_truth
from kfloc_ros.bags.writer import write_bag
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.messages.poses import tum_text


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "grey"
    write_bag(Grey(), path)
    return path


def assert_is_true(poses: object) -> None:
    assert isinstance(poses, dict) and len(poses) == 10
    for i in range(10):
        assert np.allclose(poses[START_NS + i * PERIOD_NS], pose(i), atol=1e-6)


@pytest.mark.parametrize("choice", [None, "/ground_truth/pose", "tf:map:camera_ground_truth"])
def test_topic_and_tf_of_the_bag(bag: Path, choice: str | None) -> None:
    with BagStream(bag) as stream:
        assert_is_true(read_truth(stream, choice).poses)


def test_a_tum_file_is_brought_to_the_stamps_of_the_images(bag: Path, tmp_path: Path) -> None:
    file = tmp_path / "truth.tum"
    file.write_text(tum_text((START_NS + int((i - 0.5) * PERIOD_NS), pose(i - 0.5)) for i in range(12)))
    with BagStream(bag) as stream:
        truth = read_truth(stream, str(file))
    assert truth.name == "truth.tum"
    assert_is_true(truth.poses)


def test_nothing_is_interpolated_over_a_gap_nor_beyond_the_ends() -> None:
    poses = {0: pose(0), PERIOD_NS: pose(1), 10 * PERIOD_NS: pose(10)}
    found = at_stamps(poses, [-1, 0, PERIOD_NS // 2, 5 * PERIOD_NS, 11 * PERIOD_NS])
    assert sorted(found) == [0, PERIOD_NS // 2]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("/camera/camera_info", "no topic '/camera/camera_info' with poses"),
        ("tf:map", "is written tf:MAP:CAMERA"),
        ("tf:map:wheel", "it has camera_ground_truth, map"),
        ("nowhere.tum", "no topic, no tf:MAP:CAMERA, and no file"),
    ],
)
def test_truth_that_is_not_there_is_refused_in_words(bag: Path, choice: str, said: str) -> None:
    with BagStream(bag) as stream, pytest.raises(SourceError, match=said):
        read_truth(stream, choice)


def test_images_of_some_stamps(bag: Path) -> None:
    with BagStream(bag) as stream:
        images = stream.images({START_NS + 3 * PERIOD_NS, 17})
    assert list(images) == [START_NS + 3 * PERIOD_NS]
    assert abs(int(images[START_NS + 3 * PERIOD_NS].mean()) - 60) < 4


def test_truth_of_another_frame_comes_to_the_camera_through_tf_static(bag: Path, tmp_path: Path) -> None:
    T_base_camera = make_pose(so3_exp([-1.2, 1.2, -1.2]), [0.2, 0.0, 0.4])
    mounted = tmp_path / "mounted"
    write_bag(Grey(), mounted)
    add_transforms(mounted, [("base_link", "camera", START_NS, T_base_camera)])
    path = tmp_path / "base.tum"
    path.write_text(tum_text((START_NS + i * PERIOD_NS, pose(i) @ inverse_pose(T_base_camera)) for i in range(10)))
    with BagStream(mounted) as stream:
        assert_is_true(read_truth(stream, str(path), "base_link").poses)
    with BagStream(bag) as stream, pytest.raises(SourceError, match=r"of 'base_link'.*'camera'.*--truth-of"):
        read_truth(stream, str(path), "base_link")
