# SPDX-License-Identifier: Apache-2.0
"""Every ``kfloc map`` command on a place of several maps: it works, or says which submap to name, and how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
import torch
import yaml
from closets import CAMERA, MOTION, closet, files_below

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping.place_making import make_place, submap_of
from kfloc_ros.maps.format import DESCRIPTION, SUBMAPS
from kfloc_ros.maps.place import Place, verify_place
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame

Out = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("maps")
    return [closet(seed).save(root / name) for seed, name in enumerate(("hall", "attic", "cellar"))]


@pytest.fixture(scope="module")
def house(maps: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(maps[:2], tmp_path_factory.mktemp("places") / "house", T_place_submaps={"attic": MOTION}).path


def run(*arguments: object) -> int:
    return main(["map", *(str(argument) for argument in arguments)])


def test_a_map_is_added_to_a_place_and_two_places_are_joined(house: Path, maps: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "larger"
    assert run("place", house, maps[2], "--out", out) == 0
    larger, before = Place.load(out), Place.load(house)
    assert [submap.name for submap in larger.submaps] == ["hall", "attic", "cellar"]
    assert np.array_equal(larger.submaps[1].T_place_submap, MOTION) and verify_place(out) == []
    assert np.allclose(larger.index.T_place_camera[:6], before.index.T_place_camera)
    assert run("place", out, "--out", out, "--force", "--at", "cellar", 0, 0, -3, 0, 0, 0, 1) == 0
    again = Place.load(out)
    assert again.submaps[2].T_place_submap[2, 3] == -3.0
    assert np.array_equal(again.submaps[1].T_place_submap, MOTION)
    assert run("place", out, house, "--out", tmp_path / "twice") == 2  # both have a hall


def test_one_picture_shows_all_submaps(house: Path, tmp_path: Path, capsys: Out) -> None:
    for name, more in (("plan.png", ()), ("coverage.png", ("--accuracy",))):
        assert run("view", house, "--out", tmp_path / name, *more) == 0
        image = cv2.imread(str(tmp_path / name))
        assert min(image.shape[:2]) > 300 and image.std() > 10
    told = capsys.readouterr().out
    assert "hall: " in told and "attic: " in told


def test_a_place_becomes_one_file_and_a_place_again(house: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "house.kfmap", tmp_path / "again"
    assert run("pack", house, "--out", packed) == 0
    assert run("unpack", packed, "--out", out) == 0
    assert run("verify", out) == 0 and files_below(out) == files_below(house)


def test_colmap_and_ply_hold_all_submaps_in_the_frame_of_the_place(house: Path, tmp_path: Path) -> None:
    assert run("export", house, "--to", "colmap", "--out", tmp_path / "model") == 0
    model, place = pycolmap.Reconstruction(str(tmp_path / "model")), Place.load(house)
    names = sorted(image.name for image in model.images.values())
    assert names[0] == "attic/view_000003.png" and names[-1] == "hall/view_000009.png" and len(set(names)) == 6
    attic = next(image for image in model.images.values() if image.name == "attic/view_000005.png")
    seen = place.load_submap(1).references.T_map_camera[1]
    assert attic.cam_from_world().inverse().matrix() == pytest.approx(seen[:3], abs=1e-6)
    assert run("export", house, "--to", "ply", "--out", tmp_path / "points.ply") == 0
    data = (tmp_path / "points.ply").read_bytes().split(b"end_header\n", 1)[1]
    points = np.frombuffer(data, "<f4").reshape(-1, 4)[:, :3]
    expected = torch.cat([v.points for k in range(2) for v in place.load_submap(k).references.views])
    assert points == pytest.approx(expected.numpy())


def test_a_part_of_a_place_leaves_out_what_is_not_in_the_box(house: Path, tmp_path: Path, capsys: Out) -> None:
    place, out = Place.load(house), tmp_path / "part"
    points = torch.cat([view.points for view in place.load_submap(1).references.views])
    low, high = points.amin(dim=0) - 0.1, points.amax(dim=0) + 0.1
    assert run("crop", house, "--out", out, "--box", *low.tolist(), *high.tolist()) == 0
    part = Place.load(out)
    kept = [submap.name for submap in part.submaps]
    assert "attic" in kept and verify_place(out) == []
    attic = part.load_submap(kept.index("attic"))
    assert torch.equal(torch.cat([view.points for view in attic.references.views]), points)
    assert run("crop", house, "--out", tmp_path / "none", "--box", 90, 90, 90, 91, 91, 91) == 2
    assert "the place reaches from" in capsys.readouterr().err
    assert run("crop", house, "--out", tmp_path / "none", "--box", 1, 0, 0, 0, 1, 1) == 2
    assert "smallest corner first" in capsys.readouterr().err


def test_a_place_with_a_submap_of_an_older_version_is_refused(maps: list[Path], tmp_path: Path) -> None:
    old = closet(0).save(tmp_path / "hall")
    description = yaml.safe_load((old / DESCRIPTION).read_text())
    (old / DESCRIPTION).write_text(yaml.safe_dump(description | {"version": 3}))
    with pytest.raises(MapError, match="kfloc map build"):
        make_place([old, maps[1]], tmp_path / "house", T_place_submaps={"attic": MOTION})
    assert not (tmp_path / "house").exists()


def test_what_takes_one_map_says_which_to_name(house: Path, maps: list[Path], tmp_path: Path, capsys: Out) -> None:
    assert run("merge", house, maps[2], "--out", tmp_path / "both") == 2
    told = capsys.readouterr().err
    assert str(house / SUBMAPS) in told and "kfloc map place" in told
    with pytest.raises(MapError, match="give one of its submaps"):
        SceneMap.load(house)
    assert run("update", maps[0], "sim:map-quick", "--submap", "attic", "--out", tmp_path / "x") == 2
    assert "single map" in capsys.readouterr().err
    assert run("update", house, "sim:map-quick", "--submap", "loft", "--out", tmp_path / "x") == 2
    assert "has no submap 'loft'; its submaps are: hall, attic" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_swapped_index_is_noticed(house: Path, maps: list[Path], tmp_path: Path, capsys: Out) -> None:
    """The index of the same maps placed elsewhere fits in every number but the poses."""
    other = make_place(maps[:2], tmp_path / "other").path
    place = make_place(maps[:2], tmp_path / "house", T_place_submaps={"attic": MOTION}).path
    description = yaml.safe_load((place / DESCRIPTION).read_text())
    description["files"] = yaml.safe_load((other / DESCRIPTION).read_text())["files"]
    (place / DESCRIPTION).write_text(yaml.safe_dump(description))
    (other / "index.safetensors").rename(place / "index.safetensors")
    assert run("verify", place) == 1
    assert "other poses of views than the submap 'attic'" in capsys.readouterr().err


class Posed(FrameSource):
    """Poses without images worth reading."""

    name = "posed"
    camera = CAMERA

    def __init__(self, poses: list[np.ndarray | None]) -> None:
        self._poses = poses

    def __len__(self) -> int:
        return len(self._poses)

    def indices(self) -> range:
        return range(len(self._poses))

    def pose(self, position: int) -> np.ndarray | None:
        return self._poses[position]

    def __getitem__(self, position: int) -> Frame:
        image = np.zeros((CAMERA.height, CAMERA.width, 3), np.uint8)
        return replace(Frame(image, CAMERA, position, position), T_map_camera=self._poses[position])


def test_the_submap_of_a_recording_is_that_nearest_to_its_poses(house: Path) -> None:
    place = Place.load(house)
    hall, attic = place.index.T_place_camera[:3], place.index.T_place_camera[3:]
    assert submap_of(place, Posed([*attic, None]), same_frame=True) == 1
    with pytest.raises(MapError, match="Give it with --submap"):
        submap_of(place, Posed([*attic, *hall]), same_frame=True)
    with pytest.raises(MapError, match="0 were localized, in none"):
        submap_of(place, Posed(list(attic)))
