# SPDX-License-Identifier: Apache-2.0
"""Whatever a map folder or archive holds, reading it gives a sound map or a MapError, and touches nothing else."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("hypothesis", reason="hypothesis is not installed: `make setup-dev` brings it")

from closets import closet, sign
from damage import TensorChange, damaged_archive, tensor_changes, write_changed
from hypothesis import strategies as st

from kfloc_ros.errors import MapError
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.archive import LIMITS, pack_map, unpack_map
from kfloc_ros.maps.format import DESCRIPTION, HEAD_FILE, REFERENCES_FILE, resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame

Fuzz = Callable[..., None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replace(closet(0), name="closet").save(tmp_path_factory.mktemp("maps") / "closet")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "closet"))


def assert_sound(loaded: SceneMap) -> None:
    """A frame is answered with a finite pose or with none."""
    camera = loaded.camera
    assert camera.is_pinhole and loaded.name and loaded.frame_id and np.isfinite(loaded.bounds_m).all()
    if camera.width * camera.height > 300_000:
        return
    image = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
    localizer = Localizer(loaded, LocalizerConfig(device="cpu"))
    for stamp_ns in (10**9, 2 * 10**9):
        with np.errstate(all="ignore"):
            estimate = localizer.process(Frame(image, camera, stamp_ns)).estimate
        if estimate.T_map_camera is not None and estimate.covariance is not None:
            assert np.isfinite(estimate.T_map_camera).all() and np.isfinite(estimate.covariance).all()


ANY = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates(),
        st.sampled_from([10**9, 10**400, -1, 0, 1e308, "320", "..", "/etc/passwd", "\x00"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
PLACES = st.sampled_from([
    ("name",), ("frame_id",), ("version",), ("camera",), ("camera", "width"), ("camera", "fx"), ("camera", "cx"),
    ("camera", "distortion"), ("camera", "distortion_model"), ("camera", "more"), ("head",), ("head", "width"),
    ("head", "blocks"), ("head", "count"), ("bounds_m",), ("calibration",), ("calibration", "process_scale"),
    ("calibration", "max_alignment_cost"), ("calibration", "refined_covariance_scale"), ("provenance",), ("files",),
    ("roughness",), ("files", HEAD_FILE), ("files", HEAD_FILE, "bytes"), ("files", "../x"),
])  # fmt: skip


@pytest.mark.thorough
def test_any_value_in_the_description_is_sound_or_refused(fuzz: Fuzz, folder: Path, tmp_path: Path) -> None:
    good = (folder / DESCRIPTION).read_text()

    def check(changes: list[tuple[tuple[str, ...], Any]]) -> None:
        description = yaml.safe_load(good)
        for place, value in changes:
            inner = description
            for key in place[:-1]:
                inner = inner[key] if isinstance(inner, dict) and isinstance(inner.get(key), dict) else {}
            inner[place[-1]] = value
        (folder / DESCRIPTION).write_text(yaml.safe_dump(description, allow_unicode=True))
        try:
            loaded = SceneMap.load(folder)
        except MapError:
            return
        assert_sound(loaded)

    fuzz(check, st.lists(st.tuples(PLACES, ANY), min_size=1, max_size=2), share=0.5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["closet", *LIMITS])


def test_any_text_as_description_is_refused_or_whole(fuzz: Fuzz, folder: Path) -> None:
    good = (folder / DESCRIPTION).read_bytes()

    def check(edits: list[tuple[int, bytes]], text: str | None) -> None:
        data = bytearray(good)
        for at, piece in edits:
            data[at % len(data) : at % len(data) + len(piece)] = piece
        (folder / DESCRIPTION).write_bytes(bytes(data) if text is None else text.encode("utf-8", "surrogatepass"))
        try:
            loaded = SceneMap.load(folder)
        except MapError:
            return
        assert_sound(loaded)

    edits = st.lists(st.tuples(st.integers(0, 5000), st.one_of(st.binary(max_size=3), st.just(b"&a ["))), max_size=4)
    fuzz(check, edits, st.one_of(st.none(), st.text(max_size=80)), share=0.5)


@pytest.mark.parametrize("name", [HEAD_FILE, REFERENCES_FILE])
def test_any_bytes_with_right_checksums_are_sound_or_refused(fuzz: Fuzz, folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")

    def check(edits: list[tuple[int, int]], length: int | None) -> None:
        data = bytearray(good if length is None else good[: length % len(good)])
        for at, value in edits:
            if data:
                data[at % min(len(data), 2 * header)] = value
        (folder / name).write_bytes(bytes(data))
        sign(folder)
        try:
            loaded = SceneMap.load(folder)
        except MapError:
            return
        assert_sound(loaded)

    places = st.tuples(st.one_of(st.integers(0, 12), st.integers(0, 10**6)), st.integers(0, 255))
    fuzz(check, st.lists(places, max_size=6), st.one_of(st.none(), st.integers(0, 10**7)), share=0.5)


NAMES = ["ids", "counts", "T_map_camera", "points", "coarse", "fine", "confidence"]


def test_any_tensors_with_right_checksums_are_sound_or_refused(fuzz: Fuzz, folder: Path) -> None:
    good = load_file(folder / REFERENCES_FILE)

    def check(changes: list[TensorChange]) -> None:
        write_changed(good, changes, folder / REFERENCES_FILE)
        sign(folder)
        try:
            loaded = SceneMap.load(folder)
        except MapError:
            return
        assert_sound(loaded)

    fuzz(check, tensor_changes(NAMES), share=0.5)


def test_any_archive_is_whole_or_refused_and_leaves_nothing(fuzz: Fuzz, folder: Path, tmp_path: Path) -> None:
    good = pack_map(folder, tmp_path / "closet.kfmap").read_bytes()
    work, archive = tmp_path / "work", tmp_path / "damaged.kfmap"
    work.mkdir()

    def check(edits: list[tuple[int, int]], length: int | None) -> None:
        archive.write_bytes(damaged_archive(good, edits, length))
        try:
            unpack_map(archive, work / "out")
        except MapError:
            assert list(work.iterdir()) == []
            return
        assert sorted(path.name for path in work.rglob("*")) == sorted(["out", *LIMITS])
        shutil.rmtree(work / "out")

    places = st.tuples(st.one_of(st.integers(0, 250), st.integers(0, 10**7)), st.integers(0, 255))
    fuzz(check, st.lists(places, max_size=5), st.one_of(st.none(), st.integers(0, 10**7)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closet", "closet.kfmap", "damaged.kfmap", "work"]


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_other_compressions_are_refused(folder: Path, tmp_path: Path, method: int) -> None:
    """Their readers raise errors of their own, and unpack a hundred thousand times what they read."""
    archive = tmp_path / "closet.kfmap"
    with zipfile.ZipFile(archive, "w", method) as packed:
        for name in LIMITS:
            packed.write(folder / name, name)
    with pytest.raises(MapError, match="use a compression"):
        unpack_map(archive, tmp_path / "out")


def test_any_name_of_a_map_is_a_folder_or_refused(fuzz: Fuzz) -> None:
    names = st.one_of(
        st.text(max_size=20), st.sampled_from(["x" * 300, "~nobody-of-that-name/map", "\x00", "~\x00", "a/" * 3000])
    )

    def check(name: str) -> None:
        try:
            SceneMap.load(resolve_map(name))
        except MapError:
            return
        assert (resolve_map(name) / DESCRIPTION).is_file()

    fuzz(check, names)


def test_a_loaded_map_does_not_change_with_its_files(folder: Path) -> None:
    loaded = SceneMap.load(folder)
    before = {name: value.clone() for name, value in loaded.head.state_dict().items()}
    points = loaded.references.views[1].points.clone()
    for name in (HEAD_FILE, REFERENCES_FILE):
        size = (folder / name).stat().st_size
        with (folder / name).open("r+b") as stream:  # in place, as a copy onto it would
            stream.write(b"\xff" * size)
        with (folder / name).open("r+b") as stream:
            stream.truncate(10)
    assert torch.equal(loaded.references.views[1].points, points)
    assert all(torch.equal(value, before[name]) for name, value in loaded.head.state_dict().items())
