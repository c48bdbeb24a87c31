# SPDX-License-Identifier: Apache-2.0
"""``kfloc kfnet report``: one-shot against filtered, by scene, with means and the ground truth of each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kfloc_ros.cli.main import main

RECALL = {"1cm_1deg": 0.1, "2cm_2deg": 0.2, "5cm_5deg": 0.5, "25cm_2deg": 0.6}


def run_folder(root: Path, scene: str, filtered: bool, median_m: float, poses: str = "sfm", frames: int = 10) -> str:
    name = f"{scene}_{poses}_{filtered}"
    accuracy = {"median_translation_m": median_m, "median_rotation_deg": 50 * median_m, "recall": RECALL}
    summary = {"kind": "localize", "frames": frames, "source": f"7scenes:/data/{scene}@test", "poses": poses,
               "coarse": accuracy, **{**accuracy, "median_translation_m": median_m / 4},
               "options": {"filter": filtered, "refine": True}}  # fmt: skip
    (root / name).mkdir()
    (root / name / "summary.json").write_text(json.dumps(summary))
    return str(root / name)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] != "|--"]


def test_scenes_means_and_both_truths(tmp_path: Path, capsys: Any) -> None:
    folders = [
        run_folder(tmp_path, "fire", False, 0.04),
        run_folder(tmp_path, "fire", True, 0.02),
        run_folder(tmp_path, "chess", False, 0.02),
        run_folder(tmp_path, "chess", True, 0.01),
        run_folder(tmp_path, "fire", True, 0.06, "file"),
    ]
    out = tmp_path / "report.md"
    assert main(["kfnet", "report", *folders, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    rows = rows_of(text.partition("## Poses after")[0])
    assert ["fire", "pose files", "10", "-", "-", "-", "6.00", "3.00", "50.0 %"] in rows
    assert ["fire", "SfM poses", "10", "4.00", "2.00", "50.0 %", "2.00", "1.00", "50.0 %"] in rows
    # the mean is of the scenes with both methods, and of one ground truth
    assert ["mean of 2 scenes", "SfM poses", "20", "3.00", "1.50", "50.0 %", "1.50", "0.75", "50.0 %"] in rows
    assert sum("mean" in row[0] for row in rows) == 1
    assert ["chess", "SfM poses", "10", "0.50", "1.00", "50.0 %", "0.25", "0.50", "50.0 %"] in rows_of(text)


def test_scene_coordinates_and_their_poses(tmp_path: Path, capsys: Any) -> None:
    figures = {"frames": 5, "median_cm": 2.0, "mean_cm": 3.0, "std_cm": 1.0, "near": 0.4, "sigma_cm": 1.0}
    (tmp_path / "kf").mkdir()
    content = {"stage": "kfnet", "input": "fire/test", "d_m": figures, "d_kf": {**figures, "median_cm": 1.0}}
    (tmp_path / "kf" / "evaluation.json").write_text(json.dumps(content))
    for name, maps in (("poses_kf", "kf"), ("poses_m", "elsewhere")):
        (tmp_path / name).mkdir()
        poses = {"maps": 5, "median_translation_m": 0.01, "median_rotation_deg": 0.5, "recall": RECALL,
                 "poses": [{"map": str(tmp_path / maps / "coord_0.npy")}]}  # fmt: skip
        (tmp_path / name / "poses.json").write_text(json.dumps(poses))
    assert main(["kfnet", "report", str(tmp_path / "kf"), str(tmp_path / "poses_kf")]) == 0
    rows = rows_of(capsys.readouterr().out)
    fire = ["fire", "labels", "5", "2.00", "3.00", "1.00", "40.0 %", "1.00", "3.00", "1.00", "40.0 %"]
    assert fire in rows
    assert ["fire", "poses of --gt", "5", "-", "-", "-", "1.00", "0.50", "50.0 %"] in rows
    assert main(["kfnet", "report", str(tmp_path / "poses_m")]) == 2
    assert "one-shot:" in capsys.readouterr().err
    assert main(["kfnet", "report", f"one-shot:{tmp_path / 'poses_m'}"]) == 0


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"filtered": False}, "Two results are one-shot of 'fire'"),
        ({"filtered": True, "frames": 9}, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(second: dict[str, Any], reason: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "b").mkdir()
    words = [run_folder(tmp_path, "fire", False, 0.04), run_folder(tmp_path / "b", "fire", median_m=0.04, **second)]
    assert main(["kfnet", "report", *words]) == 2
    assert reason in capsys.readouterr().err
    assert main(["kfnet", "report", str(tmp_path)]) == 2
