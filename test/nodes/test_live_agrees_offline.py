# SPDX-License-Identifier: Apache-2.0
"""The same bag over DDS to the live nodes and offline in this process: the same poses, frame by frame."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.bags.writer import write_bag
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.replay import ReplayConfig, run_offline, run_replay

pytestmark = [
    pytest.mark.ros,
    pytest.mark.skipif(importlib.util.find_spec("rclpy") is None, reason="rclpy is not installed"),
]
POSE = ("tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw", "sigma_tx_m", "sigma_rz_rad")


@pytest.fixture(scope="module")
def bag(room: FrameSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "room"
    write_bag(Selection(room, range(1, 13)), path, depth=False)  # frame 0 has the stamp 0, which is refused
    return path


def frames_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "frames.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def values_of(row: dict[str, str]) -> list[float]:
    return [float(row[name]) for name in POSE]


def assert_same(first: list[dict[str, str]], second: list[dict[str, str]], atol: float) -> None:
    assert [(row["stamp_ns"], row["state"]) for row in first] == [(row["stamp_ns"], row["state"]) for row in second]
    np.testing.assert_allclose([values_of(r) for r in first], [values_of(r) for r in second], rtol=1e-6, atol=atol)


def test_every_frame_over_dds_has_the_pose_that_it_has_offline(
    bag: Path, room_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums in another order differ in their last digits
    config = ReplayConfig(bag=bag, map=str(room_map), out=tmp_path / "live", every_frame=True, rate=100.0, loops=2)
    summary = run_replay(config)
    assert (summary.run.processed, summary.run.dropped) == (24, 0)
    live = frames_of(config.out)
    offline = ReplayConfig(bag=bag, map=str(room_map), out=tmp_path / "offline", loops=2)
    assert run_offline(offline).run.options["offline"]
    assert_same(live, frames_of(offline.out), atol=1e-5)


def test_two_offline_runs_are_the_same_to_the_last_digit(bag: Path, room_map: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        config = ReplayConfig(bag=bag, map=str(room_map), out=tmp_path / name, start_s=0.15)
        assert run_offline(config).run.processed == 10
        runs.append([[row[key] for key in ("stamp_ns", "state", "reason", *POSE)] for row in frames_of(config.out)])
    assert runs[0] == runs[1]
    assert all(row[1] == "TRACKING" for row in runs[0])
