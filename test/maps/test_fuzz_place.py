# SPDX-License-Identifier: Apache-2.0
"""Whatever the folder or the archive of a place holds, reading it gives a sound place or a MapError, and no more."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("hypothesis", reason="hypothesis is not installed: `make setup-dev` brings it")

from closets import MOTION, change, closet, files_below
from damage import TensorChange, damaged_archive, tensor_changes, write_changed
from hypothesis import strategies as st

from kfloc_ros.errors import MapError
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.maps.archive import LIMITS, pack_map, unpack_map
from kfloc_ros.maps.format import DESCRIPTION, HEAD_FILE, INDEX_FILE, SUBMAPS
from kfloc_ros.maps.place import Place, verify_place

Fuzz = Callable[..., None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("places")
    maps = [closet(seed).save(root / "maps" / name) for seed, name in enumerate(("hall", "attic"))]
    return make_place(maps, root / "house", T_place_submaps={"attic": MOTION}).path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "house"))


def assert_sound(folder: Path) -> None:
    """A place that is read answers every question, or says in a sentence what is wrong with a submap."""
    place = Place.load(folder)
    assert place.name and place.frame_id and place.camera.is_pinhole
    assert np.isfinite(place.bounds_m).all() and np.isfinite(place.references.T_map_camera).all()
    assert place.index.distances(np.eye(4)).shape == (len(place.submaps),)
    for number in range(len(place.submaps)):
        assert place.folder(number).is_relative_to(folder)
    assert all(isinstance(problem, str) for problem in verify_place(folder))


ANY = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
        st.sampled_from([10**9, 10**400, -1, 0, 1e308, "..", "../house", "/etc/passwd", "\x00", "attic", "a/b", "."]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
SPOTS = st.sampled_from([
    ("name",), ("frame_id",), ("version",), ("format",), ("camera",), ("camera", "width"), ("camera", "fx"),
    ("submaps",), ("submaps", 0), ("submaps", 1), ("submaps", 0, "name"), ("submaps", 1, "name"),
    ("submaps", 0, "T_place_submap"), ("submaps", 1, "T_place_submap", 0), ("submaps", 1, "T_place_submap", 0, 3),
    ("submaps", 0, "bounds_m"), ("submaps", 0, "bounds_m", 1), ("submaps", 0, "description"),
    ("submaps", 0, "description", "bytes"), ("submaps", 0, "description", "sha256"), ("provenance",),
])  # fmt: skip


def test_any_value_in_the_description_is_sound_or_refused(fuzz: Fuzz, folder: Path, tmp_path: Path) -> None:
    good = (folder / DESCRIPTION).read_text()

    def check(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        description = yaml.safe_load(good)
        for spot, value in changes:
            inner = description
            try:
                for key in spot[:-1]:
                    inner = inner[key]
                inner[spot[-1]] = value
            except (TypeError, LookupError):  # an earlier change took it away
                continue
        (folder / DESCRIPTION).write_text(yaml.safe_dump(description, allow_unicode=True))
        try:
            assert_sound(folder)
        except MapError:
            return

    fuzz(check, st.lists(st.tuples(SPOTS, ANY), min_size=1, max_size=2), share=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["house"]


NAMES = ["centres", "mean", "axes", "descriptors", "submap", "T_place_camera", "codes", "points"]


def test_any_index_with_a_right_checksum_is_sound_or_refused(fuzz: Fuzz, folder: Path) -> None:
    good = load_file(folder / INDEX_FILE)

    def check(changes: list[TensorChange]) -> None:
        write_changed(good, changes, folder / INDEX_FILE)
        change(folder, lambda description: None)
        try:
            assert_sound(folder)
        except MapError:
            return

    fuzz(check, tensor_changes(NAMES), share=0.2)


def test_any_archive_is_whole_or_refused_and_leaves_nothing(fuzz: Fuzz, folder: Path, tmp_path: Path) -> None:
    good = pack_map(folder, tmp_path / "house.kfmap").read_bytes()
    work, archive, expected = tmp_path / "work", tmp_path / "damaged.kfmap", files_below(folder)
    work.mkdir()

    def check(edits: list[tuple[int, int]], length: int | None) -> None:
        archive.write_bytes(damaged_archive(good, edits, length))
        try:
            unpack_map(archive, work / "out")
        except MapError:
            assert list(work.iterdir()) == []
            return
        assert files_below(work / "out").keys() == expected.keys()
        shutil.rmtree(work / "out")

    places = st.tuples(st.one_of(st.integers(0, 900), st.integers(0, 10**7)), st.integers(0, 255))
    fuzz(check, st.lists(places, max_size=5), st.one_of(st.none(), st.integers(0, 10**7)), share=0.2)


def test_a_packed_place_comes_out_as_it_went_in(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("not part of the place")
    packed = pack_map(folder, tmp_path / "house.kfmap")
    place = unpack_map(packed, tmp_path / "again")
    (folder / "notes.txt").unlink()
    assert isinstance(place, Place) and verify_place(tmp_path / "again") == []
    assert files_below(tmp_path / "again") == files_below(folder)


def test_a_place_that_is_not_whole_is_not_packed(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / SUBMAPS / "attic" / HEAD_FILE).read_bytes())
    data[-1] ^= 1
    (folder / SUBMAPS / "attic" / HEAD_FILE).write_bytes(bytes(data))
    with pytest.raises(MapError, match="does not match its checksum"):
        pack_map(folder, tmp_path / "house.kfmap")
    shutil.rmtree(folder / SUBMAPS / "attic")
    with pytest.raises(MapError, match="no map folder"):
        pack_map(folder, tmp_path / "house.kfmap")
    assert [path.name for path in tmp_path.iterdir()] == ["house"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/evil",
        "submaps/../../evil",
        "submaps/evil/map.yaml",
        "submaps/attic/evil.py",
        "submaps/attic/",
        "map.yaml",
    ],
)
def test_other_names_are_refused_and_nothing_is_written(folder: Path, tmp_path: Path, name: str) -> None:
    archive = pack_map(folder, tmp_path / "house.kfmap")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr(name, b"x")
    before = files_below(tmp_path)
    with pytest.raises(MapError, match="nothing else"):
        unpack_map(archive, tmp_path / "inner" / "again")
    assert files_below(tmp_path) == before and not (tmp_path / "inner" / "again").exists()


def test_a_description_that_leads_outside_is_refused_before_anything_is_unpacked(folder: Path, tmp_path: Path) -> None:
    change(folder, lambda description: description["submaps"][1].update(name="../../../evil"))
    archive = tmp_path / "house.kfmap"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in (DESCRIPTION, INDEX_FILE, *(f"{SUBMAPS}/hall/{item}" for item in LIMITS)):
            packed.write(folder / name, name)
        for item in LIMITS:
            packed.write(folder / SUBMAPS / "attic" / item, f"{SUBMAPS}/../../../evil/{item}")
    with pytest.raises(MapError, match="not a valid name of a submap"):
        unpack_map(archive, tmp_path / "inner" / "again")
    assert not (tmp_path / "evil").exists() and list((tmp_path / "inner").iterdir()) == []


def test_a_place_of_countless_submaps_that_swells_is_stopped(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bomb.kfmap"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(folder / DESCRIPTION, DESCRIPTION)
        packed.writestr(INDEX_FILE, b"0" * 3_000_000)
        for name in ("hall", "attic"):
            for item in LIMITS:
                packed.writestr(f"{SUBMAPS}/{name}/{item}", b"0" * 3_000_000)
    assert archive.stat().st_size < 100_000
    with pytest.raises(MapError, match="larger than the limit of 1000000 bytes"):
        unpack_map(archive, tmp_path / "out")
    with pytest.raises(MapError, match="larger than"):
        unpack_map(archive, tmp_path / "out", max_bytes=2_000_000)
    hall = json.dumps(yaml.safe_load((folder / DESCRIPTION).read_text())["submaps"][0])
    change(folder, lambda d: d.update(submaps=[{**json.loads(hall), "name": f"s{k}"} for k in range(30)]))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(folder / DESCRIPTION, DESCRIPTION)
        packed.write(folder / INDEX_FILE, INDEX_FILE)
    with pytest.raises(MapError, match="nothing else"):
        unpack_map(archive, tmp_path / "out")
    with pytest.raises(MapError, match="views of every submap"):
        Place.load(folder)


def test_submaps_in_a_loop_of_links_are_refused(folder: Path) -> None:
    shutil.move(folder / SUBMAPS, folder / "real")
    (folder / SUBMAPS).symlink_to(folder)
    with pytest.raises(MapError, match="is a link"):
        Place.load(folder).load_submap(0)
    with pytest.raises(MapError, match="is a link"):
        make_place([folder], folder.parent / "copy")
    (folder / SUBMAPS).unlink()
    (folder / SUBMAPS).symlink_to(SUBMAPS)  # to itself
    assert len(verify_place(folder)) == 2 and Place.load(folder).size_bytes() > 0
