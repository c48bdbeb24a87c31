# SPDX-License-Identifier: Apache-2.0
"""What tests share: the room and its map, live nodes, generated inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from textured_room import ROOM_MAP, Room

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(params=[pytest.param(40, id="few"), pytest.param(3000, id="thousands", marks=pytest.mark.slow)])
def fuzz(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Calls ``check`` with many generated inputs: the same few every time, or thousands of new ones (``slow``)."""
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: `make setup-dev` brings it")

    def run(check: Callable[..., None], *strategies: Any, share: float = 1.0) -> None:
        settings = hypothesis.settings(
            max_examples=max(int(request.param * share), 5),
            deadline=None,
            derandomize=request.param < 100,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(*strategies)(check))()

    return run


@pytest.fixture(scope="session")
def room() -> Room:
    """The frames to localize: other views than those the map was made from."""
    return Room(40, phase=0.37)


@pytest.fixture(scope="session")
def room_map() -> Iterator[Path]:
    """The committed map of the room. Tests that change a map copy it first."""
    before = _contents(ROOM_MAP)
    yield ROOM_MAP
    assert _contents(ROOM_MAP) == before, f"a test has written to {ROOM_MAP}"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def new_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Any]]:
    """Makes ROS domains that nobody else is in."""
    if importlib.util.find_spec("rclpy") is None:
        pytest.skip("rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")
    from live_nodes import RosWorld

    worlds: list[RosWorld] = []

    def make() -> RosWorld:
        worlds.append(RosWorld(tmp_path_factory.mktemp("ros")))
        return worlds[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        patch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", str(REPOSITORY / "config" / "fastdds.xml"))
        yield make
        for world in worlds:
            world.close()
