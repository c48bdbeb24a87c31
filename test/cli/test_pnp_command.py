# SPDX-License-Identifier: Apache-2.0
"""``kfloc pnp`` on coordinate maps whose poses are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.cli import main as cli
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.kfnet.reference.files import (
    DEFAULT_CAMERA,
    MapDescription,
    coordinate_map,
    read_coordinates,
    read_description,
    write_coordinates,
    write_description,
    write_flow,
)
from kfloc_ros.types import SceneCoordinates

COUNT = 5


def pose(i: int) -> Matrix:
    return make_pose(so3_exp([0.1 * i, 0.2, -0.1]), [0.3 * i, 1.0, -0.5])


def scene(i: int, pixel_offset: float) -> SceneCoordinates:
    """Exact coordinates of a wavy wall seen from ``pose(i)``; a fifth of the cells wrong and unsure."""
    camera, rng = DEFAULT_CAMERA, np.random.default_rng(i)
    v, u = np.mgrid[:60, :80] * 8.0 + pixel_offset
    z = 2.0 + 0.5 * np.sin(u / 50) + 0.3 * np.cos(v / 40)
    points = np.stack([(u - camera.cx) / camera.fx * z, (v - camera.cy) / camera.fy * z, z], axis=-1)
    T = pose(i)
    points = points @ T[:3, :3].T + T[:3, 3] + rng.normal(0, 0.005, (60, 80, 3))
    bad = rng.random((60, 80)) < 0.2
    points[bad] += rng.normal(0, 1.0, (bad.sum(), 3))
    variance = torch.from_numpy(np.where(bad, 0.5, 0.005) ** 2).float()
    mean = torch.from_numpy(points).float().permute(2, 0, 1).contiguous()
    return SceneCoordinates(mean, variance, torch.ones(60, 80).bool(), 8, pixel_offset)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """As the original leaves it: maps at pixel (8 c, 8 r), nothing else; and a list of true poses."""
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(COUNT):
        write_coordinates(maps, i, scene(i, 0.0))
        np.savetxt(tmp_path / f"gt_{i}.txt", pose(i))
    (tmp_path / "gt_list.txt").write_text("".join(f"gt_{i}.txt\n" for i in range(COUNT)))
    return maps


def test_map_has_the_published_layout(folder: Path) -> None:
    grid = np.load(folder / "coord_2.npy")
    assert grid.shape == (60, 80, 4) and grid.dtype == np.float32
    expected = scene(2, 0.0)
    assert np.allclose(grid[..., :3], expected.mean.permute(1, 2, 0).numpy())
    assert np.allclose(grid[..., 3], 1 / expected.variance.sqrt().numpy())


def test_poses_of_a_folder_against_the_truth(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, gt = tmp_path / "out", str(tmp_path / "gt_list.txt")
    assert cli.main(["pnp", str(folder), "--out", str(out), "--gt", gt, "--jobs", "1"]) == 0
    assert "5 of 5 poses" in capsys.readouterr().out
    result = json.loads((out / "poses.json").read_text())
    assert result["median_translation_m"] < 0.002
    assert result["recall"]["1cm_1deg"] == 1.0
    for i in range(COUNT):
        assert np.allclose(np.loadtxt(out / f"pose_{i}.txt"), pose(i), atol=5e-3)


@pytest.mark.thorough
def test_processes_give_the_same_poses(folder: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        assert cli.main(["pnp", str(folder), "--out", str(tmp_path / f"out{jobs}"), "--jobs", str(jobs)]) == 0
    for i in range(COUNT):
        one, two = (np.loadtxt(tmp_path / f"out{jobs}" / f"pose_{i}.txt") for jobs in (1, 2))
        assert np.array_equal(one, two)


def test_the_pixel_of_a_cell_is_taken_from_the_description(folder: Path, tmp_path: Path) -> None:
    for i in range(COUNT):
        write_coordinates(folder, i, scene(i, 3.5))
    write_description(folder, MapDescription(DEFAULT_CAMERA, 8, 3.5), [])
    assert read_description(folder).pixel_offset == 3.5
    out = tmp_path / "out"
    assert cli.main(["pnp", str(folder), "--out", str(out), "--jobs", "1"]) == 0
    assert np.allclose(np.loadtxt(out / "pose_3.txt"), pose(3), atol=5e-3)


def test_a_map_without_a_pose_is_nan_and_the_exit_code_says_so(folder: Path, tmp_path: Path) -> None:
    grid = np.load(folder / "coord_0.npy")
    grid[..., :3] = np.random.default_rng(0).normal(0, 3, (60, 80, 3))
    np.save(folder / "coord_0.npy", grid)
    (tmp_path / "one.txt").write_text("maps/coord_0.npy\n")
    assert cli.main(["pnp", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out")]) == 1
    assert np.isnan(np.loadtxt(tmp_path / "out" / "pose_0.txt")).all()
    assert "inliers" in json.loads((tmp_path / "out" / "poses.json").read_text())["poses"][0]["reason"]


def test_wrong_inputs_are_sentences(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--jobs", "1"]
    (tmp_path / "short.txt").write_text("gt_0.txt\n")
    for arguments, words in (
        ([str(folder), "--gt", str(tmp_path / "short.txt")], "1 poses for 5"),
        ([str(tmp_path), *[]], "no coord_<i>.npy"),
        ([str(tmp_path / "missing.txt")], "missing.txt"),
        ([str(folder), "--camera", "320", "240", "260", "260", "160", "120"], "--camera"),
    ):
        assert cli.main(["pnp", *arguments, *out]) == 2
        assert words in capsys.readouterr().err
    np.save(folder / "coord_0.npy", np.zeros((3, 4)))
    with pytest.raises(SourceError, match="h x w x 4"):
        read_coordinates(folder / "coord_0.npy", MapDescription())


def test_invalid_cells_have_no_confidence_and_come_back_invalid(tmp_path: Path) -> None:
    coordinates = scene(0, 0.0)
    coordinates.valid[3, 4] = False
    coordinates.mean[:, 3, 4] = float("nan")
    assert coordinate_map(coordinates)[3, 4].tolist() == [0, 0, 0, 0]
    again = read_coordinates(write_coordinates(tmp_path, 7, coordinates), MapDescription())
    assert torch.equal(again.valid, coordinates.valid)
    assert torch.allclose(again.variance[again.valid], coordinates.variance[again.valid], rtol=1e-5)


def test_flow_files_have_the_published_layout(tmp_path: Path) -> None:
    offset = torch.randn(2, 60, 80)
    path = write_flow(tmp_path, 8, 7, offset, torch.full((60, 80), 0.04))
    grid = np.load(path)
    assert path.name == "8_7_flow.npy" and grid.shape == (60, 80, 3) and grid.dtype == np.float32
    assert np.allclose(grid[..., :2], offset.permute(1, 2, 0).numpy())
    assert np.allclose(grid[..., 2], 5.0)
