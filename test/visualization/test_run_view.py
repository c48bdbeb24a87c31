# SPDX-License-Identifier: Apache-2.0
"""`kfloc view` of a source and of a result folder; what is wrong is one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.visualization.rerun_views import Trail, show_covariance, view_results, view_source

needs_rerun = pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None, reason="rerun-sdk is not installed: pip install rerun-sdk"
)


class Log:
    """Keeps what would be recorded, by entity."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Any]] = {}
        self.frames: list[int] = []

    def at(self, frame: int, stamp_ns: int | None = None) -> None:
        self.frames.append(frame)

    def __getattr__(self, kind: str) -> Any:
        return lambda entity, *values, **options: self.entries.setdefault(entity, []).append(values)


@pytest.fixture(scope="module")
def results(room_map: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    poses = [make_pose(np.eye(3), np.array([0.1 * k, 0.0, 0.0])) for k in range(5)]
    records = [
        FrameRecord(k, k * 10**8, T, T, state="LOST" if k == 3 else "TRACKING", latency_ms=50.0 + k,
                    stats={"inlier_count": 100.0 + k}, covariance=1e-4 * np.eye(6))
        for k, T in enumerate(poses)
    ]  # fmt: skip
    run = RunInfo(
        kind="localize", command="kfloc localize", map=str(room_map), source="room", poses="file", split=None,
        frames=None, hardware={"cpu": "test"}, received=5, processed=5, dropped=0, duration_s=1.0,
    )  # fmt: skip
    write_results(folder, records, run, plots=False)
    return folder


def test_a_source_is_shown_with_everything_that_is_known(room: Any, room_map: Path) -> None:
    log, scene_map = Log(), SceneMap.load(room_map)
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    frames = zip(range(4), view_source(log, scene_map, localizer, room), strict=False)
    estimates = [estimate for _, estimate in frames]
    assert log.frames[:4] == [0, 1, 2, 3] and all(e.T_map_camera is not None for e in estimates)
    for entity in ("map/camera", "map/scene_coordinates", "overlay", "noise", "flow", "latency_ms", "error_cm"):
        assert log.entries[entity], entity
    assert max(values[0] for values in log.entries["error_cm"]) < 5
    assert log.entries["state"] == [("TRACKING",)]


def test_a_result_folder_is_shown(results: Path) -> None:
    log = Log()
    assert view_results(log, results) == 5
    assert log.entries["map/path"][0][0].shape == (1, 5, 3)
    assert [values[0] for values in log.entries["latency_ms"]] == [50, 51, 52, 53, 54]
    assert [values[0] for values in log.entries["inliers"]] == [100, 101, 102, 103, 104]
    assert [values[0] for values in log.entries["state"]] == ["TRACKING", "LOST", "TRACKING"]


def test_a_result_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"groundtruth\.tum is missing"):
        view_results(Log(), tmp_path)


def test_the_spread_of_a_position_is_drawn_two_sigma_to_each_side() -> None:
    log = Log()
    covariance = np.diag([4e-4, 1e-4, 9e-4, 1, 1, 1])
    show_covariance(log, make_pose(np.eye(3), np.array([1.0, 2.0, 3.0])), covariance)
    lengths = sorted(np.linalg.norm(arm[1] - arm[0]) for arm in log.entries["map/covariance"][0][0])
    assert np.allclose(lengths, [0.04, 0.08, 0.12])
    show_covariance(log, None, None)
    assert log.entries["map/covariance"][-1] == ()


def test_a_trail_is_drawn_now_and_then_and_at_the_end() -> None:
    log = Log()
    trail = Trail(log, "map/path", (1, 2, 3))
    trail.draw()  # nothing yet
    for k in range(12):
        trail.add(make_pose(np.eye(3), np.array([float(k), 0.0, 0.0])))
    trail.draw()
    assert [len(values[0][0]) for values in log.entries["map/path"]] == [2, 7, 12, 12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "to view, or --live"),
        (["--live", "somewhere"], "to view, or --live"),
        (["--live", "--map", "kitchen"], "omit --map"),
        (["nowhere/bag"], "with --map"),
        (["nowhere/bag", "--map", "kitchen"], "nowhere/bag"),
    ],
)
def test_a_wrong_question_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("kfloc: ") and error.count("\n") == 1


def test_an_existing_file_is_not_replaced(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rrd"
    path.write_text("mine")
    assert main(["view", str(results), "--save", str(path)]) == 2
    assert "--force" in capsys.readouterr().err and path.read_text() == "mine"


@needs_rerun
def test_a_recording_of_a_result_folder_is_written(results: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.rrd"
    assert main(["view", str(results), "--save", str(path)]) == 0
    data = path.read_bytes()
    assert data[:4] == b"RRF2" and b"map/points" in data and b"map/true_path" in data
