# SPDX-License-Identifier: Apache-2.0
"""The benchmark datasets on small folders of their layout, which the tests make."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.scenes import CAMBRIDGE, DEEPLOC, SEVEN_SCENES, TWELVE_SCENES, find_scene
from kfloc_ros.errors import ConfigError, SourceError
from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, so3_exp


def write_image(path: Path, width: int, height: int, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), value, dtype=np.uint8))


def seven_scenes_frame(folder: Path, number: int, value: int) -> None:
    write_image(folder / f"frame-{number:06d}.color.png", 640, 480, value)
    np.savetxt(folder / f"frame-{number:06d}.pose.txt", make_pose(np.eye(3), [value, 0, 0]))


def test_tables_have_what_was_published() -> None:
    """Counts from the code's list lengths: training and test sequences of each scene."""
    lengths = {name: (len(scene.train), len(scene.test)) for name, scene in SEVEN_SCENES.items()}
    assert lengths == {
        "chess": (4, 2),
        "fire": (2, 2),
        "heads": (1, 1),
        "office": (6, 4),
        "pumpkin": (4, 2),
        "redkitchen": (7, 5),
        "stairs": (4, 2),
    }
    assert all(not set(scene.train) & set(scene.test) for scene in SEVEN_SCENES.values())
    assert len(TWELVE_SCENES) == 12
    assert CAMBRIDGE["GreatCourt"].scale == 0.01 and CAMBRIDGE["ShopFacade"].image_size == (848, 480)
    assert DEEPLOC["DeepLoc"].image_size == (864, 480) and DEEPLOC["DeepLoc"].scale == 0.02
    assert all(
        w % 8 == 0 and h % 8 == 0 for t in (SEVEN_SCENES, CAMBRIDGE) for w, h in (s.image_size for s in t.values())
    )


def test_scenes_are_found_by_the_names_that_both_the_data_and_the_code_give_them() -> None:
    assert find_scene("Fire") is SEVEN_SCENES["fire"]
    for name in ("apt1/kitchen", "apt1-kitchen"):
        assert find_scene(name) is TWELVE_SCENES["apt1/kitchen"]
    assert find_scene("gates362") is TWELVE_SCENES["office1/gates362"]
    assert find_scene("Street-east") is CAMBRIDGE["Street-east"] and find_scene("deeploc") is DEEPLOC["DeepLoc"]
    with pytest.raises(ConfigError, match="several scenes 'kitchen': apt1/kitchen, apt2/kitchen"):
        find_scene("kitchen")
    with pytest.raises(ConfigError, match=r"no scene 'attic'.*7-Scenes: chess"):
        find_scene("attic")


@pytest.mark.parametrize("listed", [True, False])
def test_official_split_of_seven_scenes(tmp_path: Path, listed: bool) -> None:
    root = tmp_path / "heads"
    for sequence in (1, 2, 3):
        for number in range(2):
            seven_scenes_frame(root / f"seq-{sequence:02d}", number, 10 * sequence + number)
    if listed:
        (root / "TrainSplit.txt").write_text("sequence2\nsequence3\n")
    train = open_source(f"7scenes:{root}@train")
    assert [int(frame.image[0, 0, 0]) for frame in train] == ([20, 21, 30, 31] if listed else [20, 21])
    assert list(train.indices()) == list(range(len(train)))
    test = open_source(f"7scenes:{root}@test")
    assert [int(frame.image[0, 0, 0]) for frame in test] == [10, 11]
    if listed:
        gaps = np.diff([frame.stamp_ns for frame in train]) / 1e9
        assert [gap > 1 for gap in gaps] == [False, True, False]


def test_missing_sequences_are_named(tmp_path: Path) -> None:
    root = tmp_path / "chess"
    seven_scenes_frame(root / "seq-01", 0, 1)
    with pytest.raises(SourceError, match="lacks seq-02, seq-04, seq-06"):
        open_source(f"7scenes:{root}@train")
    with pytest.raises(SourceError, match=r"TrainSplit.txt and is not named"):
        open_source(f"7scenes:{tmp_path}@train")


INFO = """\
m_versionNumber = 4
m_colorWidth = 128
m_colorHeight = 96
m_depthWidth = 64
m_depthHeight = 48
m_calibrationColorIntrinsic = 115 0 64 0 0 116 48 0 0 0 1 0 0 0 0 1
m_calibrationDepthIntrinsic = 57 0 32 0 0 58 24 0 0 0 1 0 0 0 0 1
"""


def twelve_scenes(root: Path) -> None:
    (root / "data").mkdir(parents=True)
    (root / "info.txt").write_text(INFO)
    (root / "split.txt").write_text(
        "sequence0 [frames=2]  [start=0 ; end=1]\nsequence1 [frames=3]  [start=2 ; end=4]\n"
        "sequence2 [frames=1]  [start=5 ; end=5]\n"
    )
    for number in range(6):
        stem = root / "data" / f"frame-{number:06d}"
        write_image(stem.with_suffix(".color.jpg"), 128, 96, 20 * number)
        depth = np.full((48, 64), 2000 + number, dtype=np.uint16)
        assert cv2.imwrite(str(stem.with_suffix(".depth.png")), depth)
        pose = np.full((4, 4), -np.inf) if number == 3 else make_pose(np.eye(3), [number, 0, 0])
        np.savetxt(stem.with_suffix(".pose.txt"), pose)


def test_twelve_scenes(tmp_path: Path) -> None:
    root = tmp_path / "apt1" / "kitchen"
    twelve_scenes(root)
    train, test = (open_source(f"12scenes:{root}@{part}") for part in ("train", "test"))
    assert list(test.indices()) == [0, 1] and list(train.indices()) == [2, 3, 4, 5]
    assert len(open_source(f"12scenes:{root}")) == 6
    assert (train.camera.width, train.camera.fx, train.camera.cy) == (128, 115.0, 48.0)
    frames = list(train)
    assert [frame.T_map_camera is None for frame in frames] == [False, True, False, False]
    depth = frames[0].depth_m
    assert depth is not None and depth.shape == (96, 128)
    assert depth[48, 64] == pytest.approx(2.002)
    assert [gap > 1e9 for gap in np.diff([frame.stamp_ns for frame in frames])] == [False, False, True]
    (root / "info.txt").write_text("m_colorWidth = 128\n")
    with pytest.raises(SourceError, match="calibration"):
        open_source(f"12scenes:{root}")


def test_cambridge(tmp_path: Path) -> None:
    root = tmp_path / "ShopFacade"
    pose = make_pose(so3_exp([0.3, -0.2, 0.5]), [1.0, 2.0, 3.0])
    x, y, z, w = matrix_to_quaternion(pose[:3, :3].T)  # the list has world-to-camera rotations
    for part, names in (("train", ("seq1/frame00002.png", "seq1/frame00001.png")), ("test", ("seq2/frame00001.png",))):
        lines = ["Visual Landmark Dataset V1", "ImageFile, Camera Position [X Y Z W P Q R]", ""]
        for name in names:
            write_image(root / name, 192, 108, 50)
            lines.append(f"{name} 1.0 2.0 3.0 {w} {x} {y} {z}")
        (root / f"dataset_{part}.txt").write_text("\n".join(lines))
    train = open_source(f"cambridge:{root}@train")
    assert [frame.name for frame in train] == ["seq1/frame00001.png", "seq1/frame00002.png"]
    assert train.camera.fx == pytest.approx(192 * 744 / 852)
    truth = train[0].T_map_camera
    assert truth is not None and np.allclose(truth, pose, atol=1e-6)
    assert len(open_source(f"cambridge:{root}")) == 3
    (root / "reconstruction.nvm").write_text("NVM_V3\n\n1\nseq1/frame00001.jpg\t170.5 1 0 0 0 0 0 0 -0.1 0\n")
    assert open_source(f"cambridge:{root}@test").camera.fx == pytest.approx(NVM_FOCAL)
    (root / "dataset_test.txt").write_text("a\nb\n\nseq2/frame00001.png 1 2 3\n")
    with pytest.raises(SourceError, match="X Y Z W P Q R"):
        open_source(f"cambridge:{root}@test")


def test_deeploc(tmp_path: Path) -> None:
    root = tmp_path / "DeepLoc"
    pose = make_pose(so3_exp([0.3, -0.2, 0.5]), [1.0, 2.0, 3.0])
    x, y, z, w = matrix_to_quaternion(pose[:3, :3])
    for part, names in (("train", ("Image_10", "Image_9")), ("test", ("Image_3",))):
        for name in names:
            write_image(root / part / "LeftImages" / f"{name}.png", 128, 72, int(name.split("_")[1]))
        lines = [f"{name} 1.0 2.0 3.0 {w} {x} {y} {z}\n" for name in names]
        (root / part / "poses.txt").write_text("".join(lines))
    with pytest.raises(SourceError, match="width height fx fy cx cy"):
        open_source(f"deeploc:{root}@train")
    (root / "camera.txt").write_text("1280 720 700 700 639.5 359.5\n")
    train, test, both = (open_source(f"{root}{part}") for part in ("@train", "@test", ""))
    assert [frame.name for frame in train] == ["train/Image_9", "train/Image_10"]
    assert [int(frame.image[0, 0, 0]) for frame in train] == [9, 10]
    assert train.camera.fx == pytest.approx(70.0) and train.camera.width == 128
    truth = test[0].T_map_camera
    assert truth is not None and np.allclose(truth, pose, atol=1e-6)
    gaps = np.diff([frame.stamp_ns for frame in both]) / 1e9
    assert [gap > 1 for gap in gaps] == [False, True]
    (root / "test" / "poses.txt").write_text("../../other 1 2 3 1 0 0 0\n")
    with pytest.raises(SourceError, match="leads out"):
        open_source(f"deeploc:{root}@test")
    (root / "test" / "poses.txt").write_text("Image_3 1 2 3\n")
    with pytest.raises(SourceError, match="qw qx qy qz"):
        open_source(f"deeploc:{root}@test")


NVM_FOCAL = 170.5
