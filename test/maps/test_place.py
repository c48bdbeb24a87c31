# SPDX-License-Identifier: Apache-2.0
"""A place on disk: made whole, read back, refused with a sentence whatever it claims; nothing outside is touched."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closets import CAMERA, MOTION, change, closet
from safetensors.torch import load_file, save_file

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.maps.format import DESCRIPTION, INDEX_FILE, SUBMAPS, read_description
from kfloc_ros.maps.place import Place, is_place, load_map, verify_place
from kfloc_ros.maps.place_index import SHORTLIST, make_index
from kfloc_ros.maps.scene_map import SceneMap, in_frame
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("maps")
    return [closet(seed).save(root / name) for seed, name in enumerate(("hall", "attic"))]


@pytest.fixture(scope="module")
def whole(maps: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(maps, tmp_path_factory.mktemp("places") / "house", T_place_submaps={"attic": MOTION}).path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "house"))


def test_what_was_made_is_read_back(whole: Path, maps: list[Path]) -> None:
    place = Place.load(whole)
    assert (place.name, place.frame_id, place.camera) == ("house", "map", CAMERA)
    assert [submap.name for submap in place.submaps] == ["hall", "attic"]
    assert [place.index.view_count(k) for k in range(2)] == [3, 3]
    loaded = place.load_submap(0)
    assert torch.equal(loaded.references.views[1].points, SceneMap.load(maps[0]).references.views[1].points)
    assert verify_place(whole) == [] and is_place(whole) and not is_place(maps[0])
    assert isinstance(load_map(whole), Place) and isinstance(load_map(maps[0]), SceneMap)


def test_a_submap_comes_in_the_frame_of_the_place(whole: Path, maps: list[Path]) -> None:
    place, own = Place.load(whole), SceneMap.load(maps[1])
    moved = place.load_submap(1)
    assert np.allclose(moved.references.T_map_camera, MOTION @ own.references.T_map_camera)
    assert np.allclose(place.index.T_place_camera[3:], moved.references.T_map_camera)
    expected = own.references.views[0].points.double().numpy() @ MOTION[:3, :3].T + MOTION[:3, 3]
    assert np.allclose(moved.references.views[0].points.numpy(), expected, atol=1e-5)
    low, high = (np.array(corner) for corner in moved.bounds_m)
    assert (low < high).all() and np.allclose(place.submaps[1].bounds_m, moved.bounds_m)
    inputs = torch.randn(7, 192)
    with torch.inference_mode():
        before, after = own.head(inputs)[0].double().numpy(), moved.head(inputs)[0].double().numpy()
    assert np.allclose(after, before @ MOTION[:3, :3].T + MOTION[:3, 3], atol=1e-4)


def test_a_map_that_is_not_moved_stays_as_it_is() -> None:
    own = closet(0)
    assert in_frame(own, np.eye(4), "map").references is own.references


def test_the_index_knows_the_submap_of_its_own_views_and_what_is_near(whole: Path) -> None:
    place = Place.load(whole)
    index = place.index
    for submap in range(2):
        for view in place.load_submap(submap).references.views:
            row = index.axes @ (index.vocabulary.describe_view(view) - index.mean)
            similarity = index.descriptors @ torch.nn.functional.normalize(row, dim=0)
            assert int(index.submap[int(similarity.argmax())]) == submap
    distances = index.distances(index.T_place_camera[4])
    assert distances.argmin() == 1 and distances[1] < 1e-6 < distances[0]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["submaps"][0].update(name="../../etc"), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].update(name="/etc"), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].update(name="a/b"), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].update(name=".."), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].update(name="attic\n"), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].update(name="Attic"), "two submaps have the same name"),
        (lambda d: d["submaps"][0].update(name=7), "not a valid name of a submap"),
        (lambda d: d["submaps"][0].pop("name"), "damaged"),
        (lambda d: d["submaps"][0].update(T_place_submap=np.diag([2.0, 2, 2, 1]).tolist()), "not a rigid motion"),
        (lambda d: d["submaps"][0].update(T_place_submap=np.full((4, 4), np.nan).tolist()), "not a rigid motion"),
        (lambda d: d["submaps"][0].update(T_place_submap=make_pose(np.eye(3), [1e30, 0, 0]).tolist()), "not a rigid"),
        (lambda d: d["submaps"][0].update(T_place_submap="here"), "damaged"),
        (lambda d: d["submaps"][0].update(bounds_m=[[0, 0, 0], [1, 1, float("inf")]]), "not a box"),
        (lambda d: d.update(submaps=[]), "lists no submaps"),
        (lambda d: d.update(submaps={"hall": 1}), "lists no submaps"),
        (lambda d: d["submaps"].pop(), "views of every submap"),
        (lambda d: d["camera"].update(width=10**9), "damaged"),
        (lambda d: d.update(version=2), "newer than the 1"),
        (lambda d: d.update(version=0), "no valid format version"),
        (lambda d: d.update(format="kfloc_palace"), "does not describe a map"),
        (lambda d: d.update(format=["kfloc_place"]), "does not describe a map"),
    ],
)  # fmt: skip
def test_a_hostile_description_is_refused(folder: Path, edit: Callable[[dict[str, Any]], Any], says: str) -> None:
    change(folder, edit)
    with pytest.raises(MapError, match=says):
        Place.load(folder)


def damaged_index(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / INDEX_FILE)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, folder / INDEX_FILE)
        change(folder, lambda d: None)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        damaged_index("axes", None),
        damaged_index("axes", torch.zeros(6, 5)),
        damaged_index("mean", torch.full((4096,), float("nan"))),
        damaged_index("centres", torch.zeros(64, 63)),
        damaged_index("descriptors", torch.zeros(3, 6, dtype=torch.int8)),
        damaged_index("submap", torch.tensor([0, 0, 1, 1, 0, 1])),
        damaged_index("submap", torch.tensor([0, 0, 0, 2, 2, 2])),
        damaged_index("submap", torch.tensor([0, 0, 0, 1, 1, 10**12])),
        damaged_index("T_place_camera", torch.zeros(6, 4, 4)),
        damaged_index("codes", torch.zeros(6, 128, 8)),
        damaged_index("codes", torch.zeros(6, 128, 7, dtype=torch.uint8)),
        lambda folder: (folder / INDEX_FILE).write_bytes(b"\xff" * 100),
        lambda folder: (folder / INDEX_FILE).unlink(),
    ],
)
def test_a_hostile_index_is_refused(folder: Path, edit: Callable[[Path], Any]) -> None:
    edit(folder)
    with pytest.raises(MapError):
        Place.load(folder)


def test_a_submap_that_leads_outside_is_refused(folder: Path, maps: list[Path]) -> None:
    shutil.rmtree(folder / SUBMAPS / "attic")
    (folder / SUBMAPS / "attic").symlink_to(maps[1])
    with pytest.raises(MapError, match="is a link"):
        Place.load(folder).load_submap(1)
    assert len(verify_place(folder)) == 1


def test_another_map_in_a_submaps_place_is_noticed(folder: Path, maps: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(folder / SUBMAPS / "attic")
    shutil.copytree(maps[0], folder / SUBMAPS / "attic")
    with pytest.raises(MapError, match="not the map that the place was made from"):
        Place.load(folder).load_submap(1)
    shutil.rmtree(folder / SUBMAPS / "attic")
    with pytest.raises(MapError, match="no map folder"):
        Place.load(folder).load_submap(1)


def test_what_is_made_is_there_whole_or_not_at_all(maps: list[Path], tmp_path: Path) -> None:
    other = closet(2, replace(CAMERA, fx=90.0)).save(tmp_path / "other_camera")
    spaced = closet(3).save(tmp_path / "two words")
    twin = closet(4).save(tmp_path / "twin" / "hall")
    for folders, says in (
        ([maps[0], other], "different cameras"),
        ([maps[0], spaced], "not a valid name of a submap"),
        ([maps[0], twin], "Two of the maps have the name"),
        ([maps[0], tmp_path / "nothing"], "no map folder"),
        ([], "at least one"),
    ):
        with pytest.raises(MapError, match=says):
            make_place(folders, tmp_path / "out")
    with pytest.raises(MapError, match="no submap 'cellar'"):
        make_place(maps, tmp_path / "out", T_place_submaps={"cellar": MOTION})
    with pytest.raises(MapError, match="exists"):
        make_place(maps, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other_camera", "twin", "two words"]


def test_a_place_is_made_described_and_verified_on_the_command_line(
    maps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, names = tmp_path / "house", [str(path) for path in maps]
    assert main(["map", "place", *names, "--at", "attic", "0", "0", "3", "0", "0", "0", "1", "--out", str(out)]) == 0
    assert main(["map", "info", str(out)]) == 0
    assert main(["map", "verify", str(out)]) == 0
    assert "attic  " in capsys.readouterr().out
    assert np.allclose(Place.load(out).submaps[1].T_place_submap[:3, 3], [0, 0, 3])
    assert main(["map", "place", *names, "--at", "attic", "0", "0", "3", "0", "0", "0", "2", "--out", str(out)]) == 2
    (out / SUBMAPS / "attic" / DESCRIPTION).unlink()
    assert main(["map", "verify", str(out)]) == 1
    assert read_description(out)["format"] == "kfloc_place"


def test_what_a_few_points_show_decides_between_submaps_alike(tmp_path: Path) -> None:
    """Twenty submaps of the same features but for a tenth of each; the descriptors hardly tell them apart."""
    unit, count, own = torch.nn.functional.normalize, 20, 8
    torch.manual_seed(0)
    common = unit(torch.randn(80 - own, 64))
    features = [torch.cat([unit(torch.randn(own, 64)), common]) for _ in range(count)]
    weight = torch.ones(80)

    def load(number: int) -> ReferenceViews:
        view = ReferencePoints(torch.randn(80, 3), features[number], unit(torch.randn(80, 24)), weight)
        return ReferenceViews((0,), np.eye(4)[None], (view,))

    index = make_index(load, count)
    for number in (0, 7, 13):
        grid = torch.zeros(1, 64, 32, 40)
        grid[0, :, ::4, ::4] = unit(features[number] + 0.04 * torch.randn(80, 64)).t().reshape(64, 8, 10)
        reliability = torch.zeros(1, 32, 40)
        reliability[0, ::4, ::4] = 1.0
        found = index.search(BackboneFeatures(grid, torch.zeros(0), torch.zeros(0), reliability), submaps=4, views=3)
        assert found[0].submap == number and found[0].votes > 3 * found[1].votes
        assert len(found) <= SHORTLIST
