# SPDX-License-Identifier: Apache-2.0
"""The map that comes with the package: found by name, whole, small, and with a word on where it is from."""

from __future__ import annotations

from pathlib import Path

from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap, verify_map

MAPS = Path(__file__).resolve().parents[2] / "maps"
MAX_BYTES = 12_000_000


def test_the_demo_room_is_found_by_name_and_whole() -> None:
    folder = resolve_map("demo_room")
    assert verify_map(folder) == []
    assert SceneMap.load(folder).size_bytes() <= MAX_BYTES


def test_every_shipped_map_is_described() -> None:
    text = (MAPS / "README.md").read_text(encoding="utf-8")
    names = [path.parent.name for path in MAPS.glob("*/map.yaml")]
    assert names and all(f"## {name}" in text for name in names)
