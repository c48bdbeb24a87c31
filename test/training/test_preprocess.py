# SPDX-License-Identifier: Apache-2.0
"""PixLoc's training data from COLMAP models: overlaps, images on their side, depth; what is written is trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from poster import CAMERA, Poster, colour_difference

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.training.pixloc_samples import PairRule
from kfloc_ros.training.preprocess import (
    preprocess_megadepth,
    quarter_turns,
    read_depth,
    read_model,
    shares_of_common_points,
)
from kfloc_ros.training.preprocessed import CMU_CAMERAS, open_preprocessed

RULE = PairRule(resize=96, resize_by="shorter", crop=90, points=64, min_overlap=0.2)
GRID = np.stack(np.meshgrid(np.linspace(-1.5, 2.0, 60), np.linspace(-1.5, 1.5, 50), [2.0]), -1).reshape(-1, 3)
"""Points of the poster."""
TURN = np.eye(4)
TURN[:2, :2] = [[0, -1], [1, 0]]
"""The camera of an image that lies on its right side: its x axis points down."""


def write_model(folder: Path, views: list[tuple[str, Camera, np.ndarray]]) -> None:
    """A COLMAP model as text, whose images see every point of the poster that is in them."""
    folder.mkdir(parents=True)
    cameras, images, tracks = [], [], [list[str]() for _ in GRID]
    for k, (name, camera, T_map_camera) in enumerate(views, start=1):
        T = inverse_pose(T_map_camera)
        local = GRID @ T[:3, :3].T + T[:3, 3]
        uv = local[:, :2] / local[:, 2:] * [camera.fx, camera.fy] + [camera.cx, camera.cy]
        rows = np.flatnonzero(((uv >= 0) & (uv <= [camera.width - 1, camera.height - 1])).all(1))
        x, y, z, w = matrix_to_quaternion(T[:3, :3])
        cameras.append(
            f"{k} PINHOLE {camera.width} {camera.height} {camera.fx} {camera.fy} {camera.cx + 0.5} {camera.cy + 0.5}"
        )
        seen = " ".join(f"{u + 0.5} {v + 0.5} {row + 1}" for row, (u, v) in zip(rows, uv[rows], strict=True))
        images += [f"{k} {w} {x} {y} {z} {T[0, 3]} {T[1, 3]} {T[2, 3]} {k} {name}", seen]
        for place, row in enumerate(rows):
            tracks[row].append(f"{k} {place}")
    points = [
        f"{row + 1} {p[0]} {p[1]} {p[2]} 0 0 0 0.1 {' '.join(track)}"
        for row, (p, track) in enumerate(zip(GRID, tracks, strict=True))
        if track
    ]
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def megadepth(root: Path, scene: str = "hall", turned: int = 1) -> Path:
    """A scene of four views; one of their files lies on its right side."""
    folder = root / "megadepth" / "Undistorted_SfM" / scene
    (folder / "images").mkdir(parents=True)
    views = []
    for k in range(4):
        frame = Poster()[2 * k]
        image, camera, T = frame.image, CAMERA, frame.T_map_camera
        assert T is not None
        if k == turned:
            image = np.rot90(image, -1)
            camera = Camera(96, 128, CAMERA.fy, CAMERA.fx, 95 - CAMERA.cy, CAMERA.cx)
            T = T @ inverse_pose(TURN)
        cv2.imwrite(str(folder / "images" / f"{k}.png"), np.ascontiguousarray(image[..., ::-1]))
        views.append((f"{k}.png", camera, T))
    write_model(folder / "sparse", views)
    return folder


def test_a_model_becomes_a_scene_that_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    megadepth(tmp_path)
    base = ["pixloc", "preprocess", "megadepth", str(tmp_path)]
    assert main(base) == 0
    assert ", 0 pairs" in capsys.readouterr().out  # images of 96 pixels are too small by default
    scene = tmp_path / "megadepth_pixloc_training" / "hall.npz"
    scene.unlink()
    assert main([*base, "--min-side", "64"]) == 0
    assert ", 12 pairs" in capsys.readouterr().out
    samples = open_preprocessed("megadepth", tmp_path, RULE, 0, 0.0).training
    seen = set()
    for number in range(12):
        pairs = samples[number]
        seen.add(tuple(pairs.query.shape[-2:]))
        assert colour_difference(pairs) < 0.04 < colour_difference(pairs, roll=7)
    assert seen == {(90, 90)}  # upright, all of them
    before = scene.stat().st_mtime_ns
    assert main([*base, "--min-side", "64"]) == 0
    assert "exists already" in capsys.readouterr().out and scene.stat().st_mtime_ns == before
    monkeypatch.setattr(unet, "BLOCK_CHANNELS", (8, 16, 32, 32, 32))
    words = ["steps=1", "batch=2", "resize=96", "crop=96", "points=32", "iterations=2", "validation_share=0"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["train", "pixloc", f"megadepth:{tmp_path}", *out, *words]) == 0
    scene.write_bytes(scene.read_bytes()[:500])
    assert main(["train", "pixloc", f"megadepth:{tmp_path}", *out, *words]) == 2
    assert "remove it and preprocess again" in capsys.readouterr().err


def test_a_slice_of_cmu_with_queries_near_its_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "CMU" / "slice8"
    camera = CMU_CAMERAS["c0"]
    views, lines = [], []
    for k in range(4):
        T = Poster()[k].T_map_camera
        assert T is not None
        kind, name = ("database", f"img_{k}_c0_1.jpg") if k % 2 == 0 else ("query", f"img_{k}_c0_2.jpg")
        (folder / kind).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / kind / name), np.zeros((camera.height, camera.width, 3), dtype=np.uint8))
        if kind == "database":
            views.append((name, CAMERA, T))
        else:
            x, y, z, w = matrix_to_quaternion(T[:3, :3].T)
            far = 50.0 if k == 3 else 0.0
            lines.append(f"{name} {w} {x} {y} {z} {T[0, 3] + far} {T[1, 3]} {T[2, 3]}\n")
    (folder / "camera-poses").mkdir()
    (folder / "camera-poses" / "slice-queries.txt").write_text("".join(lines))
    write_model(tmp_path / "sfm" / "slice8", views)
    base = ["pixloc", "preprocess", "cmu", str(tmp_path), "--sfm", f"{tmp_path}/sfm/{{}}"]
    assert main(base) == 0
    # each reference overlaps with the other; the second query is 50 m away from both
    assert "2 images" in (out := capsys.readouterr().out) and ", 1 pairs" in out
    parts = open_preprocessed("cmu", tmp_path, RULE, 0, 0.1)
    assert len(parts.training) == 1 and parts.held_out is None
    assert main([*base, "--depth", "x"]) == 2
    (folder / "camera-poses" / "slice-queries.txt").write_text("img 1 2 3\n")
    (tmp_path / "cmu_pixloc_training" / "slice8.npz").unlink()
    assert main(base) == 2
    assert "name qw qx qy qz cx cy cz" in capsys.readouterr().err


def test_depth_adds_points_where_the_surface_is(tmp_path: Path) -> None:
    """Without a point of the reconstruction, views overlap by their depth alone; a hidden surface is not seen."""
    folder = megadepth(tmp_path, turned=-1)
    model = read_model(folder / "sparse")
    (tmp_path / "depth").mkdir()
    for k in range(4):
        depth = Poster()[2 * k].depth_m
        assert depth is not None
        depth = depth if k < 3 else depth / 2  # something stands in front of the last camera
        if k == 1:
            cv2.imwrite(str(tmp_path / "depth" / "1.png"), np.round(depth * 1000).astype(np.uint16))
        else:
            np.save(tmp_path / "depth" / f"{k}.npy", depth)
    bare = type(model)(model.names, model.cameras, model.T_camera_world, np.zeros((0, 3)), [np.zeros(0, np.int64)] * 4)
    scene = preprocess_megadepth(bare, depths=tmp_path / "depth", min_side_px=64)
    assert len(scene["points3D"]) == 4000
    overlap = scene["overlap_matrix"]
    assert (overlap[0, 1], overlap[1, 2]) > (0.5, 0.5) and overlap[0, 3] == overlap[3, 1] == -1
    assert np.allclose(scene["points3D"][:3000, 2], 2.0, atol=2e-3)
    with pytest.raises(SourceError, match=r"no depth for 'other.jpg'"):
        read_depth(tmp_path / "depth", "other.jpg", CAMERA)
    np.save(tmp_path / "depth" / "wide.npy", np.ones((96, 130)))
    with pytest.raises(SourceError, match="not 128x96"):
        read_depth(tmp_path / "depth", "wide.png", CAMERA)


def test_shares_are_those_of_sets() -> None:
    rng = np.random.default_rng(0)
    observed = [np.unique(rng.integers(0, 300, 120)) for _ in range(5)] + [np.zeros(0, dtype=np.int64)]
    shares = shares_of_common_points(observed, 300, 30)
    for i, a in enumerate(observed):
        for j, b in enumerate(observed):
            common = len(set(a.tolist()) & set(b.tolist()))
            assert shares[i, j] == (common / len(a) if i != j and common >= 30 else -1.0)


def test_images_on_their_side_are_found() -> None:
    quarter = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    upright = np.eye(3)
    stack = np.stack([upright] * 5 + [np.linalg.matrix_power(quarter.T, k) @ upright for k in (1, 2, 3)])
    assert quarter_turns(stack).tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_distorted_models_and_missing_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = megadepth(tmp_path)
    cameras = folder / "sparse" / "cameras.txt"
    first, *others = cameras.read_text().splitlines()
    assert first.split()[1] == "PINHOLE"
    cameras.write_text("\n".join(["1 SIMPLE_RADIAL 128 96 110 64.5 48.5 0.1", *others]))
    assert main(["pixloc", "preprocess", "megadepth", str(tmp_path)]) == 2
    assert "is distorted" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["pixloc", "preprocess", "megadepth", str(tmp_path), "--scenes", "hall"]) == 2
    assert main(["pixloc", "preprocess", "cmu", str(tmp_path)]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_poses_of_turned_images_are_those_of_the_upright_ones(tmp_path: Path) -> None:
    model = read_model(megadepth(tmp_path) / "sparse")
    scene = preprocess_megadepth(model, min_side_px=64)
    assert scene["rotations"].tolist() == [0, 1, 0, 0]
    truth = Poster()[2].T_map_camera
    assert truth is not None
    pose = make_pose(scene["poses"][1][:, :3], scene["poses"][1][:, 3])
    assert np.allclose(inverse_pose(pose), truth, atol=1e-9)
    assert np.allclose(scene["intrinsics"][1], CAMERA.K, atol=1e-9)
