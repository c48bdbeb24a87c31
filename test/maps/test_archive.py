# SPDX-License-Identifier: Apache-2.0
"""Packed maps, and hostile ones: whatever the bytes, the answer is a MapError and nothing outside is touched."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from closets import closet, files_below, sign
from safetensors.torch import load_file, save_file

from kfloc_ros.errors import MapError
from kfloc_ros.maps.archive import LIMITS, pack_map, unpack_map
from kfloc_ros.maps.format import DESCRIPTION, HEAD_FILE, REFERENCES_FILE
from kfloc_ros.maps.scene_map import SceneMap


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replace(closet(0), name="closet").save(tmp_path_factory.mktemp("maps") / "closet")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "closet"))


def edit(folder: Path, change) -> None:
    description = yaml.safe_load((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(yaml.safe_dump(description))


def test_a_packed_map_comes_out_as_it_went_in(folder: Path, tmp_path: Path) -> None:
    archive = pack_map(folder, tmp_path / "closet.kfmap")
    unpacked = unpack_map(archive, tmp_path / "again")
    assert files_below(tmp_path / "again") == files_below(folder)
    assert unpacked.name == "closet"


def test_nothing_is_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    archive = pack_map(folder, tmp_path / "closet.kfmap")
    with pytest.raises(MapError, match="exists"):
        pack_map(folder, archive)
    with pytest.raises(MapError, match="exists"):
        unpack_map(archive, folder)


@pytest.mark.parametrize("name", ["../evil", "/evil", "sub/../../evil", "map.yaml/evil", "evil.py"])
def test_other_names_are_refused_and_nothing_is_written(folder: Path, tmp_path: Path, name: str) -> None:
    archive = pack_map(folder, tmp_path / "closet.kfmap")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(name, b"x")
    before = files_below(tmp_path)
    with pytest.raises(MapError, match="nothing else"):
        unpack_map(archive, tmp_path / "inner" / "again")
    assert files_below(tmp_path) == before and not (tmp_path / "inner" / "again").exists()


def test_an_archive_that_swells_is_stopped(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.kfmap"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in LIMITS:
            packed.writestr(name, b"0" * 5_000_000)
    assert archive.stat().st_size < 50_000
    with pytest.raises(MapError, match="larger than"):
        unpack_map(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_archives_are_refused_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    good = bytearray(pack_map(folder, tmp_path / "closet.kfmap").read_bytes())
    rng = np.random.default_rng(0)
    work = tmp_path / "work"
    work.mkdir()
    for trial in range(60):
        data = bytearray(good)
        if trial % 3 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        elif trial % 3 == 1:
            for at in rng.integers(0, len(data), 20):
                data[at] = int(rng.integers(0, 256))
        else:  # the directory at the end, where names and sizes are
            for at in rng.integers(len(data) - 300, len(data), 5):
                data[at] = int(rng.integers(0, 256))
        path = tmp_path / "damaged.kfmap"
        path.write_bytes(bytes(data))
        try:
            unpack_map(path, work / "out")
        except MapError:
            assert list(work.iterdir()) == []
        else:  # only where the bytes that changed mean nothing
            assert files_below(work / "out") == files_below(folder)
            shutil.rmtree(work / "out")


def test_damaged_folders_with_right_checksums_are_refused_or_whole(folder: Path, tmp_path: Path) -> None:
    original = {name: (folder / name).read_bytes() for name in LIMITS}
    rng = np.random.default_rng(1)
    for trial in range(45):
        for name, data in original.items():
            (folder / name).write_bytes(data)
        name = list(LIMITS)[trial % 3]
        data = bytearray(original[name])
        for at in rng.integers(0, min(len(data), 1500), 3):  # headers and descriptions are at the front
            data[at] = int(rng.integers(0, 256))
        (folder / name).write_bytes(bytes(data))
        try:
            if name != DESCRIPTION:
                sign(folder)
            SceneMap.load(folder)
        except MapError:
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closet"]


HOSTILE = {
    "a link in a loop": "a: &a [*a]",
    "aliases that swell": "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a]\nname: [*b,*b,*b,*b]",
    "an object": "!!python/object/apply:os.system ['touch evil']",
    "nested without end": "[" * 100_000,
    "binary": "\x00\x01",
    "a number": "7",
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_descriptions_are_refused(folder: Path, text: str) -> None:
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(MapError):
        SceneMap.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head", {"width": 10**9, "blocks": 10**6}),
        ("head", "wide"),
        ("bounds_m", 3),
        ("bounds_m", [[1, 2, 10**400], [1, 2, 3]]),
        ("camera", {"width": -1}),
        ("camera", [1, 2]),
        ("calibration", {"process_scale": float("nan")}),
        ("files", {"scoordnet.safetensors": {"bytes": 1}}),
        ("provenance", 4),
        ("version", "2"),
        ("version", 10**6),
    ],
)
def test_wrong_values_are_refused(folder: Path, key: str, value: object) -> None:
    edit(folder, lambda description: description.update({key: value}))
    with pytest.raises(MapError):
        SceneMap.load(folder)


@pytest.mark.parametrize("name", ["points", "coarse", "fine", "confidence", "counts", "ids", "T_map_camera"])
@pytest.mark.parametrize("shape", [(0,), (5, 5), (1, 1, 1, 1)])
def test_tensors_of_a_wrong_shape_are_refused(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / REFERENCES_FILE)
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    save_file(tensors, folder / REFERENCES_FILE)
    sign(folder)
    with pytest.raises(MapError):
        SceneMap.load(folder)


@pytest.mark.parametrize("name", [DESCRIPTION, HEAD_FILE, REFERENCES_FILE])
def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MapError, match="link"):
        SceneMap.load(folder)
