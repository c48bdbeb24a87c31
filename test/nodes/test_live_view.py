# SPDX-License-Identifier: Apache-2.0
"""`kfloc view --live`: what running nodes publish goes into a recording."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.ros,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("rerun") is None, reason="rerun-sdk is not installed: pip install rerun-sdk"
    ),
]


def view(world: Any, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kfloc_ros.cli", "view", "--live", *arguments]
    return subprocess.Popen(command, env=world.environment, stderr=subprocess.PIPE, text=True)


def test_running_nodes_are_recorded(new_world: Callable[[], Any], room: Any, room_map: Path, tmp_path: Path) -> None:
    world = new_world()
    world.start_localizer(f"map:={room_map}")
    path = tmp_path / "live.rrd"
    viewer = view(world, "--save", str(path), "--duration", "20")
    world.harness.wait(lambda: world.harness.node.count_subscribers("overlay") > 0)
    for k in range(4, 12):
        world.harness.localize(room[k])
        world.harness.spin(0.2)
    _, said = viewer.communicate(timeout=60)
    assert viewer.returncode == 0, said
    assert path.stat().st_size > 200_000
    data = path.read_bytes()
    for entity in (b"map/points", b"map/reference_views", b"map/scene_coordinates", b"map/base", b"overlay", b"noise"):
        assert entity in data, entity


def test_silence_is_told(new_world: Callable[[], Any], tmp_path: Path) -> None:
    viewer = view(new_world(), "--save", str(tmp_path / "none.rrd"), "--duration", "2")
    _, said = viewer.communicate(timeout=60)
    assert viewer.returncode == 1 and "No message was received" in said
