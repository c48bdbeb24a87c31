# SPDX-License-Identifier: Apache-2.0
"""PixLoc's own training data, in the layout its preprocessing writes: pairs are right, and nothing is unpickled."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from poster import colour_difference

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.training.pixloc_samples import PairRule
from kfloc_ros.training.preprocessed import CMU_CAMERAS, open_preprocessed

RULE = PairRule(resize=160, resize_by="shorter", crop=140, points=64, min_overlap=0.2)


def seen_points(room: Any, T: np.ndarray, camera: Camera, points: np.ndarray) -> np.ndarray:
    """Rows of the points that a view sees and that nothing hides: the room is convex."""
    P = points @ inverse_pose(T)[:3, :3].T + inverse_pose(T)[:3, 3]
    in_front = P[:, 2] > 0.1
    uv = cv2.projectPoints(P[in_front], np.zeros(3), np.zeros(3), camera.K, np.array(camera.distortion or (0.0,) * 4))
    inside = ((uv[0][:, 0] >= 0) & (uv[0][:, 0] <= [camera.width - 1, camera.height - 1])).all(1)
    near = np.abs(P[in_front][:, :2] / P[in_front][:, 2:]).max(1) < 1.0  # beyond, the lens model folds
    return np.flatnonzero(in_front)[inside & near]


def cloud(room: Any) -> np.ndarray:
    """Points on the walls."""
    frame = room[0]
    found = []
    for k in (0, 4, 8):
        frame = room[k]
        v, u = np.mgrid[2:250:6, 2:318:6].reshape(2, -1)
        z = frame.depth_m[v, u]
        P = np.stack([(u - frame.camera.cx) / frame.camera.fx * z, (v - frame.camera.cy) / frame.camera.fy * z, z], 1)
        found.append(P @ frame.T_map_camera[:3, :3].T + frame.T_map_camera[:3, 3])
    return np.concatenate(found)


def world_to_camera(T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return inverse_pose(T)[:3, :3], inverse_pose(T)[:3, 3]


def overlap_of(observed: list[np.ndarray]) -> np.ndarray:
    overlap = np.full((len(observed),) * 2, -1.0)
    for i, a in enumerate(observed):
        for j, b in enumerate(observed):
            if i != j:
                overlap[i, j] = len(np.intersect1d(a, b)) / len(a)
    return overlap


def write_megadepth(root: Path, room: Any, scene: str = "0001") -> None:
    """A scene whose second image lies on its side in its file, as the original leaves such images."""
    images = root / "megadepth" / "Undistorted_SfM" / scene / "images"
    images.mkdir(parents=True)
    points = cloud(room)
    names, Ks, poses, observed = [], [], [], []
    for k in range(4):
        frame = room[3 * k]
        names.append(f"{k}.png")
        on_disk = np.rot90(frame.image, -1) if k == 1 else frame.image
        cv2.imwrite(str(images / names[-1]), np.ascontiguousarray(on_disk[..., ::-1]))
        Ks.append(np.array(frame.camera.K))
        poses.append(world_to_camera(frame.T_map_camera))
        observed.append(seen_points(room, frame.T_map_camera, frame.camera, points))
    content = {
        "points3D": points,
        "track_lengths": np.full(len(points), 3),
        "intrinsics": Ks,
        "poses": poses,
        "p3D_observed": observed,
        "image_names": names,
        "rotations": np.array([0, 1, 0, 0]),
        "overlap_matrix": overlap_of(observed),
        "angle_matrix": np.zeros((4, 4)),
    }
    folder = root / "megadepth_pixloc_training"
    folder.mkdir(exist_ok=True)
    (folder / f"{scene}.pkl").write_bytes(pickle.dumps(content))


def write_cmu(root: Path, room: Any, name: str) -> None:
    """A slice of two references and two queries, seen through the car's left camera, halved."""
    camera = CMU_CAMERAS["c0"]
    points = cloud(room)
    content: dict[str, Any] = {"points3D": points, "p3D_observed": [], "track_lengths": np.full(len(points), 3)}
    for kind, folder, start in (("ref", "database", 0), ("query", "query", 1)):
        images = root / "CMU" / name / folder
        images.mkdir(parents=True)
        content[f"{kind}_image_names"], content[f"{kind}_poses"] = [], []
        for k in range(2):
            T = room[2 * k + start].T_map_camera
            image_name = f"img_{kind}{k}_c0_1.jpg"
            cv2.imwrite(str(images / image_name), room.view(T, 0, camera).image[..., ::-1])
            content[f"{kind}_image_names"].append(image_name)
            content[f"{kind}_poses"].append(world_to_camera(T))
            if kind == "ref":
                content["p3D_observed"].append(seen_points(room, T, camera, points))
    content["query_closest_indices"] = np.array([0, 1])
    content["ref_overlap_matrix"] = overlap_of(content["p3D_observed"])
    content["query_overlap_matrix"] = content["ref_overlap_matrix"][[0, 1]]
    content["query_to_ref_distance_matrix"] = np.array([[0.1, 0.2], [30.0, 0.1]])
    folder = root / "cmu_pixloc_training"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))


def test_pairs_of_megadepth_show_the_same_points(tmp_path: Path, room: Any) -> None:
    write_megadepth(tmp_path, room)
    parts = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)
    assert parts.held_out is None
    for number in range(6):
        pairs = parts.training[number]
        assert pairs.reference.shape == (1, 3, 140, 140) and pairs.points.shape == (1, 64, 3)
        assert colour_difference(pairs) < 0.05 < 0.07 < colour_difference(pairs, roll=5)
    again = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1).training
    assert torch.equal(again[5].reference, pairs.reference)
    assert not torch.equal(again[6].points, pairs.points)


@pytest.mark.thorough
def test_pairs_of_cmu_show_the_same_points(tmp_path: Path, room: Any) -> None:
    write_cmu(tmp_path, room, "slice8")
    write_cmu(tmp_path, room, "slice6")
    parts = open_preprocessed("cmu", tmp_path, replace(RULE, init="identity", min_overlap=0.1), 0, 0.1)
    assert parts.held_out is not None
    # of the overlaps, which are those of the nearest reference with the others, one pair is too far apart
    assert len(parts.training) == 1
    pairs = parts.training[0]
    assert torch.equal(pairs.T_init.matrix()[0], torch.eye(4).double())
    assert colour_difference(pairs) < 0.06 < colour_difference(pairs, roll=5)


def test_lists_say_what_is_held_out(tmp_path: Path, room: Any) -> None:
    for scene in ("0001", "0002", "0003"):
        write_megadepth(tmp_path, room, scene)
    assert open_preprocessed("megadepth", tmp_path, RULE, 0, 0.0).held_out is None
    by_share = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.4)
    assert by_share.held_out is not None and len(by_share.training) == 2 * len(by_share.held_out)
    folder = tmp_path / "megadepth_pixloc_training"
    (folder / "train_scenes.txt").write_text("0001\n0099\n")
    (folder / "valid_scenes.txt").write_text("0002\n0003\n")
    listed = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.4)
    assert listed.held_out is not None and 2 * len(listed.training) == len(listed.held_out)


def test_scenes_are_chosen_by_name(tmp_path: Path, room: Any) -> None:
    for scene in ("0001", "0002", "0003"):
        write_megadepth(tmp_path, room, scene)
    parts = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.4, (("0001",), ("0002", "0003")))
    assert parts.held_out is not None and 2 * len(parts.training) == len(parts.held_out)
    overlap = pickle.loads((tmp_path / "megadepth_pixloc_training" / "0001.pkl").read_bytes())["overlap_matrix"]
    limited = replace(RULE, max_overlap=float(np.median(overlap[overlap > RULE.min_overlap])))
    few = open_preprocessed("megadepth", tmp_path, limited, 0, 0.0, (("0001",), ()))
    assert 0 < len(few.training) < len(parts.training)
    with pytest.raises(SourceError, match="no scene '0009'; it holds 0001, 0002, 0003"):
        open_preprocessed("megadepth", tmp_path, RULE, 0, 0.4, (("0009",), ()))


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "megadepth_pixloc_training"
    folder.mkdir()
    (folder / "0001.pkl").write_bytes(pickle.dumps({"image_names": _Harmful()}))
    with pytest.raises(SourceError, match="no scene of PixLoc's preprocessing"):
        open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)
    assert not (tmp_path / "unpickled").exists()
    (folder / "0001.pkl").write_bytes(b"\x80\x04not a pickle")
    with pytest.raises(SourceError, match="damaged"):
        open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)
    (folder / "0001.pkl").unlink()
    with pytest.raises(SourceError, match="holds no scenes"):
        open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)


def test_wrong_contents_are_named(tmp_path: Path, room: Any) -> None:
    write_megadepth(tmp_path, room)
    path = tmp_path / "megadepth_pixloc_training" / "0001.pkl"
    good = pickle.loads(path.read_bytes())  # written above
    for key, value in (("overlap_matrix", np.zeros((2, 2))), ("p3D_observed", [np.array([10**7])] * 4)):
        path.write_bytes(pickle.dumps({**good, key: value}))
        with pytest.raises(SourceError, match=r"0001\.pkl"):
            open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)
    path.write_bytes(pickle.dumps({**good, "overlap_matrix": np.zeros((4, 4))}))
    with pytest.raises(SourceError, match="no scene to train on"):
        open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1)


def test_from_the_command_line(
    tmp_path: Path, room: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unet, "BLOCK_CHANNELS", (8, 16, 32, 32, 32))
    write_megadepth(tmp_path, room, "0001")
    write_megadepth(tmp_path, room, "0002")
    base = ["train", "pixloc", f"megadepth:{tmp_path}", "--out", str(tmp_path / "out"), "--device", "cpu"]
    words = ["steps=1", "batch=1", "resize=128", "resize_by=shorter", "crop=96", "points=32", "min_overlap=0.1",
             "iterations=2", "validation_share=0.5", "validation_pairs=1"]  # fmt: skip
    assert main([*base, *words]) == 0
    assert (tmp_path / "out" / "pixloc_best.safetensors").is_file()
    assert main([*base, "--frames", "0:3", *words]) == 2
    assert "parts of its own" in capsys.readouterr().err


def test_the_second_image_was_turned(tmp_path: Path, room: Any) -> None:
    """The test's own scene: without the turn, colours would not agree."""
    write_megadepth(tmp_path, room)
    path = tmp_path / "megadepth_pixloc_training" / "0001.pkl"
    good = pickle.loads(path.read_bytes())  # written above
    overlap = np.full((4, 4), -1.0)
    overlap[0, 1] = 0.9
    path.write_bytes(pickle.dumps({**good, "overlap_matrix": overlap}))
    assert colour_difference(open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1).training[0]) < 0.05
    shifted = [make_pose(so3_exp([0, 0.1, 0]), np.zeros(3)) @ np.vstack([np.c_[R, t], [0, 0, 0, 1]])
               for R, t in good["poses"]]  # fmt: skip
    poses = [good["poses"][0], *[(T[:3, :3], T[:3, 3]) for T in shifted[1:]]]
    path.write_bytes(pickle.dumps({**good, "overlap_matrix": overlap, "poses": poses}))
    assert colour_difference(open_preprocessed("megadepth", tmp_path, RULE, 0, 0.1).training[0]) > 0.05
