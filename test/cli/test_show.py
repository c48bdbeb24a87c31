# SPDX-License-Identifier: Apache-2.0
"""``kfloc show`` as a user runs it, on a small room."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.bags.writer import write_bag
from kfloc_ros.cli.main import main
from kfloc_ros.frames import Selection


@pytest.fixture(scope="module")
def bag(room: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("show") / "bag"
    write_bag(Selection(room, range(4, 7)), path, depth=False)
    return f"bag:{path}"


def show(*words: object) -> int:
    return main(["show", *map(str, words)])


def size(path: Path) -> tuple[int, int]:
    height, width = cv2.imread(str(path)).shape[:2]
    return width, height


@pytest.mark.thorough
def test_cells_of_a_stream_and_the_same_from_files(bag: str, room_map: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "cells"
    assert show("cells", bag, "--map", room_map, "--out", out, "--max-sigma", 1) == 0
    assert len(list((out / "cells").glob("*.ply"))) == len(list((out / "cells").glob("*.png"))) == 3
    assert (out / "cells.mp4").stat().st_size > 1000
    assert size(out / "cloud.png")[0] > 800
    header, _, body = (out / "cloud.ply").read_bytes().partition(b"end_header\n")
    count = int(re.search(rb"vertex (\d+)", header).group(1))  # type: ignore[union-attr]
    assert count > 500 and len(body) == count * 19
    points = np.frombuffer(body, dtype=[("p", "<f4", 3), ("c", "u1", 3), ("s", "<f4")])["p"]
    assert np.quantile(np.abs(points).max(axis=1), 0.9) < 3.0  # the room ends at 2.2 m

    maps = tmp_path / "maps"
    assert main(["coordinates", bag, "--map", str(room_map), "--out", str(maps), "--flow"]) == 0
    stored = tmp_path / "stored"
    assert show("cells", maps, "--out", stored, "--max-sigma", 1, "--no-video") == 0
    assert len(list((stored / "cells").glob("*.ply"))) == 3 and not (stored / "cells.mp4").exists()
    assert "points of all maps" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("verb", ["filter", "flow", "confidence"])
def test_sheets(verb: str, bag: str, room_map: Path, tmp_path: Path) -> None:
    assert show(verb, bag, "--map", room_map, "--out", tmp_path, "--frames", "0:2") == 0
    pictures = sorted((tmp_path / verb).glob("*.png"))
    assert len(pictures) == 2
    first, second = (cv2.imread(str(path)) for path in pictures)
    assert first.shape == second.shape and (first != second).mean() > 0.02
    assert (tmp_path / f"{verb}.mp4").is_file()


def test_an_alignment_from_beside_finds_back(bag: str, room_map: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("--map", room_map, "--out", tmp_path, "--frame", 1)
    assert show("alignment", bag, *words, "--offset-m", 0.04) == 0
    said = capsys.readouterr().out
    way = re.search(r"moved it by ([\d.]+) cm", said)
    assert way is not None and 3.0 < float(way.group(1)) < 5.5 and "accepted" in said
    assert (tmp_path / "alignment_000001.png").is_file() and (tmp_path / "steps_000001.png").is_file()


def test_what_cannot_be_shown_is_answered_with_a_sentence(
    bag: str, room_map: Path, tmp_path: Path, capsys: Any
) -> None:
    assert show("alignment", bag, "--map", room_map, "--out", tmp_path, "--frame", 99) == 2
    assert "no frame 99" in capsys.readouterr().err
    assert show("cells", bag, "--out", tmp_path) == 2
    assert "--map" in capsys.readouterr().err
    assert show("flow", bag, "--map", room_map, "--out", tmp_path, "--no-video", "--no-pictures") == 2
    assert "--no-video" in capsys.readouterr().err
    (tmp_path / "coord_0.npy").write_bytes(b"nonsense")
    assert show("cells", tmp_path, "--out", tmp_path / "out") == 2
    assert "coord_0.npy" in capsys.readouterr().err


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder of two coordinate maps, 4 x 5 cells of a wall at 2 m."""
    grid = np.zeros((4, 5, 4), dtype=np.float32)
    grid[..., 0], grid[..., 1], grid[..., 2], grid[..., 3] = *np.mgrid[0:4, 0:5] * 0.1, 2.0, 50.0
    for i in range(2):
        np.save(tmp_path / f"coord_{i}.npy", grid)
    return tmp_path


@pytest.mark.parametrize("flag", ["--live", "--rerun"])
def test_stored_cells_without_the_viewer_say_so(
    flag: str, stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert show("cells", stored, "--out", stored / "out", flag) == 2
    assert "pip install rerun-sdk" in capsys.readouterr().err
    assert not (stored / "out").exists()


def test_stored_cells_are_recorded(stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    logged: list[tuple[str, int]] = []

    class Recorder:
        def __init__(self, title: str, **options: object) -> None:
            assert options["path"] == stored / "out" / "cells.rrd"

        def at(self, frame: int) -> None:
            logged.append(("frame", frame))

        def cloud(self, entity: str, points: np.ndarray, colours: np.ndarray, **options: object) -> None:
            assert len(points) == len(colours)
            logged.append((entity, len(points)))

        def close(self) -> None:
            logged.append(("closed", 0))

    monkeypatch.setattr("kfloc_ros.cli.show_stream.Recording", Recorder)
    assert show("cells", stored, "--out", stored / "out", "--rerun", "--no-video") == 0
    assert logged == [("frame", 0), ("map/cloud/0", 20), ("frame", 1), ("map/cloud/1", 20), ("closed", 0)]
    assert "cells.rrd" in capsys.readouterr().out


def test_the_basin_is_deep_in_the_middle(bag: str, room_map: Path, tmp_path: Path) -> None:
    words = ("--offsets-m", "0,0.02,0.8", "--offsets-deg", "0,30", "--starts", 1, "--frames", "1")
    assert show("basin", bag, "--map", room_map, "--out", tmp_path, *words) == 0
    rows = list(csv.DictReader((tmp_path / "basin.csv").open()))
    assert len(rows) == 6
    error = {(float(r["offset_m"]), float(r["offset_deg"])): float(r["error_m"]) for r in rows}
    assert error[0.0, 0.0] < 0.005 and error[0.02, 0.0] < 0.01 and error[0.8, 30.0] > 0.1
    assert (tmp_path / "basin.png").is_file()


@pytest.fixture(scope="module")
def page(bag: str, room_map: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page")
    assert show("html", bag, "--map", room_map, "--out", out, "--width", 160) == 0
    return out / "localization.html"


def test_the_page_needs_no_network_and_holds_what_it_shows(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", text) and "import(" not in text
    assert text.count("The MIT License") == 1 and "/*DATA*/" not in text
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    assert [f["index"] for f in data["frames"]] == [0, 1, 2]
    for frame in data["frames"]:
        assert len(frame["steps"]) == len(frame["residuals"]) >= 2
        image = cv2.imdecode(np.frombuffer(base64.b64decode(frame["image"]), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (128, 160, 3)
        expected = sum(len(base64.b64decode(data["points"][k]["points"])) // 6 for k in frame["references"])
        residuals = np.frombuffer(base64.b64decode(frame["residuals"][-1]), np.uint8)
        assert len(residuals) == expected and (residuals < 255).mean() > 0.3


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed; it reads the page's scripts")
def test_the_scripts_of_the_page_are_well_formed(page: Path, tmp_path: Path) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page.read_text(), re.DOTALL)
    assert len(scripts) == 2
    for k, script in enumerate(scripts):
        path = tmp_path / f"{k}.js"
        path.write_text(script)
        done = subprocess.run(["node", "--check", path], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed; it opens the page")
def test_a_browser_draws_the_page(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    flags = ("--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
    words = ("--window-size=1200,800", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        ["chromium", *flags, *words, f"--screenshot={shot}", "--enable-logging=stderr", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert not re.search(r"CONSOLE.*(Error|error)", done.stderr), done.stderr
    picture = cv2.imread(str(shot))
    scene = picture[:, :600].reshape(-1, 3)
    assert (scene.max(axis=1) > 90).mean() > 0.01  # points on the dark ground
