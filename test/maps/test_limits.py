# SPDX-License-Identifier: Apache-2.0
"""A hostile map is refused before it takes memory or time; one that is replaced while it is read is read whole."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from closets import closet
from limits import peak_bytes, reset_peak
from safetensors.torch import save_file

from kfloc_ros.errors import MapError
from kfloc_ros.maps import files
from kfloc_ros.maps.archive import unpack_map
from kfloc_ros.maps.files import MAX_POINTS, appearing
from kfloc_ros.maps.format import DESCRIPTION, HEAD_FILE, REFERENCES_FILE
from kfloc_ros.maps.scene_map import SceneMap


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return closet(0).save(tmp_path / "closet")


@pytest.fixture(autouse=True)
def within_seconds() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


def relisted(folder: Path, name: str, **changes: object) -> None:
    data = (folder / name).read_bytes()
    description = yaml.safe_load((folder / DESCRIPTION).read_text())
    description["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / DESCRIPTION).write_text(yaml.safe_dump({**description, **changes}, sort_keys=False))


@pytest.mark.parametrize(
    "entry",
    [
        "x: [" + "1," * 490_000 + "1]",
        "x: 1" + ":1" * 100_000 + ".0",
        "x: 1" + ":1" * 4_000 + ".0",
        "version: 0x" + "f" * 900_000,
        "version: 0x" + "f" * 9_000,
        "version: true",
        "x: " + "[" * 100_000,
    ],
    ids=["list", "sexagesimal", "shorter sexagesimal", "digits", "fewer digits", "bool", "nested"],
)
def test_a_description_that_takes_long_to_read_is_refused(folder: Path, entry: str) -> None:
    (folder / DESCRIPTION).write_text(f"format: kfloc_map\nversion: 4\n{entry}\n")
    with pytest.raises(MapError):
        SceneMap.load(folder)


@pytest.mark.parametrize(("width", "height"), [(4096, 4096), (4096, 544), (2048, 1056)])
def test_a_camera_whose_images_take_gigabytes_is_refused(folder: Path, width: int, height: int) -> None:
    description = yaml.safe_load((folder / DESCRIPTION).read_text())
    description["camera"].update(width=width, height=height, fx=width, fy=width)
    (folder / DESCRIPTION).write_text(yaml.safe_dump(description))
    with pytest.raises(MapError, match=f"{width}x{height} pixels, more than"):
        SceneMap.load(folder)


def test_heads_that_the_file_does_not_hold_take_no_memory(folder: Path) -> None:
    description = yaml.safe_load((folder / DESCRIPTION).read_text())
    description["head"] = {"width": 2048, "blocks": 32, "count": 8}
    (folder / DESCRIPTION).write_text(yaml.safe_dump(description))
    before = reset_peak()
    with pytest.raises(MapError, match="do not match 8 heads"):
        SceneMap.load(folder)
    assert peak_bytes() - before < 200e6


def test_a_list_of_a_million_tensors_is_refused(folder: Path) -> None:
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % i for i in range(200_000)) + b"}"
    (folder / REFERENCES_FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    relisted(folder, REFERENCES_FILE)
    before = reset_peak()
    with pytest.raises(MapError, match="longer than that of any network"):
        SceneMap.load(folder)
    assert peak_bytes() - before < 100e6


def many_points(folder: Path, count: int) -> None:
    save_file(
        {
            "ids": torch.zeros(1, dtype=torch.int64),
            "counts": torch.tensor([count]),
            "T_map_camera": torch.eye(4, dtype=torch.float64)[None],
            "points": torch.zeros(count, 3),
            "coarse": torch.zeros(count, 64, dtype=torch.int8),
            "fine": torch.zeros(count, 24, dtype=torch.int8),
            "confidence": torch.zeros(count, dtype=torch.float16),
        },
        folder / REFERENCES_FILE,
    )
    relisted(folder, REFERENCES_FILE)


def test_more_reference_points_than_a_map_may_have_are_refused(folder: Path) -> None:
    many_points(folder, MAX_POINTS + 1)
    before = reset_peak()
    with pytest.raises(MapError, match=f"{MAX_POINTS + 1} reference points|invalid number of points"):
        SceneMap.load(folder)
    assert peak_bytes() - before < 300e6


def test_a_small_archive_may_not_unpack_to_much(folder: Path, tmp_path: Path) -> None:
    many_points(folder, MAX_POINTS)
    archive = tmp_path / "closet.kfmap"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in (DESCRIPTION, HEAD_FILE, REFERENCES_FILE):
            packed.write(folder / name, name)
    assert archive.stat().st_size < 500_000
    with pytest.raises(MapError, match=r"larger than the limit of \d+ bytes"):
        unpack_map(archive, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("name", [DESCRIPTION, HEAD_FILE])
def test_a_pipe_in_a_map_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(MapError):
        SceneMap.load(folder)


def replace_again_and_again(folder: Path, maps: list[Path], seconds: float) -> None:
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        with appearing(folder, overwrite=True) as temporary:
            for file in maps[count % 2].iterdir():
                shutil.copy(file, temporary / file.name)
        count += 1
        time.sleep(0.005)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_map_that_is_replaced_while_it_is_read_is_read_whole(
    tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    maps = [closet(k).save(tmp_path / "made" / str(k)) for k in range(2)]
    sums = {float(torch.cat([v.points for v in SceneMap.load(m).references.views]).sum()) for m in maps}
    folder = tmp_path / "map"
    shutil.copytree(maps[0], folder)
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=replace_again_and_again, args=(folder, maps, 2.0))
    writer.start()
    read: Counter[float] = Counter()
    while writer.is_alive():
        read[float(torch.cat([view.points for view in SceneMap.load(folder).references.views]).sum())] += 1
    writer.join()
    assert writer.exitcode == 0 and set(read) <= sums and sum(read.values()) > 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "map"], "nothing of the exchanges stays behind"


def test_a_map_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(MapError, match="no map folder"):
        SceneMap.load(tmp_path / "nowhere")
    assert time.monotonic() - start < 1
