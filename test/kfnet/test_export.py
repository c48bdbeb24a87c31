# SPDX-License-Identifier: Apache-2.0
"""A map's scene coordinates through KFNet's files and back to poses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kfloc_ros.cli import main as cli
from kfloc_ros.cli.coordinates import export_coordinates
from kfloc_ros.frames import select
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.maps.scene_map import SceneMap


def test_exported_coordinates_give_the_true_poses(room_map, room, tmp_path: Path) -> None:
    source = select(room, frames="4:8")
    maps, truth = tmp_path / "maps", tmp_path / "truth"
    config = LocalizerConfig(device="cpu")
    written = export_coordinates(source, SceneMap.load(room_map), config, maps, flow=True, truth=truth)
    assert list(written) == [0, 1, 2, 3]
    flow = np.load(maps / "2_1_flow.npy")
    assert flow.shape == (*np.load(maps / "coord_2.npy").shape[:2], 3)
    assert not (maps / "0_-1_flow.npy").exists()
    description = json.loads((maps / "coordinates.json").read_text())
    assert description["pixel_offset"] == 3.5
    assert [entry["index"] for entry in description["frames"]] == [4, 5, 6, 7]
    out = tmp_path / "poses"
    assert cli.main(["pnp", str(maps), "--gt", str(truth / "gt_list.txt"), "--out", str(out), "--jobs", "1"]) == 0
    result = json.loads((out / "poses.json").read_text())
    assert result["solved"] == 4
    assert result["median_translation_m"] < 0.1
