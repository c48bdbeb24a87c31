# SPDX-License-Identifier: Apache-2.0
"""The map folder: what is written is read back; anything damaged is refused with a sentence."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from kfloc_ros.cli.main import main
from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.scoordnet import RoughnessScale, SCoordNet
from kfloc_ros.maps.format import REFERENCES_FILE, read_description, resolve_map
from kfloc_ros.maps.scene_map import Calibration, SceneMap, verify_map
from kfloc_ros.pixloc.patch_kernels import PATCH_SIDE
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

NUMBERS = {name: value for name, value in asdict(Calibration()).items() if name != "roughness"}


def small_map() -> SceneMap:
    torch.manual_seed(0)

    def view(n: int) -> ReferencePoints:
        return ReferencePoints(
            torch.randn(n, 3), F.normalize(torch.randn(n, 64)), F.normalize(torch.randn(n, 24)), torch.rand(n)
        )

    poses = np.stack([np.eye(4), np.eye(4)])
    poses[1, 0, 3] = 1.0
    head = SCoordNet(width=16, blocks=1)
    head.normalize_with(torch.randn(100, 192), torch.randn(100, 3) + 2.0)
    return SceneMap(
        name="closet",
        frame_id="map",
        camera=Camera(320, 256, 260.0, 261.0, 159.5, 127.5),
        head=head.eval(),
        references=ReferenceViews((3, 14), poses, (view(70), view(60))),
        calibration=Calibration(process_scale=0.5, max_alignment_cost=0.2),
        bounds_m=((0.0, 0.0, 0.0), (1.0, 2.0, 3.0)),
        provenance={"source": "test"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_map().save(tmp_path / "closet")


def test_what_is_written_is_read_back(folder: Path) -> None:
    original, loaded = small_map(), SceneMap.load(folder)
    assert loaded.camera == original.camera
    assert loaded.calibration == original.calibration
    assert loaded.references.ids == (3, 14)
    assert loaded.references.T_map_camera == pytest.approx(original.references.T_map_camera)
    assert torch.allclose(loaded.references.views[1].points, original.references.views[1].points)
    assert torch.allclose(loaded.references.views[0].fine, original.references.views[0].fine, atol=0.01)
    inputs = torch.randn(50, 192)
    assert torch.allclose(loaded.head(inputs)[0], original.head(inputs)[0], atol=0.02)
    assert torch.equal(loaded.head.centre, original.head.centre)
    assert verify_map(folder) == []


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_map_of_an_older_version_is_refused_with_the_way_out(
    folder: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "map.yaml"
    path.write_text(path.read_text().replace("version: 4", f"version: {version}"))
    with pytest.raises(MapError, match=rf"format version {version}, older than .* `kfloc map build SOURCE --out"):
        SceneMap.load(folder)
    before = path.read_bytes()
    assert main(["map", "migrate", str(folder), "--out", str(folder), "--force"]) == 2
    assert "kfloc map build" in capsys.readouterr().err and path.read_bytes() == before


def test_there_is_nothing_to_migrate_in_a_present_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "migrate", str(folder), "--out", str(folder), "--force"]) == 0
    assert "current format version 4" in capsys.readouterr().out and verify_map(folder) == []


def with_tensors(folder: Path, **changed: torch.Tensor) -> None:
    """Replace tensors of the references, with the checksum of the new file."""
    path = folder / REFERENCES_FILE
    save_file({**load_file(path), **changed}, path)
    description = yaml.safe_load((folder / "map.yaml").read_text())
    description["files"][REFERENCES_FILE] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "map.yaml").write_text(yaml.safe_dump(description))


def test_reference_features_of_another_type_are_refused(folder: Path) -> None:
    with_tensors(folder, coarse=torch.zeros(130, 64).half())
    with pytest.raises(MapError, match=r"coarse are stored as torch\.float16"):
        SceneMap.load(folder)


def test_patches_are_read_back_and_those_of_another_size_refused(tmp_path: Path) -> None:
    original = small_map()
    first, second = original.references.views
    patches = torch.randint(0, 255, (70, PATCH_SIDE**2), dtype=torch.uint8)
    views = replace(original.references, views=(replace(first, patches=patches), second))
    folder = replace(original, references=views).save(tmp_path / "closet")
    loaded = SceneMap.load(folder).references.views
    assert loaded[0].patches is not None and torch.equal(loaded[0].patches, patches)
    assert loaded[1].patches is not None and not loaded[1].patches.any(), "a view without has no contrast"
    with_tensors(folder, patches=torch.zeros(130, 25, dtype=torch.uint8))
    with pytest.raises(MapError, match=r"patches have the shape \(130, 25\)"):
        SceneMap.load(folder)


def test_an_existing_folder_is_kept_unless_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MapError, match="--force"):
        small_map().save(folder)
    small_map().save(folder, overwrite=True)
    other = tmp_path / "notes"
    other.mkdir()
    with pytest.raises(MapError, match="is not a map"):
        small_map().save(other, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closet", "notes"], "no temporary folder may stay behind"


@pytest.mark.parametrize("victim", ["scoordnet.safetensors", "references.safetensors"])
def test_a_flipped_byte_is_noticed(folder: Path, victim: str) -> None:
    data = bytearray((folder / victim).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / victim).write_bytes(data)
    with pytest.raises(MapError, match=f"{victim} does not match its checksum"):
        SceneMap.load(folder)
    assert len(verify_map(folder)) == 1


def test_missing_things_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MapError, match="no map folder"):
        SceneMap.load(tmp_path / "nowhere")
    (folder / "references.safetensors").unlink()
    with pytest.raises(MapError, match=r"references\.safetensors is missing"):
        SceneMap.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "newer than the 4 that this installation reads"),
        ({"version": "one"}, "no valid format version"),
        ({"format": "other"}, "does not describe a map"),
        ({"camera": {"width": 320}}, "damaged"),
        ({"head": None}, "damaged"),
        ({"calibration": {**NUMBERS, "process_scale": float("nan")}}, "positive number"),
        ({"calibration": {"process_scale": 1.0}}, "its calibration lacks coarse_covariance_scale"),
        ({"calibration": {"surprise": 1.0}}, "damaged"),
        ({"roughness": {"usual_m": 0.02}}, "damaged"),
        ({"roughness": {"usual_m": 0.02, "power": -1.0}}, "'power' must be a positive number"),
        ({"roughness": [0.02, 1.0]}, "damaged"),
        ({"files": []}, "does not list"),
    ],
)
def test_a_bad_description_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "map.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(MapError, match=message):
        SceneMap.load(folder)


def test_what_roughness_means_lies_beside_the_calibration(folder: Path, tmp_path: Path) -> None:
    assert SceneMap.load(folder).calibration.roughness is None
    assert "roughness" not in read_description(folder)
    original = small_map()
    rough = replace(original, calibration=replace(original.calibration, roughness=RoughnessScale(0.02, 1.5)))
    description = read_description(rough.save(tmp_path / "rough"))
    assert description["roughness"] == {"usual_m": 0.02, "power": 1.5}
    assert description["calibration"] == read_description(folder)["calibration"]
    assert SceneMap.load(tmp_path / "rough").calibration == rough.calibration


def test_yaml_cannot_run_anything(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "created"
    (folder / "map.yaml").write_text(f"!!python/object/apply:os.mkdir ['{victim}']\n")
    with pytest.raises(MapError, match="cannot be read"):
        SceneMap.load(folder)
    assert not victim.exists()


def test_maps_are_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFLOC_MAPS", str(folder.parent))
    assert resolve_map("closet") == folder
    assert resolve_map(str(folder)) == folder
    with pytest.raises(MapError, match="KFLOC_MAPS"):
        resolve_map("attic")
    with pytest.raises(MapError, match="No map is given"):
        resolve_map("")
