# SPDX-License-Identifier: Apache-2.0
"""Commands whose parts go through the executor: the same files for one process, two, and a Dask cluster."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from textured_room import Room

from kfloc_ros.cli.main import main
from kfloc_ros.cli.map_join import is_to_build
from kfloc_ros.maps.place import Place, load_map

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def write_recordings(room: Room, root: Path, parts: dict[str, range]) -> Path:
    """Write frames of the room as 7-Scenes sequences, with a camera.txt."""
    camera = room.camera
    root.mkdir(parents=True)
    for name, frames in parts.items():
        (root / name).mkdir()
        for k, position in enumerate(frames):
            frame = room[position]
            stem = root / name / f"frame-{k:06d}"
            cv2.imwrite(f"{stem}.color.png", frame.image[..., ::-1])
            if frame.depth_m is not None:
                cv2.imwrite(f"{stem}.depth.png", np.round(1000 * frame.depth_m).astype(np.uint16))
            assert frame.T_map_camera is not None
            np.savetxt(f"{stem}.pose.txt", frame.T_map_camera)
    (root / "camera.txt").write_text(
        f"{camera.width} {camera.height} {camera.fx!r} {camera.fy!r} {camera.cx!r} {camera.cy!r}\n"
    )
    (root / "TestSplit.txt").write_text("".join(f"sequence{int(name[4:])}\n" for name in parts))
    return root


def poses_of(out: Path) -> list[tuple[str, str, list[float]]]:
    """Return frames, states and numbers; rounded, since loops that are compiled anew differ in the last bits."""
    wanted = ("tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw", "sigma_tx_m")
    with open(out / "frames.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [(row["index"], row["state"], [round(float(row[name]), 9) for name in wanted]) for row in rows]


def test_recordings_are_localized_alike_in_one_process_two_and_a_cluster(
    room: Room, room_map: Path, tmp_path: Path
) -> None:
    source = write_recordings(room, tmp_path / "room", {"seq-01": range(0, 6), "seq-02": range(20, 26)})
    words = ["localize", f"7scenes:{source}@test", "--map", str(room_map), "--quiet", "--out"]
    assert main([*words, str(tmp_path / "one"), "--jobs", "1"]) == 0
    assert main([*words, str(tmp_path / "two"), "--jobs", "2"]) == 0
    expected = poses_of(tmp_path / "one")
    assert len(expected) == 12 and sum(row[1] == "TRACKING" for row in expected) >= 10
    assert poses_of(tmp_path / "two") == expected
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'kfloc_ros[cluster]'")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
    ) as cluster:
        assert main([*words, str(tmp_path / "far"), "--scheduler", cluster.scheduler_address]) == 0
    assert poses_of(tmp_path / "far") == expected
    assert main([*words, str(tmp_path / "none"), "--jobs", "0"]) == 2


def heads_of(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in sorted(place.rglob("*.safetensors"))}


@pytest.mark.slow
def test_submaps_are_built_alike_one_after_the_other_and_together(room: Room, tmp_path: Path) -> None:
    source = write_recordings(room, tmp_path / "room", {"seq-01": range(0, 40, 2), "seq-02": range(1, 40, 2)})
    words = ["map", "place", f"hall=7scenes:{source / 'seq-01'}", f"kitchen=7scenes:{source / 'seq-02'}"]
    options = ["--train-steps", "60", "--no-check", "--device", "cpu"]
    assert main([*words, *options, "--out", str(tmp_path / "one"), "--parts", str(tmp_path / "parts")]) == 0
    assert main([*words, *options, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    place = load_map(tmp_path / "two")
    assert isinstance(place, Place) and [submap.name for submap in place.submaps] == ["hall", "kitchen"]
    one, two = heads_of(tmp_path / "one"), heads_of(tmp_path / "two")
    assert len(one) >= 4 and one == two
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("map.yaml")}
    assert main([*words, *options, "--out", str(tmp_path / "three"), "--parts", str(tmp_path / "parts")]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("map.yaml")}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".parts")]


def test_names_with_sources_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=name").mkdir()
    words: dict[str, Any] = {"hall=bag:walk": True, "maps/hall": False, "odd=name": False, "hall=": False}
    assert {word: is_to_build(word) for word in words} == words


def test_a_name_given_twice_and_a_place_that_exists_are_refused_at_once(room_map: Path, tmp_path: Path) -> None:
    words = ["map", "place", "a=sim:map-quick", "a=sim:map-quick", "--out", str(tmp_path / "place")]
    assert main(words) == 2
    assert main(["map", "place", "a=sim:map-quick", "--out", str(room_map)]) == 2
    assert list(tmp_path.iterdir()) == []
