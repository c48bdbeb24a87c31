# SPDX-License-Identifier: Apache-2.0
"""``kfloc show`` on files: coordinate maps, flows and result folders, without a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.visualization.cells import CERTAINTY, SIGMA, sigma_picture
from kfloc_ros.visualization.stream_cells import flow_over_images
from kfloc_ros.visualization.trajectory import ESTIMATE_COLOUR, TRUTH_COLOUR, Plan, TrackFrame, read_track

H, W = 12, 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three coordinate maps of a wall, sigma 2 cm on the left and 8 cm on the right; flows one cell to the right."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "images").mkdir()
    for i in range(3):
        rows, columns = np.mgrid[:H, :W].astype(np.float32) / 10
        certainty = np.where(columns < 0.8, 50.0, 12.5)
        np.save(
            folder / f"coord_{i}.npy", np.stack([columns, rows, np.full_like(rows, 2.0), certainty], -1, dtype="f4")
        )
        image = np.full((8 * H, 8 * W, 3), (200, 60 * i, 0), np.uint8)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        if i:
            flow = np.stack([np.ones((H, W)), np.zeros((H, W)), np.where(columns < 0.8, 200.0, 50.0)], -1)
            np.save(folder / f"{i}_{i - 1}_flow.npy", flow.astype(np.float32))
    (folder / "maps.txt").write_text("coord_0.npy\ncoord_1.npy\ncoord_2.npy\n")
    (folder / "images.txt").write_text("".join(f"images/{i}.png\n" for i in range(3)))
    return folder


def show(*words: object) -> int:
    return main(["show", *map(str, words)])


def points_of(path: Path) -> Any:
    head, _, body = path.read_bytes().partition(b"end_header\n")
    assert b"sigma" in head
    return np.frombuffer(body, dtype=[("p", "<f4", 3), ("c", "u1", 3), ("s", "<f4")])


def test_one_file_and_the_original_s_threshold(files: Path, tmp_path: Path) -> None:
    assert show("cells", files / "coord_1.npy", "--out", tmp_path / "a", "--voxel", 0.001) == 0
    assert {path.name for path in (tmp_path / "a" / "cells").iterdir()} == {"000001.ply", "000001.png"}
    assert len(points_of(tmp_path / "a" / "cloud.ply")) == H * W // 2  # 5 cm, as KFNet's viewer
    assert show("cells", files / "coord_1.npy", "--out", tmp_path / "b", "--voxel", 0.001, "--thres", 10) == 0
    assert len(points_of(tmp_path / "b" / "cloud.ply")) == H * W


def test_a_list_with_steps_rotation_and_images(files: Path, tmp_path: Path) -> None:
    words = ["--images", files / "images.txt", "--step", 2, "--rotate", 90, "--no-video", "--inverse"]
    assert show("cells", files / "maps.txt", "--out", tmp_path, *words) == 0
    assert sorted(path.name for path in (tmp_path / "cells").glob("*.png")) == ["000000.png", "000002.png"]
    points = points_of(tmp_path / "cells" / "000002.ply")
    assert np.allclose(points["p"][:, 1], -2.0, atol=1e-5)  # z = 2 m, turned by 90 degrees about x
    assert (points["c"] == (0, 120, 200)).all()  # the image's colour, RGB


def test_flow_as_arrows_over_its_two_images(files: Path, tmp_path: Path, capsys: Any) -> None:
    grid = np.load(files / "1_0_flow.npy")
    here, there = np.zeros((8 * H, 8 * W, 3), np.uint8), np.zeros((8 * H, 8 * W, 3), np.uint8)
    drawn = flow_over_images(grid, here, there, 0.01)[..., 1] > 200
    rows, columns = np.nonzero(drawn)
    assert len(set(rows)) >= 3 and columns.max() <= 8 * 8 + 8  # the right half is above 1 cm
    line = np.flatnonzero(np.diff(np.r_[0, drawn[np.bincount(rows).argmax()].astype(int), 0]))
    assert line[1] - line[0] in range(8, 12)  # one cell

    assert show("flow", files, "--images", files / "images", "--out", tmp_path / "all", "--no-video") == 0
    assert len(list((tmp_path / "all" / "flow").glob("*.png"))) == 2
    pair = [files / "images" / "1.png", files / "images" / "0.png"]
    assert show("flow", files / "1_0_flow.npy", "--images", *pair, "--out", tmp_path / "one", "--thres", 300) == 0
    assert "increase --max-sigma" in capsys.readouterr().out
    assert show("flow", files / "1_0_flow.npy", "--images", pair[0], files / "coord_0.npy", "--out", tmp_path) == 2
    assert show("flow", "7scenes:nowhere", "--out", tmp_path) == 2
    assert "--map DIR" in capsys.readouterr().err


def test_noise_is_bright_where_sure_in_the_original_s_sense() -> None:
    import torch

    variance = torch.tensor([[0.01**2, 0.5**2]])
    usual, inverse = (sigma_picture("", variance, None, scale) for scale in (SIGMA, CERTAINTY))
    assert usual is not None and inverse is not None
    assert usual.rgb[0, 0].sum() < usual.rgb[0, 1].sum() and inverse.rgb[0, 0].sum() > inverse.rgb[0, 1].sum()


def frames_of(count: int = 6) -> list[FrameRecord]:
    records = []
    for i in range(count):
        truth = make_pose(so3_exp([0.0, 0.1 * i, 0.0]), [0.2 * i, 0.0, 0.1 * i * i / count])
        estimate = None if i == 3 else make_pose(truth[:3, :3], truth[:3, 3] + [0.0, 0.0, 0.3])
        state = "LOST" if i == 3 else "TRACKING"
        records.append(FrameRecord(i, 1_000_000_000 + 33_000_000 * i, truth, estimate=estimate, state=state))
    return records


def test_the_trajectory_of_a_result_folder(files: Path, tmp_path: Path, capsys: Any) -> None:
    run = RunInfo(kind="localize", command="", map="", source="7scenes:gone", poses="file", split=None, frames=None,
                  hardware={}, received=6, processed=6, dropped=0, duration_s=1.0)  # fmt: skip
    write_results(tmp_path / "result", frames_of(), run, plots=False)
    track = read_track(tmp_path / "result")
    assert track.source == "7scenes:gone" and len(track.frames) == 6
    assert track.frames[3].estimate is None and track.frames[3].state == "LOST"
    words = ["--images", files / "images", "--out", tmp_path, "--step", 2]
    assert show("trajectory", tmp_path / "result", *words) == 0
    pictures = sorted((tmp_path / "trajectory").glob("*.png"))
    assert [path.stem for path in pictures] == ["000000", "000002", "000004"]
    assert (tmp_path / "trajectory.mp4").stat().st_size > 500
    assert show("trajectory", tmp_path / "result", "--out", tmp_path / "b") == 2  # its source is gone
    assert show("trajectory", tmp_path, "--out", tmp_path / "b") == 2
    assert "gone" in capsys.readouterr().err


def test_the_plan_has_both_paths_in_their_colours() -> None:
    frames = [TrackFrame(r.index, r.truth, r.estimate, r.state) for r in frames_of()]
    plan = Plan(frames)
    start, end = plan.draw(frames, 0), plan.draw(frames, 5)
    for colour in (TRUTH_COLOUR, ESTIMATE_COLOUR):
        counts = [(picture == colour).all(-1).sum() for picture in (start, end)]
        assert counts[1] > counts[0] + 100
