# SPDX-License-Identifier: Apache-2.0
"""Maps with KFNet's own networks in them: what is stored comes back, and what localizes are those networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kfloc_ros.cli.coordinates import export_coordinates
from kfloc_ros.cli.main import main
from kfloc_ros.cli.tables import describe
from kfloc_ros.datasets.kfnet import write_kfnet_folder
from kfloc_ros.errors import MapError, WeightsError
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.kfnet.filter import SceneCoordinateFilter
from kfloc_ros.kfnet.fusion import FilterSettings, NisMode
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import NetworkFrame, ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import save_network
from kfloc_ros.localization.coarse import recursion_of
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import StageTimes
from kfloc_ros.mapping.merge import merge_maps
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.mapping.update import update_map
from kfloc_ros.maps.archive import pack_map, unpack_map
from kfloc_ros.maps.format import DESCRIPTION, KFNET_FILE
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.scene_map import SceneMap, in_frame, verify_map
from kfloc_ros.training.kfnet_family import HeldOutFrames, calibrate_networks, with_networks

CPU = LocalizerConfig(device="cpu")
MOVE = make_pose(so3_exp([0.1, -0.4, 0.3]), [1.0, -2.0, 0.5])


@pytest.fixture
def networks() -> ReferenceNetworks:
    """Untrained, for images of half the size of the room's."""
    torch.manual_seed(0)
    frame = NetworkFrame(make_pose(so3_exp([0.2, 0.1, 0.0]), [0.3, 0.0, -0.1]), 0.5)
    return ReferenceNetworks(ReferenceSCoordNet(width=1 / 64, frame=frame, image_size=(160, 128)), ReferenceOFlowNet())


@pytest.fixture
def kfnet_map(room_map: Path, networks: ReferenceNetworks) -> SceneMap:
    return with_networks(SceneMap.load(room_map), networks)


def test_what_is_written_is_read(kfnet_map: SceneMap, tmp_path: Path) -> None:
    kfnet_map.save(tmp_path / "map")
    loaded = SceneMap.load(tmp_path / "map")
    assert loaded.family == "reference" and loaded.kfnet is not None and kfnet_map.kfnet is not None
    for name in ("scoordnet", "oflownet"):
        before, after = (getattr(pair, name).state_dict() for pair in (kfnet_map.kfnet, loaded.kfnet))
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert loaded.kfnet.scoordnet.image_size == (160, 128)
    assert not loaded.kfnet.scoordnet.training
    assert verify_map(tmp_path / "map") == []
    pack_map(tmp_path / "map", tmp_path / "map.kfmap")
    unpacked = unpack_map(tmp_path / "map.kfmap", tmp_path / "again")
    assert unpacked.kfnet is not None and unpacked.kfnet.scoordnet.frame.scale == 0.5


@pytest.fixture
def undeterred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained networks give no pose, after which the filter would start anew with every frame."""
    monkeypatch.setattr(SceneCoordinateFilter, "accept_pose", lambda self, pose: None)


@pytest.mark.usefixtures("undeterred")
def test_the_stage_measures_and_filters_with_the_networks(
    kfnet_map: SceneMap, networks: ReferenceNetworks, room: FrameSource
) -> None:
    """As done by hand with the networks alone; a cell of 8 pixels of theirs is one of 16 in the map's camera."""
    localizer = Localizer(kfnet_map, CPU)
    small = networks.camera(kfnet_map.camera)
    adapter = ImageAdapter(kfnet_map.camera, small)
    recursion = SceneCoordinateFilter(FilterSettings(1.0, 1.0, 1e-10), networks.oflownet.flow)
    for k in range(3):
        frame = room[k]
        result = localizer.coarse_half(frame)
        image = adapter(frame.image)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            features = networks.oflownet.features(pixels)[0]
            by_hand = recursion.step(frame.stamp_ns, features, networks.scoordnet.measure(image))
        assert result.scene_coordinates is not None
        assert torch.allclose(result.scene_coordinates.mean, by_hand.posterior.mean, atol=1e-5)
        assert torch.allclose(result.scene_coordinates.variance, by_hand.posterior.variance, rtol=1e-4)
        assert (result.filter.reset_reason != "") == (k == 0)
    # where the small camera's pixel 8 c lies in the map's: that is what the cells say they are
    c = np.arange(20)
    rays = (8 * c - small.cx) / small.fx
    pixel = kfnet_map.camera.fx * rays + kfnet_map.camera.cx
    cells = result.scene_coordinates
    assert np.allclose(cells.stride * c + cells.pixel_offset, pixel)


def test_converted_networks_get_the_published_recursion(kfnet_map: SceneMap, tmp_path: Path) -> None:
    assert kfnet_map.kfnet is not None
    assert recursion_of(kfnet_map, CPU) == "robust"
    kfnet_map.kfnet.scoordnet.converted = True
    assert recursion_of(kfnet_map, CPU) == "robust"
    kfnet_map.kfnet.oflownet.converted = True
    kfnet_map.save(tmp_path / "map")
    loaded = SceneMap.load(tmp_path / "map")
    assert "converted weights" in describe(loaded)
    assert recursion_of(loaded, CPU) == "published"
    # the scene has 0.5 units per metre, so the published sigmas are half as large in number
    assert with_networks(loaded, kfnet_map.kfnet).calibration.process_scale == 4.0
    assert recursion_of(replace(loaded, kfnet=None), CPU) == "robust"
    settings = Localizer(loaded, CPU)._coarse._filter.settings
    assert settings.sequence_resets_only and settings.blend_sigma and settings.nis_mode is NisMode.OFF
    assert (settings.error_correlation, settings.process_scale) == (0.0, loaded.calibration.process_scale)
    nis = Localizer(loaded, replace(CPU, recursion="published_nis", nis_threshold=9.0))._coarse._filter.settings
    assert (nis.nis_mode, nis.nis_threshold) == (NisMode.OUTPUT_ONLY, 9.0)
    own = Localizer(loaded, replace(CPU, recursion="robust"))._coarse._filter.settings
    assert own.nis_mode is NisMode.LOWER_VARIANCE and not own.sequence_resets_only


@pytest.mark.parametrize("config", [CPU, replace(CPU, filter=False)], ids=["reset", "no filter"])
def test_coordinates_and_flow_are_written_as_the_networks_tell_them(
    config: LocalizerConfig, kfnet_map: SceneMap, networks: ReferenceNetworks, room: FrameSource, tmp_path: Path
) -> None:
    """Untrained networks give no pose, so the filter starts anew with every frame; the flow is written all the same."""
    source = Selection(room, range(3))
    assert list(export_coordinates(source, kfnet_map, config, tmp_path, flow=True)) == [0, 1, 2]
    description = json.loads((tmp_path / "coordinates.json").read_text())
    assert (description["stride"], description["pixel_offset"]) == (16, 0.5)
    assert np.load(tmp_path / "coord_2.npy").shape == (16, 20, 4)
    images = [torch.from_numpy(room[k].image) for k in (1, 2)]
    small = ImageAdapter(kfnet_map.camera, networks.camera(kfnet_map.camera))
    with torch.inference_mode():
        before, now = (
            networks.oflownet.features(torch.from_numpy(small(image.numpy())).permute(2, 0, 1)[None].float())[0]
            for image in images
        )
        flow = networks.oflownet.flow(now, before).offset
    assert np.allclose(np.load(tmp_path / "2_1_flow.npy")[..., :2], flow.permute(1, 2, 0).numpy(), atol=1e-5)
    assert not (tmp_path / "0_-1_flow.npy").exists()


@pytest.mark.usefixtures("undeterred")
def test_a_skipped_frame_is_filtered_by_the_networks_too(kfnet_map: SceneMap, room: FrameSource) -> None:
    stage, plain = Localizer(kfnet_map, CPU), Localizer(kfnet_map, CPU)
    for one in (stage, plain):
        one.coarse_half(room[0])
    stage._coarse.skip(room[1], stage._coarse.extract(room[1], StageTimes()))
    plain.reset("the belief before ends with the track that needs none")
    plain.coarse_half(room[1])
    means = [one.coarse_half(room[2]).scene_coordinates.mean for one in (stage, plain)]
    assert torch.allclose(means[0], means[1])


def constant(networks: ReferenceNetworks, sigma: float) -> ReferenceNetworks:
    """Networks that say the same of every cell."""
    with torch.no_grad():
        networks.scoordnet.prediction.weight.zero_()
        networks.scoordnet.prediction.bias.copy_(torch.tensor([0.0, 0.0, 0.0, math.log(sigma)]))
    return networks


def test_calibration_makes_sigmas_true(room_map: Path, networks: ReferenceNetworks, room: FrameSource) -> None:
    """Sigmas of 20 cm for errors of a metre or two: afterwards 68 % of them lie inside one sigma."""
    made = with_networks(SceneMap.load(room_map), constant(networks, 0.1))
    source = Selection(room, range(8))
    calibrated = calibrate_networks(made, source, 1, "cpu")
    c = calibrated.calibration
    frames = HeldOutFrames(source, networks.camera(made.camera), torch.device("cpu"))
    inside = []
    for k in range(len(source)):
        view = frames.view(k)
        truth, measured = frames.truth(view), networks.scoordnet.measure(view.image, c.measurement_variance_scale)
        inside.append((measured.mean - truth.mean).abs() < measured.variance.sqrt())
    assert c.measurement_variance_scale > 5.0
    assert float(torch.cat(inside).float().mean()) == pytest.approx(0.683, abs=0.02)
    assert c.process_scale != 1.0
    assert c.max_alignment_cost == made.calibration.max_alignment_cost


def test_moved_networks_tell_moved_points(kfnet_map: SceneMap, room: FrameSource) -> None:
    moved = in_frame(kfnet_map, MOVE, "building")
    assert moved.kfnet is not None and kfnet_map.kfnet is not None
    image = room[0].image[::2, ::2]
    there, here = (pair.scoordnet.measure(np.ascontiguousarray(image)).mean for pair in (moved.kfnet, kfnet_map.kfnet))
    expected = MOVE[:3, :3] @ here.double().reshape(3, -1).numpy() + MOVE[:3, 3:]
    assert np.allclose(there.reshape(3, -1).numpy(), expected, atol=1e-5)
    back = moved.kfnet.transformed(inverse_pose(MOVE)).scoordnet.frame
    assert np.allclose(back.T_network_map, kfnet_map.kfnet.scoordnet.frame.T_network_map)


def test_a_place_of_such_maps_is_copied_and_packed_whole(kfnet_map: SceneMap, room_map: Path, tmp_path: Path) -> None:
    kfnet_map.save(tmp_path / "hall")
    place = make_place([tmp_path / "hall", room_map], tmp_path / "house", T_place_submaps={"hall": MOVE})
    pack_map(tmp_path / "house", tmp_path / "house.kfmap")
    unpacked = unpack_map(tmp_path / "house.kfmap", tmp_path / "again")
    for one in (place, unpacked):
        assert isinstance(one, Place)
        hall, other = (one.load_submap(number) for number in range(2))
        assert (hall.family, other.family) == ("reference", "fast")


def test_what_cannot_be_is_refused(
    kfnet_map: SceneMap, networks: ReferenceNetworks, room: FrameSource, room_map: Path
) -> None:
    networks.scoordnet.image_size = (150, 120)
    with pytest.raises(WeightsError, match="image_width=320 image_height=256"):
        with_networks(SceneMap.load(room_map), networks)
    with pytest.raises(MapError, match="one session only"):
        merge_maps(SceneMap.load(room_map), kfnet_map, np.eye(4), spacing_m=0.1, max_points=10_000)
    with pytest.raises(MapError, match="one session only"):
        update_map(kfnet_map, Selection(room, []))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["kfnet"].update(width=4.0),
        lambda said: said["kfnet"].update(width=1e9),
        lambda said: said["kfnet"].update(image_size=[0, 8]),
        lambda said: said["kfnet"].update(image_size=[100, 80]),
        lambda said: said["kfnet"].update(image_size=[10, 8]),
        lambda said: said["kfnet"].update(padding="centred"),
        lambda said: said.pop("kfnet"),
        lambda said: said["files"].pop(KFNET_FILE),
    ],
)
def test_a_damaged_description_is_refused(
    kfnet_map: SceneMap, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    kfnet_map.save(tmp_path / "map")
    path = tmp_path / "map" / DESCRIPTION
    said = yaml.safe_load(path.read_text())
    change(said)
    path.write_text(yaml.safe_dump(said))
    with pytest.raises(MapError, match="damaged"):
        SceneMap.load(tmp_path / "map")


@pytest.mark.thorough
def test_the_command_and_then_localize(
    room_map: Path, networks: ReferenceNetworks, room: FrameSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(write_kfnet_folder(Selection(room, range(8)), tmp_path / "frames"))
    for name in ("scoordnet", "oflownet"):
        save_network(tmp_path / f"{name}.safetensors", getattr(networks, name))
    weights = [f"--{name}={tmp_path / name}.safetensors" for name in ("scoordnet", "oflownet")]
    source, out = f"kfnet:{tmp_path / 'frames'}", tmp_path / "kfnet_map"
    told = ["map", "kfnet", source, f"--map={room_map}", *weights, "--device=cpu"]
    assert main([*told, f"--out={out}"]) == 0
    assert "calibrated on" in capsys.readouterr().out
    assert main([*told, f"--out={out}"]) == 2
    assert "--force" in capsys.readouterr().err
    localize = ["localize", source, f"--map={out}", f"--out={tmp_path / 'run'}", "--device=cpu", "--quiet"]
    assert main(localize) == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert main(["map", "info", str(out)]) == 0
    assert "reference" in capsys.readouterr().out
    assert replace(SceneMap.load(out), kfnet=None).family == "fast"
