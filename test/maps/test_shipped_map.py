# SPDX-License-Identifier: Apache-2.0
"""The map that comes with the package: found by name, whole, small, and with a word on where it is from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kfloc_ros.errors import MapError
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap, verify_map

MAPS = Path(__file__).resolve().parents[2] / "maps"
MAX_BYTES = 18_000_000


def test_the_demo_room_is_found_by_name_and_whole() -> None:
    folder = resolve_map("demo_room")
    assert verify_map(folder) == []
    assert SceneMap.load(folder).size_bytes() <= MAX_BYTES


def test_every_shipped_map_is_described() -> None:
    text = (MAPS / "README.md").read_text(encoding="utf-8")
    names = [path.parent.name for path in MAPS.glob("*/map.yaml")]
    assert names and all(f"## {name}" in text for name in names)


def test_a_map_that_is_not_there_is_told_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(MapError, match="Did you mean 'demo_room'"):
        resolve_map("demo_rom")
    shutil.copytree(resolve_map("demo_room"), tmp_path / "kitchen")
    with pytest.raises(MapError, match=r"Did you mean '.*/kitchen'\?"):
        SceneMap.load(tmp_path / "kitchn")
    (tmp_path / "photos").mkdir()
    with pytest.raises(MapError, match="If it is a recording, `kfloc map build"):
        SceneMap.load(tmp_path / "photos")
